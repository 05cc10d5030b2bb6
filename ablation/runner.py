"""Execution of an ablation's runs: one after the other, side by side, or as jobs of a cluster's scheduler.

Each run is up to three commands (train, score, draw), the ones that a user would type. They run as processes of their
own, so that a failure of one run does not affect the others.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml

from ablation.identity import PROGRAMS, ROOT, code_hash, done_stages, mark_done
from ablation.plan import PlannedRun
from ablation.progress import find_changed, format_duration, read_progress
from machine import children
from machine.atomic_files import unused_path, write_atomic
from machine.children import EXIT_CODE, STOPPED
from machine.cluster import ClusterConfig, open_executor, requeue
from machine.lock import InUseError, Lock
from metrics.scores import PER_IMAGE, required_features

_PRINTING = threading.Lock()
Job = list[PlannedRun]  # runs that share a training, which the first of them does


def train_command(planned: PlannedRun) -> list[str]:
    return ["train.py", "--config", str(planned.run.folder / "variant.yaml"), "--resume", "auto"]


def score_command(planned: PlannedRun) -> list[str]:
    evaluation, scoring = planned.run.config.evaluation, planned.ablation.scoring
    keeps_features = bool(required_features(evaluation.metrics) & PER_IMAGE)  # which distances per class need
    flags = {name: value for name, value in asdict(evaluation).items() if value is not None}
    flags |= {"samples": planned.trained_in, "output": planned.run.folder / "scores.json"}
    flags |= {"num_samples": planned.num_samples, "trials": scoring.trials}
    flags |= {"baselines": scoring.baselines and planned.scores_baselines, "memorisation": scoring.memorisation}
    flags |= {"per_class": scoring.per_class and planned.spec.num_classes > 0 and keeps_features}
    return ["evaluate.py", *_as_flags(planned, flags)]


def draw_command(planned: PlannedRun) -> list[str]:
    """The command that draws samples of the chosen classes, from noise that all variants share."""
    pictures = planned.ablation.pictures
    flags = {"checkpoint": planned.trained_in, "output": planned.run.folder / "pictures.npz"}
    flags |= {"seed": pictures.seed, "num_per_class": pictures.num_per_class}
    flags |= {"classes": planned.pictured} if planned.classes else {}
    return ["sample.py", *_as_flags(planned, flags)]


def _as_flags(planned: PlannedRun, values: dict[str, Any]) -> list[str]:
    """Format values as `--name value` in JSON, and all sampling settings, as the training may be another variant's."""
    sampling = yaml.safe_dump(asdict(planned.sampling), default_flow_style=True, width=math.inf).strip()
    values = {**values, "precision": planned.run.config.train.precision, "sampling": sampling}
    values |= {"imports": planned.run.config.imports} if planned.run.config.imports else {}
    words = []
    for name, value in values.items():
        words += [f"--{name}", str(value) if isinstance(value, str | Path) else json.dumps(value)]
    return words


STAGES = {"train": train_command, "score": score_command, "draw": draw_command}


class Outcome(NamedTuple):
    """How a run ended and why: 'done', 'stopped' (can be resumed), 'failed', or 'elsewhere' (in another process)."""

    run: str
    status: str
    why: str = ""


