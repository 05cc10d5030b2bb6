"""Submit a training to SLURM. After preemption or the time limit it is requeued and resumes.

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

from experiment.cli import parse_run, run_main
from experiment.config import ExperimentConfig
from machine import children
from machine.children import EXIT_CODE, STOPPED
from machine.cluster import ROOT, ClusterConfig, open_executor, requeue
from settings import reads, within


@dataclass
class Training:
    """A job for submitit that runs `train.py ... --resume auto` on one node. SLURM sends SIGUSR2 to all its processes
    two minutes before the time limit; a job on this machine (`here`) is stopped by SIGTERM."""

    arguments: list[str]
    run: Path
    gpus: int
    here: bool = False

    def __call__(self) -> int:
        """Run the training; return its exit status, 75 if it can be resumed. Raises RuntimeError if it fails."""
        (self.run / STOPPED).unlink(missing_ok=True)
        launch = [sys.executable]
        if self.gpus > 1:
            launch += ["-m", children.LAUNCHER, "--multi_gpu", "--num_processes", str(self.gpus)]
            launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
            launch += ["--main_process_port", "0"]  # any free one, as another job may share the machine
        with children.ignoring_signal(signal.SIGUSR2):  # SLURM sends it to all processes, and it kills launchers
            launch += [str(ROOT / "train.py"), *self.arguments, "--resume", "auto"]
            self.process = children.start_process(launch)
        stop = partial(children.send_signal, self.process)
        with children.handling_signals(stop) if self.here else nullcontext():
            status = self.process.wait()
        if (self.run / STOPPED).is_file():
            return EXIT_CODE
        if status != 0:
            raise RuntimeError(f"train.py ended with status {status}")
        return status

    def checkpoint(self) -> Any:
        """When SLURM announces the end: let the training save, then go back to the queue."""
        children.send_signal(self.process, signal.SIGUSR1)
        children.wait_in_handler(self.process)
        return requeue(Training(self.arguments, self.run, self.gpus, self.here))


@dataclass(frozen=True, kw_only=True)
class LaunchConfig(ClusterConfig):
    """Submit one training.

    Args:
        experiment: YAML file of the training
        overrides: further flags of train.py, such as '[--train.seed, "1"]'
        cluster: 'slurm', or 'local' for a process on this machine
        logs: folder for the job's output
        wait: wait until the job has ended
    """

    experiment: Path = reads("file")
    overrides: list[str] = field(default_factory=list)
    gpus: int = within("[1, inf)", 1)
    cluster: Literal["slurm", "local"] = "slurm"
    logs: Path = Path("runs/slurm")
    wait: bool = False

    def check(self, prefix: str) -> None:
        if any(flag.partition("=")[0] == "--resume" for flag in self.overrides):  # would be overridden
            remedy = "--resume is always auto here; choose the run to continue with --name"
            raise ValueError(f"{prefix}overrides: {remedy}")


def main(config: LaunchConfig) -> None:
    """Validate the configuration, as train.py would, and submit the job."""
    arguments = ["--config", str(config.experiment), *config.overrides]
    run, here = parse_run(ExperimentConfig, arguments).folder, config.cluster == "local"
    executor = open_executor(config.cluster, config.logs, config, name=config.experiment.stem)
    with children.ignoring_signal(signal.SIGINT):  # as this process forwards Ctrl-C itself
        job = executor.submit(Training(arguments, run, config.gpus, here))
    print(f"job {job.job_id}; its output: {job.paths.stdout}", flush=True)
    if config.wait:
        with children.handling_signals(lambda number: children.stop_jobs([job.job_id], here=here, number=number)):
            print(f"it ended with status {job.result()}")


if __name__ == "__main__":
    run_main(main, LaunchConfig)
