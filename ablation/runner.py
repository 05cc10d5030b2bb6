"""Who does the runs: each is three commands, as a user would type them, processes of their own, so that a failure stays
where it is; one after the other, side by side, or as jobs of a cluster's scheduler."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from queue import Empty, Queue
from typing import Any, Literal, NamedTuple

import torch
import yaml

from ablation.identity import PROGRAMS, ROOT, code_hash, done_stages, mark
from ablation.plan import Planned, duration
from ablation.study import ClusterConfig
from machine import children
from machine.children import EXIT_CODE, STOPPED
from machine.cluster import open_executor, requeue
from machine.lock import InUse, Lock
from machine.whole_files import beside, write_whole

_PRINTING = threading.Lock()
FRECHET_ONLY = {"fid", "sfid"}  # for these alone, features are not kept, and there is no distance within classes


def train(planned: Planned) -> list[str]:
    return ["train.py", "--config", str(planned.run.folder / "variant.yaml"), "--resume", "auto"]


def score(planned: Planned) -> list[str]:
    evaluation, scoring = planned.run.config.evaluation, planned.ablation.scoring
    flags = {name: value for name, value in asdict(evaluation).items() if value is not None}
    flags |= {"samples": planned.trained_in, "output": planned.run.folder / "scores.json"}
    flags |= {"num_samples": planned.num_samples, "trials": scoring.trials}
    flags |= {"baselines": scoring.baselines and planned.first}
    has_features = not set(evaluation.metrics) <= FRECHET_ONLY
    flags |= {"per_class": scoring.per_class and planned.spec.num_classes > 0 and has_features}
    return ["evaluate.py", *_as_flags(planned, flags)]


def draw(planned: Planned) -> list[str]:
    """Pictures of chosen classes, from noise that all variants share."""
    pictures = planned.ablation.pictures
    flags = {"checkpoint": planned.trained_in, "output": planned.run.folder / "pictures.npz"}
    flags |= {"seed": pictures.seed, "num_per_class": pictures.num_per_class}
    flags |= {"classes": planned.pictured} if planned.classes else {}
    return ["sample.py", *_as_flags(planned, flags)]


def _as_flags(planned: Planned, values: dict[str, Any]) -> list[str]:
    """`--name value`, lists and mappings as JSON; all of the sampling, as the training's own may have changed."""
    sampling = yaml.safe_dump(asdict(planned.sampling), default_flow_style=True, width=math.inf).strip()
    values = {**values, "precision": planned.run.config.train.precision, "sampling": sampling}
    values |= {"imports": planned.run.config.imports} if planned.run.config.imports else {}  # whose syntax counts
    words = []
    for name, value in values.items():
        words += [f"--{name}", str(value) if isinstance(value, str | Path) else json.dumps(value)]
    return words


STAGES = {"train": train, "score": score, "draw": draw}


class Outcome(NamedTuple):
    """How a run ended: 'done', 'stopped' (to be gone on with), 'failed' or 'elsewhere' (others have it), and why."""

    run: str
    status: str
    why: str = ""


@dataclass
class Runner:
    """Does what is left of runs. After `deadline`, in seconds since the epoch, nothing is started and trainings stop;
    `code` is that of the stages when they were planned."""

    deadline: float | None = None
    launcher: str | None = None
    code: dict[str, str] = field(default_factory=lambda: {stage: code_hash(stage) for stage in PROGRAMS})
    children: set[subprocess.Popen] = field(default_factory=set)
    reason: str | None = None

    def __call__(self, job: list[Planned], environment: dict[str, str] | None = None) -> list[Outcome]:
        """The runs of one training: the first of them trains. `environment` is added to the processes'."""
        outcomes: list[Outcome] = []
        try:
            for planned in [planned for planned in job if planned.changes][::-1]:  # what was made of a training first
                _set_aside(planned)
        except (ValueError, OSError) as error:
            return [_failed(planned, error) for planned in job]
        for planned in job:
            if outcomes and done_stages(job[0].run.folder).get("train") != job[0].keys["train"]:
                outcomes.append(Outcome(planned.run.name, outcomes[0].status, f"it needs {job[0].run.name}"))
                continue
            try:
                outcomes.append(self._run(planned, environment or {}))
            except InUse as error:
                outcomes.append(Outcome(planned.run.name, "elsewhere", str(error)))
            except (ValueError, OSError) as error:
                outcomes.append(_failed(planned, error))
        return outcomes

    def stop(self, reason: str) -> None:
        """Let trainings save and end; start nothing more. A second time, end them at once."""
        end = children.kill if self.reason else partial(children.send, number=signal.SIGTERM)
        self.reason = reason
        for child in list(self.children):
            end(child)

    def _run(self, planned: Planned, environment: dict[str, str]) -> Outcome:
        folder, name = planned.run.folder, planned.run.name
        if planned.all_done:
            return Outcome(name, "done", "before")
        with Lock(folder / "lock") as lock:
            if planned.trains and "began" not in done_stages(folder) and (folder / "checkpoints").exists():
                raise ValueError(f"{folder} holds a training that no ablation began; move it away")
            write_whole(folder / "variant.yaml", yaml.safe_dump(planned.run.config.to_dict(), sort_keys=False))
            if not planned.trains:
                mark(folder, train=planned.keys["train"])
            for stage in STAGES:
                if stage not in planned.keys or stage in planned.done:
                    continue
                if why := self._must_stop():
                    return Outcome(name, "stopped", why)
                if code_hash(stage, afresh=True) != self.code[stage]:
                    raise ValueError(f"{stage}: the code has changed since it was planned; the same command plans anew")
                if stage == "train":
                    if "began" not in done_stages(folder):  # what is there is of another's training
                        (folder / "stages.json").unlink(missing_ok=True)
                    mark(folder, began=planned.keys["train"])
                began, output = time.monotonic(), folder / f"{stage}.txt"
                say(f"{name}: {stage} ...  (tail -f {output})")
                (folder / STOPPED).unlink(missing_ok=True)
                status = self._process(STAGES[stage](planned), output, lock, environment)
                if status != 0 and (self.reason or status == EXIT_CODE or (folder / STOPPED).is_file()):
                    return Outcome(name, "stopped", self._must_stop() or "it was asked to stop")
                if status != 0:
                    return Outcome(name, "failed", f"{stage}: {last_line(output) or status}")
                mark(folder, **{stage: planned.keys[stage]})
                say(f"{name}: {stage} done in {duration(time.monotonic() - began)}")
        return Outcome(name, "done")

    def _must_stop(self) -> str | None:
        over = self.deadline is not None and time.time() > self.deadline
        return self.reason or ("the time is over" if over else None)

    def _process(self, command: list[str], output: Path, lock: Lock, environment: dict[str, str]) -> int:
        script, *flags = command
        if script == "train.py" and self.deadline is not None:
            flags += ["--train.max_hours", f"{max(0.01, self.deadline - time.time()) / 3600:.6f}"]
        launch = [] if self.launcher is None else ["-m", children.LAUNCHER, "--config_file", self.launcher]
        with output.open("a") as file:
            options = {"stdout": file, "stderr": subprocess.STDOUT, "env": {**os.environ, **environment}}
            command = [sys.executable, *launch, str(ROOT / script), *flags]
            child = children.start(command, pass_fds=(lock.file.fileno(),), **options)
            self.children.add(child)
            if self.reason:  # since it was last asked for
                children.send(child, signal.SIGTERM)
            try:
                return child.wait()
            finally:
                self.children.discard(child)


