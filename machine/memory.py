"""How much memory is free for a process."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import torch

GROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def free_memory(device: torch.device, num_processes: int = 1) -> int:
    """Bytes: of a CUDA device what is free there, else the share of one of so many processes in main memory, or in what
    their control groups (a container's, a job's) may take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([psutil.virtual_memory().available, *_limits()]) // num_processes


def _limits() -> Iterator[int]:
    """Of the control groups that this process is in, each inside the next, of either version."""
    with suppress(OSError):
        for line in OWN.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            root, name = (GROUPS / "memory", "memory.limit_in_bytes") if controllers else (GROUPS, "memory.max")
            if controllers in ("", "memory"):
                place = root / group.lstrip("/")
                for folder in (place, *place.parents):
                    with suppress(OSError, ValueError):  # of none, or "max"
                        yield int((folder / name).read_text())