@dataclass
class Runner:
    """Runs the stages of runs that are not done.

    Args:
        deadline: seconds since the epoch after which no stage starts and trainings save and stop
        launcher: configuration file of `accelerate launch`; None: one process per run
        code: hash of each stage's code when the runs were planned; a stage whose code has changed since is refused
        reason: why the runner was asked to stop
    """

    deadline: float | None = None
    launcher: str | None = None
    code: dict[str, str] = field(default_factory=lambda: {stage: code_hash(stage) for stage in PROGRAMS})
    children: set[subprocess.Popen] = field(default_factory=set)
    reason: str | None = None

    def __call__(self, job: Job, environment: dict[str, str] | None = None) -> list[Outcome]:
        """Execute the runs that share a training, which the first does, with additional environment variables."""
        outcomes: list[Outcome] = []
        try:
            # In reverse: the run that trains comes last, as the changes of the others are found through its folder.
            for planned in [planned for planned in job if find_changed(planned)][::-1]:
                _set_aside(planned)
        except (ValueError, OSError) as error:
            return [_failed(planned, error) for planned in job]
        for planned in job:
            if outcomes and done_stages(job[0].run.folder).get("train") != job[0].keys["train"]:
                outcomes.append(Outcome(planned.run.name, outcomes[0].status, f"it needs {job[0].run.name}"))
                continue
            try:
                outcomes.append(self._run(planned, environment or {}))
            except InUseError as error:
                outcomes.append(Outcome(planned.run.name, "elsewhere", str(error)))
            except (ValueError, OSError) as error:
                outcomes.append(_failed(planned, error))
        return outcomes

    def stop(self, reason: str) -> None:
        """Let running trainings save and end, and start no other stage. A second call kills them."""
        end_child = children.kill_tree if self.reason else partial(children.send_signal, number=signal.SIGTERM)
        self.reason = reason
        for child in list(self.children):
            end_child(child)

    def _run(self, planned: PlannedRun, environment: dict[str, str]) -> Outcome:
        folder, name = planned.run.folder, planned.run.name
        if not read_progress(planned).left:
            return Outcome(name, "done", "before")
        with Lock(folder / "lock") as lock:
            if planned.trains and "began" not in done_stages(folder) and (folder / "checkpoints").exists():
                raise ValueError(f"{folder} holds a training run that no ablation started; move it away")
            write_atomic(folder / "variant.yaml", yaml.safe_dump(planned.run.config.to_dict(), sort_keys=False))
            if not planned.trains:
                mark_done(folder, train=planned.keys["train"])
            for stage in read_progress(planned).left:
                if why := self._must_stop():
                    return Outcome(name, "stopped", why)
                if outcome := self._run_stage(planned, stage, lock, environment):
                    return outcome
        return Outcome(name, "done")

    def _run_stage(self, planned: PlannedRun, stage: str, lock: Lock, environment: dict[str, str]) -> Outcome | None:
        """Run a stage's command, and mark the stage as done; otherwise return how the run ended."""
        folder, name = planned.run.folder, planned.run.name
        if code_hash(stage, afresh=True) != self.code[stage]:
            raise ValueError(f"{stage}: the code has changed since it was planned; repeat the command to plan again")
        if not planned.current_keys()[stage].startswith(planned.keys[stage].partition("-")[0]):
            remedy = "repeat the command to plan again; if a run is still training, give one of its checkpoints"
            raise ValueError(f"{stage}: files that its settings name have changed since it was planned; {remedy}")
        if stage == "train":
            if "began" not in done_stages(folder):  # the results there were made from another run's weights
                (folder / "stages.json").unlink(missing_ok=True)
            mark_done(folder, began=planned.keys["train"])
        began, output = time.monotonic(), folder / f"{stage}.txt"
        log_line(f"{name}: {stage} ...  (tail -f {output})")
        (folder / STOPPED).unlink(missing_ok=True)
        status = self._process(STAGES[stage](planned), output, lock, environment)
        if status != 0 and (self.reason or status == EXIT_CODE or (folder / STOPPED).is_file()):
            return Outcome(name, "stopped", self._must_stop() or "it was asked to stop")
        if status != 0:
            return Outcome(name, "failed", f"{stage}: {last_line(output) or status}")
        mark_done(folder, **{stage: planned.keys[stage]})
        log_line(f"{name}: {stage} done in {format_duration(time.monotonic() - began)}")
        return None

    def _must_stop(self) -> str | None:
        is_over = self.deadline is not None and time.time() > self.deadline
        return self.reason or ("the time is over" if is_over else None)

    def _process(self, command: list[str], output: Path, lock: Lock, environment: dict[str, str]) -> int:
        script, *flags = command
        if script == "train.py" and self.deadline is not None:
            flags += ["--train.max_hours", f"{max(0.01, self.deadline - time.time()) / 3600:.6f}"]
        launch = [] if self.launcher is None else ["-m", children.LAUNCHER, "--config_file", self.launcher]
        with output.open("a") as file:
            options = {"stdout": file, "stderr": subprocess.STDOUT, "env": {**os.environ, **environment}}
            command = [sys.executable, *launch, str(ROOT / script), *flags]
            child = children.start_process(command, pass_fds=(lock.file.fileno(),), **options)
            self.children.add(child)
            if self.reason:  # a stop may have come while the process started
                children.send_signal(child, signal.SIGTERM)
            try:
                return child.wait()
            finally:
                self.children.discard(child)


def group_into_jobs(plan: list[PlannedRun]) -> list[Job]:
    """Group the runs by training; the run that trains comes first in its job."""
    jobs: dict[Path, Job] = {}
    for planned in plan:
        jobs.setdefault(planned.trained_in, []).append(planned)
    return [sorted(job, key=lambda planned: not planned.trains) for job in jobs.values()]


class WorkerSlot(NamedTuple):
    """Resources of one worker: environment variables of its processes, and the cores that they are pinned to."""

    environment: dict[str, str]
    cores: frozenset[int] = frozenset()


