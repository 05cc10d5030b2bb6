"""Work that goes on beside a loop."""

from collections.abc import Callable
from contextlib import suppress
from threading import Thread


class Background:
    """Does jobs one after the other, in the order in which they came, until one fails: whoever next checks or waits
    gets its error. Left at the end or by an error it waits for all of them; by Ctrl-C it does not."""

    def __init__(self) -> None:
        self._newest: Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.wait()
        elif not isinstance(error, KeyboardInterrupt):
            with suppress(Exception):  # the first error is the one to tell
                self.wait()

    def start(self, job: Callable[[], object]) -> None:
        """Have this done after what is still to be done. A process that ends does not wait for it."""
        self._newest = Thread(target=self._do, args=(job, self._newest), daemon=True)
        self._newest.start()

    def check(self) -> None:
        """Raise the error of a job that failed."""
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Until all jobs are done; raises the error of one that failed."""
        if self._newest is not None:
            self._newest.join()
            self._newest = None
        self.check()

    def _do(self, job: Callable[[], object], before: Thread | None) -> None:
        if before is not None:
            before.join()
        try:
            if self._error is None:
                job()
        except BaseException as error:
            self._error = error
