"""SLURM through submitit, or processes on this machine in its place."""

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
    """submitit's executor of jobs on one node, which find this project wherever they start."""
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
    """What a job's `checkpoint` returns to submitit to be put back into the queue as `job`."""
    import submitit

    return submitit.helpers.DelayedSubmission(job)
