"""Processes that end with the one that starts them, whatever ends it. Each has a process group of its own, so that
Ctrl-C reaches the parent alone."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: stopped before the end, saved; run it again with --resume auto
STOPPED = "stopped"  # a file that says so in a run's folder: launchers make 1 of every status
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LAUNCHER = "accelerate.commands.launch"
LAUNCHERS = {LAUNCHER, "accelerate.commands.accelerate_cli", "accelerate", "accelerate-launch"}
LAUNCHERS |= {"torch.distributed.run", "torch.distributed.launch", "torchrun"}
PR_SET_PDEATHSIG = 1  # of Linux's prctl


def start(command: Sequence[str], **options: Any) -> subprocess.Popen:
    """A program, which Linux sends SIGTERM when its parent is gone. It asks for that itself, as this file, before it
    becomes the program: Python's own hook in new processes (`preexec_fn`) is not safe beside threads."""
    asking = [sys.executable, "-I", "-S", __file__, str(os.getpid())]
    return subprocess.Popen([*asking, *command], process_group=0, **options)


class Ended(SystemExit):
    """By a stop: the status is the one that shells give to the signal."""


def run(command: Sequence[str], **options: Any) -> None:
    """A program, to its end; a SystemExit has its status where that is not 0. A stop lets it save and end, a second one
    ends it at once, and either ends this one."""
    stops: list[signal.Signals] = []
    child: subprocess.Popen | None = None

    def stop(number: signal.Signals) -> None:
        stops.append(number)
        if child is not None:
            send(child, signal.SIGTERM) if len(stops) == 1 else kill(child)

    with on_stop(stop):
        child = start(command, **options)
        if stops:  # before it could be told
            send(child, signal.SIGTERM)
        status = child.wait()
    if stops:
        raise Ended(128 + stops[0])
    if status:
        raise SystemExit(status if status > 0 else 128 - status)


def send(process: subprocess.Popen, number: int) -> None:
    """A signal to a child; of a launcher, which passes none on, to what it launched."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        child = psutil.Process(process.pid)
        _signal((_launches(child) and child.children()) or [child], number)


def end_with_launcher() -> None:
    """Of a launcher that is ended by a signal, its processes know nothing: they would go on beside their successors."""
    import psutil

    with suppress(psutil.Error):
        if (parent := psutil.Process().parent()) and _launches(parent):
            _end_with(parent.pid)


def kill(process: subprocess.Popen) -> None:
    """At once, and all that it started."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        child = psutil.Process(process.pid)
        _signal([child, *child.children(recursive=True)], signal.SIGKILL)


def _signal(processes: Sequence[Any], number: int) -> None:
    import psutil

    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def await_end(process: subprocess.Popen) -> None:
    """For signal handlers: `process.wait()` would wait for the lock that the one which was interrupted holds."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        child = psutil.Process(process.pid)
        while child.status() != psutil.STATUS_ZOMBIE:  # the interrupted one takes its status
            time.sleep(0.05)


@contextmanager
def on_stop(
    handle: Callable[[signal.Signals], None],
    numbers: Sequence[signal.Signals] = STOPS,
    *,
    stays_ignored: Sequence[signal.Signals] = STOPS,
) -> Iterator[None]:
    """Within, these signals (SIGTERM, Ctrl-C, a closed terminal) call this; what is ignored may stay so."""
    before = {number: signal.getsignal(number) for number in numbers}
    for number in stays_ignored:
        if before[number] is signal.SIG_IGN:
            del before[number]
    for number in before:
        signal.signal(number, lambda number, frame: handle(signal.Signals(number)))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def stop_jobs(jobs: Sequence[str], *, here: bool, number: signal.Signals) -> None:
    """Of submitit: those that are processes here, by which it names them, are stopped too. Those of a scheduler go on
    without this process, which ends."""
    if not here:
        print(f"{number.name}: the jobs go on; to stop them: scancel {' '.join(jobs)}", flush=True)
        raise SystemExit(128 + number)
    for process in map(int, jobs):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)


@contextmanager
def deaf_to(number: int) -> Iterator[None]:
    """Within, what is started is born ignoring this signal."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)


def _launches(process: Any) -> bool:
    return any(word.rpartition("/")[2] in LAUNCHERS for word in process.cmdline()[:6])


def _end_with(parent: int) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it was gone before
        raise SystemExit(128 + signal.SIGTERM)


if __name__ == "__main__":
    _end_with(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
