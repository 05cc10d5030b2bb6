"""SLURM jobs, or local processes instead, through submitit."""

import os
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent


def open_executor(
    scheduler: Literal["slurm", "local"],
    logs: Path,
    *,
    name: str,
    gpus: int,
    hours: float,
    cpus_per_gpu: int,
    memory_gb: int,
    partition: str | None,
) -> Any:
    """Create submitit's executor for single-node jobs, with this project on their PYTHONPATH."""
    try:
        import submitit
    except ImportError as error:
        raise ValueError("submitit is not installed: pip install -e '.[slurm]'") from error
    executor = submitit.AutoExecutor(folder=logs, cluster=scheduler)
    executor.update_parameters(timeout_min=int(60 * hours), cpus_per_task=cpus_per_gpu * max(1, gpus), name=name)
    if scheduler == "slurm":
        slurm = {"slurm_signal_delay_s": 120, **({"slurm_partition": partition} if partition else {})}
        executor.update_parameters(gpus_per_node=gpus, mem_gb=memory_gb, **slurm)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return executor


def requeue(job: Any) -> Any:
    """The value that a job's `checkpoint` method returns to submitit to be requeued as `job`."""
    import submitit

    return submitit.helpers.DelayedSubmission(job)
