"""Distributions of training times, on a scale from 0 (least noise) to 1 (most noise, excluded)."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from settings import check_arguments, check_name

Device = torch.device | str
DrawTimes = Callable[[int, torch.Generator | None, Device], Tensor]
"""`(num, generator, device) -> times`; the generator lies on that device."""


def uniform(num: int, generator: torch.Generator | None, device: Device) -> Float[Tensor, " num"]:
    """Draw times from the uniform distribution."""
    return torch.rand(num, generator=generator, device=device)


def logit_normal(
    num: int,
    generator: torch.Generator | None,
    device: Device,
    *,
    location: Annotated[float, "(-inf, inf)"] = 0.0,
    scale: Annotated[float, "(0, inf)"] = 1.0,
) -> Float[Tensor, " num"]:
    """Draw times as the sigmoid of a normal (Esser et al. 2024, eq. 19). It favours the middle, and noisier times with
    a location above 0. A flow's shift of s adds log s to the location."""
    return (location + scale * torch.randn(num, generator=generator, device=device)).sigmoid()


def mode(
    num: int, generator: torch.Generator | None, device: Device, *, scale: Annotated[float, "[-1, 1.7519]"] = 1.29
) -> Float[Tensor, " num"]:
    """Draw times with a heavy-tailed density (Esser et al. 2024, eq. 20, with 1 - u in place of u).

    It favours the middle or, with a scale below 0, both ends. Scales from -1 to 2 / (pi - 2) keep the map from u
    monotonic, as an inverse distribution function must be.
    """
    u = uniform(num, generator, device)
    return (1 + scale) * u - scale * (0.5 * torch.pi * u).sin().square()


def cosmap(num: int, generator: torch.Generator | None, device: Device) -> Float[Tensor, " num"]:
    """Draw times whose log-SNR on a linear path is that of a cosine schedule (Esser et al. 2024, eq. 21)."""
    tangent = torch.tan(0.5 * torch.pi * uniform(num, generator, device))
    return tangent / (tangent + 1)


TIMES: dict[str, Callable[..., Tensor]] = {draw.__name__: draw for draw in (uniform, logit_normal, mode, cosmap)}


def draw_times(name: str, arguments: Mapping[str, Any] | None = None) -> DrawTimes:
    """Bind arguments to a distribution in `TIMES`; raise `ValueError`, naming the flag, if they do not fit."""
    check_name("--diffusion.times", name, TIMES)
    check_arguments(TIMES[name], arguments or {}, "--diffusion.times_args")

    def draw(num: int, generator: torch.Generator | None, device: Device) -> Float[Tensor, " num"]:
        return TIMES[name](num, generator, device, **arguments or {}).clamp(max=1 - 2**-24)  # some draws round to 1

    return draw
