"""At which times a model is trained: shares of the way from the least noise to the most, in [0, 1)."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from settings import check_arguments, check_name

Device = torch.device | str
DrawTimes = Callable[[int, torch.Generator | None, Device], Tensor]
"""Of (number, generator, device), on which the generator lies."""


def uniform(num: int, generator: torch.Generator | None, device: Device) -> Float[Tensor, " num"]:
    """Draws that take each time as likely as any other."""
    return torch.rand(num, generator=generator, device=device)


def logit_normal(
    num: int,
    generator: torch.Generator | None,
    device: Device,
    *,
    location: Annotated[float, "(-inf, inf)"] = 0.0,
    scale: Annotated[float, "(0, inf)"] = 1.0,
) -> Float[Tensor, " num"]:
    """`sigmoid` of a normal: more of the middle, or of the noisier side with a location above 0 (Esser et al. 2024, eq.
    19). A flow's shift of s adds log s to the location."""
    return (location + scale * torch.randn(num, generator=generator, device=device)).sigmoid()


def mode(
    num: int, generator: torch.Generator | None, device: Device, *, scale: Annotated[float, "[-1, 1.7519]"] = 1.29
) -> Float[Tensor, " num"]:
    """More of the middle, or of both ends with a scale below 0, and none of them rare (Esser et al. 2024, eq. 20, of
    1 - u). It grows with u, as an inverse of a distribution does, from -1 to 2 / (pi - 2)."""
    u = uniform(num, generator, device)
    return (1 + scale) * u - scale * (0.5 * torch.pi * u).sin().square()


def cosmap(num: int, generator: torch.Generator | None, device: Device) -> Float[Tensor, " num"]:
    """Whose log-SNR on a linear path is that of a cosine schedule at uniform times (Esser et al. 2024, eq. 21)."""
    tangent = torch.tan(0.5 * torch.pi * uniform(num, generator, device))
    return tangent / (tangent + 1)


TIMES: dict[str, Callable[..., Tensor]] = {draw.__name__: draw for draw in (uniform, logit_normal, mode, cosmap)}


def draw_times(name: str, arguments: Mapping[str, Any] | None = None) -> DrawTimes:
    """A row of `TIMES` with arguments of its own; a ValueError names the flag of one that does not fit."""
    check_name("--diffusion.times", name, TIMES)
    check_arguments(TIMES[name], arguments or {}, "--diffusion.times_args")

    def draw(num: int, generator: torch.Generator | None, device: Device) -> Float[Tensor, " num"]:
        return TIMES[name](num, generator, device, **arguments or {}).clamp(max=1 - 2**-24)  # as some round to 1

    return draw
