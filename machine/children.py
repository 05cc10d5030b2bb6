"""Child processes that end with their parent, however it ends. Each has its own process group, so that Ctrl-C only
reaches the parent."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: stopped early and saved; continue with --resume auto
STOPPED = "stopped"  # file in a run's folder that says the same, as launchers turn every status into 1
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LAUNCHER = "accelerate.commands.launch"
LAUNCHERS = {LAUNCHER, "accelerate.commands.accelerate_cli", "accelerate", "accelerate-launch"}
LAUNCHERS |= {"torch.distributed.run", "torch.distributed.launch", "torchrun"}
PR_SET_PDEATHSIG = 1  # of prctl(2)


def start_process(command: Sequence[str], **options: Any) -> subprocess.Popen:
    """Start a program that Linux sends SIGTERM when its parent ends. The child requests that signal by running this
    file first, because Python's own hook (`preexec_fn`) is unsafe in a process with threads."""
    asking = [sys.executable, "-I", "-S", __file__, str(os.getpid())]
    return subprocess.Popen([*asking, *command], process_group=0, **options)


class EndedBySignal(SystemExit):
    """Ended by a signal; the status is the one that shells report for it."""


def run_process(command: Sequence[str], **options: Any) -> None:
    """Run a program and wait for it; raise SystemExit with its status unless that is 0. A signal to this process is
    passed on as SIGTERM, so that the program can save; a second signal kills it. This process then ends too."""
    stops: list[signal.Signals] = []
    child: subprocess.Popen | None = None

    def stop(number: signal.Signals) -> None:
        stops.append(number)
        if child is not None:
            send_signal(child, signal.SIGTERM) if len(stops) == 1 else kill_tree(child)

    with handling_signals(stop):
        child = start_process(command, **options)
        if stops:  # the signal came before the child existed
            send_signal(child, signal.SIGTERM)
        status = child.wait()
    if stops:
        raise EndedBySignal(128 + stops[0])
    if status:
        raise SystemExit(status if status > 0 else 128 - status)


def send_signal(process: subprocess.Popen, number: int) -> None:
    """Send a signal to a child or, if that is a launcher, which would not forward it, to the launcher's children."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        child = psutil.Process(process.pid)
        _signal_all((_launches(child) and child.children()) or [child], number)


def end_with_launcher() -> None:
    """Have this process end with the launcher that started it; otherwise it would outlive a killed launcher."""
    import psutil

    with suppress(psutil.Error):
        if (parent := psutil.Process().parent()) and _launches(parent):
            _end_with(parent.pid)


def kill_tree(process: subprocess.Popen) -> None:
    """Kill a process and all its descendants."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        child = psutil.Process(process.pid)
        _signal_all([child, *child.children(recursive=True)], signal.SIGKILL)


def _signal_all(processes: Sequence[Any], number: int) -> None:
    import psutil

    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def wait_in_handler(process: subprocess.Popen) -> None:
    """Wait for a process inside a signal handler, where `process.wait()` could deadlock on its lock."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        child = psutil.Process(process.pid)
        while child.status() != psutil.STATUS_ZOMBIE:  # which the interrupted wait reaps
            time.sleep(0.05)


@contextmanager
def handling_signals(
    handle: Callable[[signal.Signals], None],
    numbers: Sequence[signal.Signals] = STOPS,
    *,
    stays_ignored: Sequence[signal.Signals] = STOPS,
) -> Iterator[None]:
    """Context in which signals call `handle`; those in `stays_ignored` stay ignored if they were, as under nohup."""
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
    """Stop submitit's jobs. Jobs that are processes `here` are sent SIGTERM; those of a scheduler continue, and this
    process ends with a hint on how to cancel them."""
    if not here:
        print(f"{number.name}: the jobs go on; to stop them: scancel {' '.join(jobs)}", flush=True)
        raise SystemExit(128 + number)
    for process in map(int, jobs):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)


@contextmanager
def ignoring_signal(number: int) -> Iterator[None]:
    """Context in which started processes inherit that this signal is ignored."""
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
    if os.getppid() != parent:  # the parent ended before the request
        raise SystemExit(128 + signal.SIGTERM)


if __name__ == "__main__":
    _end_with(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
