"""Submit a training to SLURM; requeued after preemption or time-out, it goes on where it was.

python scripts/launch_slurm.py --experiment configs/caltech101/xswin.yaml --gpus 8 --hours 12 --partition gpu
python scripts/launch_slurm.py --experiment EXPERIMENT.yaml --cluster local      (the same, as a process here)
"""

import signal
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiment.cli import one_line_errors, parse, parse_run
from experiment.config import ExperimentConfig
from machine import children
from machine.children import EXIT_CODE, STOPPED
from machine.cluster import ROOT, open_executor, requeue
from settings import within


@dataclass
class Training:
    """`train.py ... --resume auto` on one node, as submitit calls it; one that runs `here` is stopped by SIGTERM as any
    program is. Two minutes before the end SLURM sends all processes SIGUSR2."""

    arguments: list[str]
    run: Path
    gpus: int
    here: bool = False

    def __call__(self) -> int:
        """To its end; the exit status, 75 where it has stopped to be gone on with. A RuntimeError when it fails."""
        (self.run / STOPPED).unlink(missing_ok=True)
        launch = [sys.executable]
        if self.gpus > 1:
            launch += ["-m", children.LAUNCHER, "--multi_gpu", "--num_processes", str(self.gpus)]
            launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
            launch += ["--main_process_port", "0"]  # a free one: another job may share the machine
        with children.deaf_to(signal.SIGUSR2):  # SLURM sends it to all, and launchers would end by it
            self.process = children.start([*launch, str(ROOT / "train.py"), *self.arguments, "--resume", "auto"])
        stop = partial(children.send, self.process)
        with children.on_stop(stop) if self.here else nullcontext():
            status = self.process.wait()
        if (self.run / STOPPED).is_file():
            return EXIT_CODE
        if status != 0:
            raise RuntimeError(f"train.py ended with status {status}")
        return status

    def checkpoint(self) -> Any:
        """When SLURM announces the end: let the training save, then go back to the queue."""
        children.send(self.process, signal.SIGUSR1)
        children.await_end(self.process)
        return requeue(Training(self.arguments, self.run, self.gpus, self.here))


@dataclass(frozen=True)
class LaunchConfig:
    """Submit one training.

    Args:
        experiment: its YAML
        overrides: further flags of train.py, such as '[--train.seed, "1"]'
        gpus: on one node
        hours: time limit; the job is requeued when it is over
        cpus_per_gpu: cores for each
        memory_gb: main memory of the job
        partition: of the cluster
        cluster: 'slurm', or 'local' for a process on this machine
        logs: folder for the job's output
        wait: stay until the job has ended
    """

    experiment: Path
    overrides: list[str] = field(default_factory=list)
    gpus: int = within("[1, inf)", 1)
    hours: float = within("(0, inf)", 12.0)
    cpus_per_gpu: int = within("[1, inf)", 8)
    memory_gb: int = within("[1, inf)", 64)
    partition: str | None = None
    cluster: Literal["slurm", "local"] = "slurm"
    logs: Path = Path("runs/slurm")
    wait: bool = False

    def check(self, prefix: str) -> None:
        if not self.experiment.is_file():
            raise ValueError(f"{prefix}experiment {self.experiment}: no such file")
        if any(flag.partition("=")[0] == "--resume" for flag in self.overrides):  # the last of two would count
            words = "--resume is auto here; the run of that name goes on, say which by --name"
            raise ValueError(f"{prefix}overrides: {words}")


def main(config: LaunchConfig) -> None:
    """Check what is submitted, as train.py would, and submit it."""
    arguments = ["--config", str(config.experiment), *config.overrides]
    run, here = parse_run(ExperimentConfig, arguments).folder, config.cluster == "local"
    room = {name: getattr(config, name) for name in ("gpus", "hours", "cpus_per_gpu", "memory_gb", "partition")}
    executor = open_executor(config.cluster, config.logs, name=config.experiment.stem, **room)
    with children.deaf_to(signal.SIGINT):  # the terminal's, which is for this process to pass on
        job = executor.submit(Training(arguments, run, config.gpus, here))
    print(f"job {job.job_id}; its output: {job.paths.stdout}", flush=True)
    if config.wait:
        with children.on_stop(lambda number: children.stop_jobs([job.job_id], here=here, number=number)):
            print(f"it ended with status {job.result()}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse(LaunchConfig))
