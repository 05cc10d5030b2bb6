"""At which times a model is trained: each a function `(num, generator, device) -> shares of the way, in [0, 1)`."""

from __future__ import annotations

from collections.abc import Callable

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
