"""Who does the work: this machine's CPU or GPUs, or a cluster's scheduler."""

import os
import signal
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any, Literal, NamedTuple

import torch

from ablation.plan import Planned
from ablation.runner import Outcome, Runner, say
from ablation.study import ClusterConfig
from machine import children
from machine.cluster import open_executor, requeue

Jobs = list[list[Planned]]


def jobs_of(plan: list[Planned]) -> Jobs:
    """Runs by their training, in the order of the plan."""
    jobs: dict[Path, list[Planned]] = {}
    for planned in plan:
        jobs.setdefault(planned.trained_in, []).append(planned)
    return [sorted(job, key=lambda planned: not planned.trains) for job in jobs.values()]


class Place(NamedTuple):
    """Where a run has room: what its processes find in their environment, and the cores that they keep to."""

    environment: dict[str, str]
    cores: frozenset[int] = frozenset()


def places(workers: int) -> list[Place]:
    """A GPU each; without any, the CPU for one worker, and a share of its cores for each of several. Raises ValueError
    for more workers than cores, or where the system does not keep processes to cores."""
    if gpus := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else map(str, range(gpus))
        return [Place({"CUDA_VISIBLE_DEVICES": name}) for name in list(names)[:gpus]]
    if workers == 1:
        return [Place({})]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if (share := len(cores) // workers) == 0:
        raise ValueError(f"--workers {workers}: there are {len(cores)} cores to deal out; ask for fewer")
    shares = [cores[number * share :][:share] for number in range(workers)]
    return [Place({"OMP_NUM_THREADS": str(share)}, frozenset(mine)) for mine in shares]


def run_here(jobs: Jobs, runner: Runner, workers: int) -> list[Outcome]:
    """One job at a time on each visible GPU, or `workers` of them on the CPU."""
    waiting: Queue[list[Planned]] = Queue()
    for job in jobs:
        waiting.put(job)
    outcomes: list[Outcome] = []

    def work(place: Place) -> None:
        if place.cores:
            os.sched_setaffinity(0, place.cores)  # of this thread, and of what it starts
        while True:
            try:
                job = waiting.get_nowait()
            except Empty:
                return
            outcomes.extend(runner(job, place.environment))

    with _stopping(runner):
        threads = [Thread(target=work, args=(place,)) for place in places(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():  # signals are handled between two waits
                thread.join(0.2)
    return outcomes


def submit(
    jobs: Jobs, runner: Runner, cluster: ClusterConfig, logs: Path, scheduler: Literal["slurm", "local"]
) -> list[Outcome]:
    """A job each through submitit; waits for all of them. A stop is passed on to jobs that are processes here; those of
    a scheduler go on. Raises ValueError where submitit is missing."""
    executor = open_executor(scheduler, logs, name="ablation", **asdict(cluster))
    here = scheduler == "local"
    submitted: list[tuple[list[Planned], Any]] = []
    stopped: list[str] = []

    def stop(number: signal.Signals) -> None:
        children.stop_jobs([handle.job_id for _, handle in submitted], here=here, number=number)
        _say_stopped(number)
        stopped.append(number.name)

    outcomes: list[Outcome] = []
    with children.on_stop(stop):
        for job in jobs:
            with children.deaf_to(signal.SIGINT):  # the terminal's, which is for this process to pass on
                submitted.append((job, executor.submit(Work(runner, job, here))))
        for job, handle in submitted:
            say(f"{job[0].run.name}: job {handle.job_id}, {handle.paths.stdout}")
        for job, handle in submitted:
            try:
                outcomes += handle.result()
            except Exception as error:  # whatever ended the scheduler's process
                lines = str(error).strip().splitlines()
                why = next((line for line in reversed(lines) if "Error" in line), lines[0] if lines else repr(error))
                ended = ("stopped", stopped[0]) if stopped else ("failed", why)
                outcomes += [Outcome(planned.run.name, *ended) for planned in job]
    return outcomes


@dataclass
class Work:
    """A job as submitit calls it; when its time is up it saves and goes back to the queue. One that runs `here` is
    stopped as any program is; SLURM's own signals are for submitit."""

    runner: Runner
    job: list[Planned]
    here: bool = False

    def __call__(self) -> list[Outcome]:
        """Run the job in the scheduler's own process."""
        with _stopping(self.runner) if self.here else nullcontext():
            return self.runner(self.job)

    def checkpoint(self) -> Any:
        """What submitit calls when SLURM announces the end."""
        self.runner.stop("preempted")
        for child in list(self.runner.children):
            children.await_end(child)
        return requeue(replace(self, runner=replace(self.runner, children=set(), reason=None)))


def _stopping(runner: Runner) -> AbstractContextManager[None]:
    """A stop lets the trainings save, and the rest wait for the next time."""

    def stop(number: signal.Signals) -> None:
        _say_stopped(number)
        runner.stop(number.name)

    return children.on_stop(stop)


def _say_stopped(number: signal.Signals) -> None:
    say(f"{number.name}: what runs is saved, the rest waits for the next time")