def worker_slots(workers: int) -> list[WorkerSlot]:
    """Return a place for each GPU, or split the cores among `workers`; raise ValueError for too few cores."""
    if gpus := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else map(str, range(gpus))
        return [WorkerSlot({"CUDA_VISIBLE_DEVICES": device}) for device in list(devices)[:gpus]]
    if workers == 1:
        return [WorkerSlot({})]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if (share := len(cores) // workers) == 0:
        raise ValueError(f"--workers {workers}: there are {len(cores)} cores to share; give fewer")
    shares = [cores[worker * share :][:share] for worker in range(workers)]
    return [WorkerSlot({"OMP_NUM_THREADS": str(share)}, frozenset(own_cores)) for own_cores in shares]


def run_here(jobs: list[Job], runner: Runner, workers: int) -> list[Outcome]:
    """Run one job at a time on each GPU, or `workers` on the CPU; at a signal, trainings save and no job starts."""
    waiting, outcomes = iter(jobs), list[Outcome]()

    def work(place: WorkerSlot) -> None:
        if place.cores:
            os.sched_setaffinity(0, place.cores)  # applies to this thread and the processes that it starts
        for job in waiting:  # of all threads
            outcomes.extend(runner(job, place.environment))

    with stop_on_signal(runner):
        threads = [threading.Thread(target=work, args=(place,)) for place in worker_slots(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():  # join in short waits, as Python handles signals only between them
                thread.join(0.2)
    return outcomes


def submit(
    jobs: list[Job], runner: Runner, cluster: ClusterConfig, logs: Path, scheduler: Literal["slurm", "local"]
) -> list[Outcome]:
    """Submit all jobs through submitit and wait; those of `local` are processes here, which a signal stops."""
    executor = open_executor(scheduler, logs, cluster, name="ablation")
    here = scheduler == "local"
    submitted: list[tuple[Job, Any]] = []
    signals: list[str] = []

    def stop(number: signal.Signals) -> None:
        children.stop_jobs([handle.job_id for _, handle in submitted], here=here, number=number)
        log_stop(number)
        signals.append(number.name)

    outcomes: list[Outcome] = []
    with children.handling_signals(stop):
        for job in jobs:
            with children.ignoring_signal(signal.SIGINT):  # Ctrl-C reaches this process, which passes it on
                submitted.append((job, executor.submit(SubmittedJob(runner, job, here))))
        for job, handle in submitted:
            log_line(f"{job[0].run.name}: job {handle.job_id}, {handle.paths.stdout}")
        for job, handle in submitted:
            try:
                outcomes += handle.result()
            except Exception as error:  # submitit raises what ended the job, of any kind
                lines = str(error).strip().splitlines()
                why = next((line for line in reversed(lines) if "Error" in line), lines[0] if lines else repr(error))
                status, why = ("stopped", signals[0]) if signals else ("failed", why)
                outcomes += [Outcome(planned.run.name, status, why) for planned in job]
    return outcomes


@dataclass
class SubmittedJob:
    """A job for submitit, requeued when its time is up; `here`, as a local process, it handles signals itself."""

    runner: Runner
    job: Job
    here: bool = False

    def __call__(self) -> list[Outcome]:
        with stop_on_signal(self.runner) if self.here else nullcontext():
            return self.runner(self.job)

    def checkpoint(self) -> Any:
        """Stop the trainings and requeue the job; submitit calls this when the job is preempted or its time is up."""
        self.runner.stop("preempted")
        for child in list(self.runner.children):
            children.wait_in_handler(child)
        return requeue(replace(self, runner=replace(self.runner, children=set(), reason=None)))


def stop_on_signal(runner: Runner) -> AbstractContextManager[None]:
    """Stop the runner at a signal, so that running trainings save, and the same command can resume."""

    def stop(number: signal.Signals) -> None:
        log_stop(number)
        runner.stop(number.name)

    return children.handling_signals(stop)


def log_stop(number: signal.Signals) -> None:
    log_line(f"{number.name}: saving what is running; repeat the command to continue")


def log_line(text: str) -> None:
    """Print a line with the time of day; a lock keeps the lines of several threads apart."""
    with _PRINTING:
        print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def last_line(path: Path) -> str:
    """Last line of a command's output without progress bars: its error, where it has failed."""
    lines = [line.rpartition("\r")[-1].strip() for line in path.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line and "it/s]" not in line), "")


def _failed(planned: PlannedRun, error: Exception) -> Outcome:
    return Outcome(planned.run.name, "failed", " ".join(str(error).split()))


def _set_aside(planned: PlannedRun) -> None:
    """Move the results of another configuration, code or data from the run's folder to a new one beside it."""
    folder, why = planned.run.folder, ", ".join(find_changed(planned))
    backup = unused_path(folder)
    with Lock(folder / "lock"), Lock(folder / "training.lock"):  # somebody may have resumed the training by hand
        backup.mkdir()
        paths = [path for path in folder.iterdir() if not path.name.endswith("lock")]
        # stages.json goes last: if this is interrupted, the folder still says whose results it holds.
        for path in sorted(paths, key=lambda path: path.name == "stages.json"):
            shutil.move(path, backup / path.name)
    log_line(f"{planned.run.name}: of other {why}; what was there is now {backup}")
