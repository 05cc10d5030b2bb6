"""Prefetching: threads compute the results of coming steps, such as files read or images decoded."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Callable that returns `function(step, *args)` and starts computing the next `num_steps` steps in threads.

    Steps from `end` on are not prefetched. A step that was not prefetched is computed when it is requested. An error of
    a step is raised when that step is requested.
    """

    def __init__(self, function: Callable[..., T], num_steps: int, end: int | None = None) -> None:
        self.function, self.num_steps, self.end = function, num_steps, end
        self._threads = ThreadPoolExecutor(num_steps, thread_name_prefix="ahead")
        self._results: dict[tuple[int, ...], Future[T]] = {}

    def __call__(self, step: int, *args: int) -> T:
        last = step + self.num_steps if self.end is None else min(step + self.num_steps, self.end - 1)
        keys = [(ahead, *args) for ahead in range(step, last + 1)]
        self._results = {key: self._results.get(key) or self._threads.submit(self.function, *key) for key in keys}
        return self._results[keys[0]].result()
