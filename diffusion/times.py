"""At which times a model is trained: shares of the way from the least noise to the most, in [0, 1)."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Device = torch.device | str
DrawTimes = Callable[[int, torch.Generator | None, Device], Tensor]
"""Of (number, generator, device), on which the generator lies."""


def uniform(num: int, generator: torch.Generator | None, device: Device) -> Float[Tensor, " num"]:
    """Draws that take each time as likely as any other."""
    return torch.rand(num, generator=generator, device=device)


def logit_normal(num: int, generator: torch.Generator | None, device: Device) -> Float[Tensor, " num"]:
    """`sigmoid` of a unit normal: more of the middle (Esser et al. 2024, eq. 19 with m = 0, s = 1)."""
    return torch.randn(num, generator=generator, device=device).sigmoid().clamp(max=1 - 2**-24)


TIMES: dict[str, DrawTimes] = {"uniform": uniform, "logit_normal": logit_normal}
