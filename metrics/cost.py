"""The cost of a model: parameters, FLOPs per image, and throughput."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Cost:
    """Cost of a forward pass on one image. `gflops` counts a multiply-add as two operations, the DiT paper as one."""

    parameters: int
    gflops: float


def cost(model: nn.Module, *, latent_shape: tuple[int, int, int], num_classes: int = 0) -> Cost:
    """Count parameters and FLOPs (products, convolutions, attention) for an image of `latent_shape` (c, h, w)."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    first = next(model.parameters(), torch.zeros(()))
    x_t = torch.zeros(1, *latent_shape, device=first.device, dtype=first.dtype)
    t = torch.zeros(1, device=first.device, dtype=first.dtype)
    y = torch.full((1,), num_classes, device=first.device, dtype=torch.int64)  # the null label

    was_training = model.training
    model.eval()
    try:
        # FlopCounterMode does not count all fused attention kernels (none on CPUs); the math backend is counted.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(x_t, t, y)
    finally:
        model.train(was_training)
    return Cost(parameters, counter.get_total_flops() / 1e9)


def throughput(
    function: Callable[[], object], *, batch_size: int, num_repeats: int = 5, device: torch.device | str = "cpu"
) -> float:
    """Measure images per second of a function: the median of `num_repeats` calls after a warm-up."""
    device = torch.device(device)

    def timed() -> float:
        start = time.perf_counter()
        function()
        if device.type in ("cuda", "mps"):  # kernels run asynchronously
            torch.accelerator.synchronize(device)
        return time.perf_counter() - start

    timed()
    return batch_size / statistics.median(timed() for _ in range(num_repeats))
