"""At which times a model is trained: each a function `(num, generator, device) -> shares of the way, in [0, 1)`; and
what the model is told of a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Device = torch.device | str


def uniform(num: int, generator: torch.Generator | None, device: Device) -> Float[Tensor, " num"]:
    """Each time as likely."""
    return torch.rand(num, generator=generator, device=device)


def logit_normal(num: int, generator: torch.Generator | None, device: Device) -> Float[Tensor, " num"]:
    """`sigmoid` of a unit normal: more of the middle (Esser et al. 2024, eq. 19 with m = 0, s = 1)."""
    return torch.randn(num, generator=generator, device=device).sigmoid().clamp(max=1 - 2**-24)


TIMES: dict[str, Callable[[int, torch.Generator | None, Device], Tensor]] = {
    "uniform": uniform,
    "logit_normal": logit_normal,
}


def check_model_times(model_times: Sequence[float]) -> tuple[float, float]:
    """What a backbone is given at the first and at the last time of a process: two different numbers.

    Raises:
        ValueError: for anything else.
    """
    if len(model_times) != 2 or not math.isfinite(sum(model_times)) or model_times[0] == model_times[1]:
        raise ValueError(f"--diffusion.model_times {list(model_times)}: give two different numbers, such as [0, 999]")
    return model_times[0], model_times[1]
