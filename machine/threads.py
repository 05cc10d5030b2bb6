"""Number of CPU threads, and how they wait at barriers.

Threads of GNU's OpenMP spin at a barrier for milliseconds before they sleep. That is best on a quiet machine, but it
slows down both sides when another process wants the core. So while other processes keep cores busy that our threads
need, ours sleep at once (docs/performance.md). Unlike another number of threads this does not change results.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
FIRST_LOOK, PERIOD = 0.2, 2.0  # seconds
FREE, TAKEN = 0.15, 0.3  # cores wanted by all minus cores there are: below, spin; above, sleep
LOOKS_TO_TRUST = 3  # quiet updates in a row before threads spin again
BUSY = ("user", "nice", "system", "irq", "softirq")


def allowed_cores() -> list[int]:
    """Numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def divide_cores(num_processes: int) -> None:
    """Use one thread per core, shared among the run's processes on this machine, unless a number was requested."""
    if torch.get_num_threads() == 1 and not _is_thread_count_set():
        torch.set_num_threads(max(1, len(allowed_cores()) // num_processes))


def _is_thread_count_set() -> bool:
    """Whether the user or scheduler set OMP_NUM_THREADS, and not a launcher, which sets it if it is missing."""
    if "OMP_NUM_THREADS" not in os.environ:
        return False
    if not {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        return True
    try:
        return "OMP_NUM_THREADS" in psutil.Process(os.getppid()).environ()
    except (psutil.Error, OSError):
        return False


class AdaptiveWaiting:
    """Lets this process's threads spin or sleep at barriers, depending on the load of its cores by other processes.
    GNU's OpenMP does not spin while a process has more threads than cores, so to make them sleep we hold idle extra
    threads."""

    def __init__(self) -> None:
        self.num_threads, self.cores = torch.get_num_threads(), allowed_cores()
        self.process = psutil.Process()
        self.busy_with_others = 0.0  # cores
        self._quiet = 0  # updates in a row without load by others
        self._read, self._go, self._teams = self._times(), threading.Event(), []

    @property
    def sleeps(self) -> bool:
        return bool(self._teams)

    def update(self) -> bool:
        """Choose by the load since the last update; return whether the choice changed."""
        before, self._read = self._read, self._times()
        busy, ours, wall = (now - then for now, then in zip(self._read, before, strict=True))
        self.busy_with_others = max(0.0, busy - ours) / max(1e-3, wall)
        missing = self.num_threads + self.busy_with_others - len(self.cores)
        self._quiet = self._quiet + 1 if missing < FREE else 0
        sleep = missing > TAKEN or (self.sleeps and self._quiet < LOOKS_TO_TRUST)
        changed = sleep != self.sleeps
        if changed:
            self._sleep() if sleep else self._spin()
        return changed

    def __str__(self) -> str:
        how = "sleep" if self.sleeps else "spin"
        others = f"others keep {self.busy_with_others:.1f} of {len(self.cores)} cores busy"
        return f"{self.num_threads} threads that {how} while they wait ({others})"

    def _sleep(self) -> None:
        go = self._go = threading.Event()
        ready = threading.Semaphore(0)

        def hold_a_team() -> None:
            torch.zeros(self.num_threads << 16).add_(1)  # an operation on all threads creates a team
            ready.release()
            go.wait()

        num_teams = 1 + (len(self.cores) - self.num_threads) // (self.num_threads - 1)
        self._teams = [threading.Thread(target=hold_a_team, daemon=True) for _ in range(num_teams)]
        for team in self._teams:
            team.start()
            ready.acquire()

    def _spin(self) -> None:
        self._go.set()
        for team in self._teams:
            team.join()
        self._teams = []

    def _times(self) -> tuple[float, float, float]:
        """Seconds: busy time of our cores, CPU time of this process, and the clock."""
        times, ours = psutil.cpu_times(percpu=True), self.process.cpu_times()
        busy = sum(getattr(times[core], name, 0.0) for core in self.cores if core < len(times) for name in BUSY)
        return busy, ours.user + ours.system, time.monotonic()


def adapt_waiting(say: Callable[[str], object]) -> str:
    """Start to adapt how threads wait, unless the environment says; describe it, and `say` the first change."""
    if torch.get_num_threads() == 1:
        return "1 thread"
    threads = f"{torch.get_num_threads()} threads"
    if settings := [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]:
        return f"{threads} that wait as {' '.join(settings)} says"
    if sys.platform != "linux" or "libgomp" not in Path("/proc/self/maps").read_text():
        return threads
    if torch.get_num_threads() > len(allowed_cores()):  # GNU's OpenMP adapts by itself
        return f"{threads} that sleep while they wait (more of them than cores)"
    waiting = AdaptiveWaiting()
    time.sleep(FIRST_LOOK)
    waiting.update()

    def watch() -> None:
        said = False
        while True:
            time.sleep(PERIOD)
            if waiting.update() and not said:
                say(f"{waiting}; as others come and go")
                said = True

    threading.Thread(target=watch, name="waiting", daemon=True).start()
    return str(waiting)
