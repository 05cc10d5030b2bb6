"""Background jobs, run in order by threads."""

from collections.abc import Callable
from contextlib import suppress
from threading import Thread


class Background:
    """Runs jobs one at a time in the order of `start`. After a failure no further job runs, and the next `check` or
    `wait` raises the error. As a context manager it waits for all jobs on exit, except after Ctrl-C."""

    def __init__(self) -> None:
        self._newest: Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.wait()
        elif not isinstance(error, KeyboardInterrupt):
            with suppress(Exception):  # the first error is the one to report
                self.wait()

    def start(self, job: Callable[[], object]) -> None:
        """Queue a job. Its thread is a daemon: the process may exit without it."""
        self._newest = Thread(target=self._do, args=(job, self._newest), daemon=True)
        self._newest.start()

    def check(self) -> None:
        """Raise the error of a failed job, if any."""
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Block until all jobs are done, and raise the error of a failed one."""
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
