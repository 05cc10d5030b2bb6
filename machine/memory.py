"""Free memory of a device or of this process."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import torch

GROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def free_memory(device: torch.device, num_processes: int = 1) -> int:
    """Bytes of free memory: on a CUDA device, or one of `num_processes` equal shares of main memory, as limited by
    control groups (of a container or a job)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([psutil.virtual_memory().available, *_limits()]) // num_processes


def _limits() -> Iterator[int]:
    """Memory limits of this process's control groups and their parents, for cgroup v1 and v2."""
    with suppress(OSError):
        for line in OWN.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            root, name = (GROUPS / "memory", "memory.limit_in_bytes") if controllers else (GROUPS, "memory.max")
            if controllers in ("", "memory"):
                place = root / group.lstrip("/")
                for folder in (place, *place.parents):
                    with suppress(OSError, ValueError):  # no limit: no such file, or "max"
                        yield int((folder / name).read_text())
