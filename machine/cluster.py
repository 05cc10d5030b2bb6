"""SLURM jobs, or local processes instead, through submitit."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from settings import within

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class ClusterConfig:
    """Resources of a SLURM job.

    Args:
        gpus: number of GPUs, on one node
        hours: time limit, after which the job is requeued
        cpus_per_gpu: CPU cores per GPU
        memory_gb: main memory of the job
        partition: partition of the cluster; null: its default
    """

    gpus: int = within("[0, inf)", 1)
    hours: float = within("(0, inf)", 12.0)
    cpus_per_gpu: int = within("[1, inf)", 8)
    memory_gb: int = within("[1, inf)", 64)
    partition: str | None = None


def open_executor(scheduler: Literal["slurm", "local"], logs: Path, job: ClusterConfig, *, name: str) -> Any:
    """Create submitit's executor for single-node jobs, with this project on their PYTHONPATH."""
    try:
        import submitit
    except ImportError as error:
        raise ValueError("submitit is not installed: pip install -e '.[slurm]'") from error
    executor = submitit.AutoExecutor(folder=logs, cluster=scheduler)
    cores = job.cpus_per_gpu * max(1, job.gpus)
    executor.update_parameters(timeout_min=int(60 * job.hours), cpus_per_task=cores, name=name)
    if scheduler == "slurm":
        slurm = {"slurm_signal_delay_s": 120, **({"slurm_partition": job.partition} if job.partition else {})}
        executor.update_parameters(gpus_per_node=job.gpus, mem_gb=job.memory_gb, **slurm)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return executor


def requeue(job: Any) -> Any:
    """The value that a job's `checkpoint` method returns to submitit to be requeued as `job`."""
    import submitit

    return submitit.helpers.DelayedSubmission(job)
