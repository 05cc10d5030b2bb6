"""Training statistics between two lines of the log, over all processes."""

import math
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

NUM_BUCKETS = 4
T = TypeVar("T")


class Meter:
    """Accumulates loss terms; returns means, also by quarter of the noise level, speed and other statistics."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.reset()

    def reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.pending: dict[str, Tensor] = {}
        self.norms: list[float] = []
        self.num_clipped = 0
        self.start()

    def start(self) -> None:
        """Restart the clock: speed is measured over the steps from here on."""
        self.num_images, self.waited, self.paused, self.since = 0, 0.0, 0.0, time.perf_counter()

    def add(self, terms: dict[str, Tensor], noise_rank: Tensor | None = None) -> None:
        """Add the loss terms [b] of a micro-batch; `noise_rank` is its noise level on a scale from 0 to 1."""
        loss = terms["loss"].detach().float()
        new = {name: values.detach().float().sum() for name, values in terms.items()}
        new["count"] = loss.new_full((), float(len(loss)))  # created on the device, so that nothing is copied
        if noise_rank is not None:
            bucket = (noise_rank * NUM_BUCKETS).long().clamp(0, NUM_BUCKETS - 1)
            one_hot = torch.nn.functional.one_hot(bucket, NUM_BUCKETS).float()  # [b buckets]
            new |= {"bucket_sums": loss @ one_hot, "bucket_counts": one_hot.sum(dim=0)}
        self.pending = _sum(self.pending, new)

    def step(self, norms: Sequence[float], max_norm: float, num_images: int) -> None:
        """Count the micro-batches since the last step, whose update has been applied; each of the gradients with these
        norms was clipped for itself."""
        self.sums, self.pending = _sum(self.sums, self.pending), {}
        self.norms.append(math.hypot(*norms))
        self.num_clipped += bool(max_norm) and max(norms) > max_norm
        self.num_images += num_images

    def skip(self) -> None:
        """Discard the micro-batches since the last step, whose update was skipped."""
        self.pending = {}

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """Iterate over batches, and measure the time spent waiting for them."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(iterator, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def summary(self) -> dict[str, float]:
        """Return the statistics since the last reset, the same on every process; empty if there was no step."""
        if not self.norms:
            return {}
        sums: dict[str, Tensor] = self.accelerator.reduce(self.sums, "sum")  # pyright: ignore
        count, none = sums.pop("count"), torch.zeros(NUM_BUCKETS)
        losses, counts = (sums.pop(name, none).tolist() for name in ("bucket_sums", "bucket_counts"))
        elapsed = max(time.perf_counter() - self.since - self.paused, 1e-9)
        return {
            **{name: (total / count).item() for name, total in sums.items()},
            **{f"loss_quarter_{i + 1}": losses[i] / counts[i] for i in range(NUM_BUCKETS) if counts[i]},
            "gradient_norm": sum(self.norms) / len(self.norms),
            "clipped": self.num_clipped / len(self.norms),
            "images_per_second": self.num_images / elapsed,
            "waiting_for_data": self.waited / elapsed,
            "memory_gb": memory_gb(self.accelerator.device),
        }

    def state(self) -> dict[str, Any]:
        """Return the sums of all processes, for a checkpoint between two lines of the log."""
        shares: dict[str, Any] = {name: self.accelerator.gather(total[None]) for name, total in self.sums.items()}
        counts = {"norms": self.norms, "num_clipped": self.num_clipped}
        return {"shares": {name: share.tolist() for name, share in shares.items()}, **counts}

    def restore(self, state: dict[str, Any]) -> None:
        """Load a state: each process gets its own sums or, if their number has changed, the first gets all. The clock
        restarts, as the earlier steps may have run on another machine."""
        self.reset()
        rank, num = self.accelerator.process_index, self.accelerator.num_processes
        sums = {name: [total] for name, total in state.get("sums", {}).items()}  # the format of older checkpoints
        for name, shares in state.get("shares", sums).items():
            share = torch.tensor(shares, device=self.accelerator.device)
            self.sums[name] = share[rank] if len(share) == num else share.sum(dim=0) * float(rank == 0)
        self.norms, self.num_clipped = state["norms"], state["num_clipped"]


def _sum(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: a[name] + value if name in a else value for name, value in b.items()}


def memory_gb(device: torch.device) -> float:
    """Return this process's peak memory: on the GPU if the device is one, otherwise in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
