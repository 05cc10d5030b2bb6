"""Stopping a training before its first step, and how it reports that to schedulers and launchers."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from machine.atomic_files import write_atomic
from machine.children import EXIT_CODE, STOPPED, handling_signals
from machine.lock import Lock

SIGNALS = [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT]
BEFORE = "before the first step; run it again with --resume auto"


@contextmanager
def exit_on_signal(run: Path) -> Iterator[None]:
    """Context for the imports at the start, when there is nothing to save: a signal ends the process with status 75 and
    a file `stopped` in the run's folder, as it ends a training later."""

    def stop(number: signal.Signals) -> None:
        words = f"{number.name}: stopped {BEFORE}"
        if os.environ.get("RANK", "0") == "0":
            with suppress(ValueError), Lock(run / "training.lock"):
                write_atomic(run / STOPPED, f"{words}\n")
            with suppress(OSError):  # a terminal that is gone
                print(words, file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)  # an exception would look like one of the module being imported

    with handling_signals(stop, SIGNALS, stays_ignored=[signal.SIGHUP]), without_garbage_collection():
        yield


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Context for imports of libraries: keeps the garbage collector from scanning their objects, which are never freed,
    now and later. Imports take a seventh less time."""
    gc.disable()
    try:
        yield
    finally:
        _freeze_objects()
        gc.enable()


@cache
def _freeze_objects() -> None:
    """Freeze once: only objects of the first imports are sure to stay."""
    gc.freeze()
