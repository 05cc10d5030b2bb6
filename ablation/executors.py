"""Runs as jobs of a cluster's scheduler, or as processes here in their place, through submitit."""

import signal
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ablation.plan import Planned
from ablation.runner import Jobs, Outcome, Runner, say, say_stopped, stopping
from ablation.study import ClusterConfig
from machine import children
from machine.cluster import open_executor, requeue


def submit(
    jobs: Jobs, runner: Runner, cluster: ClusterConfig, logs: Path, scheduler: Literal["slurm", "local"]
) -> list[Outcome]:
    """A job each through submitit, waited for. A stop is passed on to jobs that are processes here; a scheduler's go
    on."""
    executor = open_executor(scheduler, logs, name="ablation", **asdict(cluster))
    here = scheduler == "local"
    submitted: list[tuple[list[Planned], Any]] = []
    stopped: list[str] = []

    def stop(number: signal.Signals) -> None:
        children.stop_jobs([handle.job_id for _, handle in submitted], here=here, number=number)
        say_stopped(number)
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
    stopped as any program is."""

    runner: Runner
    job: list[Planned]
    here: bool = False

    def __call__(self) -> list[Outcome]:
        """In the scheduler's own process."""
        with stopping(self.runner) if self.here else nullcontext():
            return self.runner(self.job)

    def checkpoint(self) -> Any:
        """When SLURM announces the end."""
        self.runner.stop("preempted")
        for child in list(self.runner.children):
            children.await_end(child)
        return requeue(replace(self, runner=replace(self.runner, children=set(), reason=None)))
