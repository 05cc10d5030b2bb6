"""How a training says that it was stopped before its end, to schedulers, launchers and those that start it."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from machine.children import EXIT_CODE, STOPPED, on_stop
from machine.lock import Lock
from machine.whole_files import write_whole

SIGNALS = [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT]
BEFORE = "before the first step; run it again with --resume auto"


@contextmanager
def stops_at_once(run: Path) -> Iterator[None]:
    """Within, while there is nothing to save yet and libraries are imported, a signal ends the process as it ends a
    training: status 75, and `stopped` in the run's folder."""

    def stop(number: signal.Signals) -> None:
        words = f"{number.name}: stopped {BEFORE}"
        if os.environ.get("RANK", "0") == "0":
            with suppress(ValueError), Lock(run / "training.lock"):
                write_whole(run / STOPPED, f"{words}\n")
            with suppress(OSError):  # a terminal that is gone
                print(words, file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)  # an error would be taken for one of the module that is being imported

    with on_stop(stop, SIGNALS, stays_ignored=[signal.SIGHUP]), importing():
        yield


@contextmanager
def importing() -> Iterator[None]:
    """Around imports of libraries. None of it goes, so the garbage collector does not look through it, then or later:
    a seventh of the time."""
    gc.disable()
    try:
        yield
    finally:
        _keep()
        gc.enable()


@cache
def _keep() -> None:
    """What a program begins with; later what there is may be garbage."""
    gc.freeze()