Jobs = list[list[Planned]]


def jobs_of(plan: list[Planned]) -> Jobs:
    jobs: dict[Path, list[Planned]] = {}
    for planned in plan:
        jobs.setdefault(planned.trained_in, []).append(planned)
    return [sorted(job, key=lambda planned: not planned.trains) for job in jobs.values()]


class Place(NamedTuple):
    """Where a run has room: what its processes find in their environment, and the cores that they keep to."""

    environment: dict[str, str]
    cores: frozenset[int] = frozenset()


def places(workers: int) -> list[Place]:
    """A GPU each, or the CPU, or a share of its cores for each worker: a ValueError where there are fewer cores."""
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
    """One job at a time on each GPU, or `workers` of them on the CPU. A stop lets trainings save; the rest waits."""
    waiting: Queue[list[Planned]] = Queue()
    for job in jobs:
        waiting.put(job)
    outcomes: list[Outcome] = []

    def work(place: Place) -> None:
        if place.cores:
            os.sched_setaffinity(0, place.cores)  # of this thread, and of what it starts
        with suppress(Empty):
            while True:
                outcomes.extend(runner(waiting.get_nowait(), place.environment))

    with stopping(runner):
        threads = [threading.Thread(target=work, args=(place,)) for place in places(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():  # signals are handled between two waits
                thread.join(0.2)
    return outcomes


def submit(
    jobs: Jobs, runner: Runner, cluster: ClusterConfig, logs: Path, scheduler: Literal["slurm", "local"]
) -> list[Outcome]:
    """A job each through submitit, waited for. A stop is passed on to jobs that are processes here."""
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
    """A job as submitit calls it, requeued when its time is up. One that runs `here` is stopped as any program is."""

    runner: Runner
    job: list[Planned]
    here: bool = False

    def __call__(self) -> list[Outcome]:
        with stopping(self.runner) if self.here else nullcontext():
            return self.runner(self.job)

    def checkpoint(self) -> Any:
        self.runner.stop("preempted")
        for child in list(self.runner.children):
            children.await_end(child)
        return requeue(replace(self, runner=replace(self.runner, children=set(), reason=None)))


def stopping(runner: Runner) -> AbstractContextManager[None]:
    """A stop lets the trainings save, and the rest wait for the next time."""

    def stop(number: signal.Signals) -> None:
        say_stopped(number)
        runner.stop(number.name)

    return children.on_stop(stop)


def say_stopped(number: signal.Signals) -> None:
    say(f"{number.name}: what runs is saved, the rest waits for the next time")


def say(text: str) -> None:
    """A line with its time; lines of several threads stay whole."""
    with _PRINTING:
        print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def last_line(path: Path) -> str:
    """Of a command's output: where it failed, its error; progress bars are left out."""
    lines = [line.rpartition("\r")[-1].strip() for line in path.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line and "it/s]" not in line), "")


def _failed(planned: Planned, error: Exception) -> Outcome:
    return Outcome(planned.run.name, "failed", " ".join(str(error).split()))


def _set_aside(planned: Planned) -> None:
    """What is in the folder from another configuration, other code or other images is kept beside it."""
    folder, why = planned.run.folder, ", ".join(planned.changes)
    kept = beside(folder)
    with Lock(folder / "lock"), Lock(folder / "training.lock"):  # one may be gone on with by hand
        kept.mkdir()
        paths = [path for path in folder.iterdir() if not path.name.endswith("lock")]
        for path in sorted(paths, key=lambda path: path.name == "stages.json"):  # last: it says what is there
            shutil.move(path, kept / path.name)
    say(f"{planned.run.name}: of other {why}; what was there is now {kept}")
