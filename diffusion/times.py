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


def logit_normal(location: float = 0.0, scale: float = 1.0) -> DrawTimes:
    """`sigmoid` of a normal: more of the middle, or above 0 of what is noisier (Esser et al. 2024, eq. 19)."""

    def draw(num: int, generator: torch.Generator | None, device: Device) -> Float[Tensor, " num"]:
        normal = torch.randn(num, generator=generator, device=device)
        return (location + scale * normal).sigmoid().clamp(max=1 - 2**-24)

    return draw


def cosmap(num: int, generator: torch.Generator | None, device: Device) -> Float[Tensor, " num"]:
    """Whose log-SNR on a linear path is that of a cosine schedule at uniform times (Esser et al. 2024, eq. 21)."""
    tangent = torch.tan(0.5 * torch.pi * uniform(num, generator, device))
    return tangent / (tangent + 1)


TIMES: dict[str, DrawTimes] = {"uniform": uniform, "logit_normal": logit_normal(), "cosmap": cosmap}
