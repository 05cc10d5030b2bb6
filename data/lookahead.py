"""Work that threads do ahead of the loop that asks for it: reading files, decoding images."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Lookahead(Generic[T]):
    """`function(step, *more)`, computed by a thread for each of the steps that lie ahead, none from `end` on; what is
    asked for out of turn is computed then. A step's error is raised where the step is asked for."""

    def __init__(self, function: Callable[..., T], num_steps: int, end: int | None = None) -> None:
        self.function, self.num_steps, self.end = function, num_steps, end
        self._threads = ThreadPoolExecutor(num_steps, thread_name_prefix="ahead")
        self._results: dict[tuple[int, ...], Future[T]] = {}

    def __call__(self, step: int, *more: int) -> T:
        last = step + self.num_steps if self.end is None else min(step + self.num_steps, self.end - 1)
        wanted = [(number, *more) for number in range(step, last + 1)]
        self._results = {key: self._results.get(key) or self._threads.submit(self.function, *key) for key in wanted}
        return self._results[wanted[0]].result()
