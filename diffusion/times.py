"""At which times a model is trained."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Float32, Int64, Shaped
from torch import Tensor

Device = torch.device | str
DrawTimes = Callable[[int, torch.Generator | None, Device], Tensor]


def uniform(num: int, generator: torch.Generator | None, device: Device) -> Float[Tensor, " num"]:
    """Draws that take each time as likely as any other."""
    return torch.rand(num, generator=generator, device=device)


def logit_normal(num: int, generator: torch.Generator | None, device: Device) -> Float[Tensor, " num"]:
    """`sigmoid` of a unit normal: more of the middle (Esser et al. 2024, eq. 19 with m = 0, s = 1)."""
    return torch.randn(num, generator=generator, device=device).sigmoid().clamp(max=1 - 2**-24)


# Each a function `(num, generator, device) -> shares of the way from the least noise to the most, in [0, 1)`.
TIMES: dict[str, DrawTimes] = {"uniform": uniform, "logit_normal": logit_normal}


class Times:
    """What draws the times of training steps, and says what their losses are to count: by itself a function's draws,
    all of the same weight, with nothing learned."""

    learns: ClassVar[bool] = False  # from losses, which have to be gathered for it

    def __init__(self, sample: DrawTimes) -> None:
        self.sample = sample

    def draw(
        self, num: int, generator: torch.Generator | None, device: Device
    ) -> tuple[Shaped[Tensor, " num"], Float32[Tensor, " num"]]:
        """Times, and the weights of their losses."""
        return self.sample(num, generator, device), torch.ones(num, device=device)

    def observe(self, t: Shaped[Tensor, " b"], losses: Float[Tensor, " b"]) -> None:
        """Take note of a whole batch's losses, in its order."""

    def state(self) -> dict[str, Any]:
        """What is known, for a checkpoint."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""


class LossSecondMoments(Times):
    """Times of a Gaussian chain by importance: `p(t)` as the root of the mean square of the last losses at `t`, which
    makes the weighted loss vary least (Nichol and Dhariwal 2021, eq. 18). Uniform until each time has been seen
    `history` times; after that a share of `floor` still is.
    """

    learns = True

    def __init__(self, num_timesteps: int, history: int = 10, floor: float = 0.001) -> None:
        self.floor = floor
        self.losses = torch.zeros(num_timesteps, history, dtype=torch.float64)  # of each time, a ring
        self.counts = torch.zeros(num_timesteps, dtype=torch.int64)

    @property
    def probabilities(self) -> Float[Tensor, " T"]:
        """How likely each time is to be drawn."""
        num, history = self.losses.shape
        even = torch.full((num,), 1 / num, dtype=torch.float64)
        if (self.counts < history).any():
            return even
        root = self.losses.square().mean(dim=1).sqrt()
        return (1 - self.floor) * root / root.sum() + self.floor * even

    def draw(
        self, num: int, generator: torch.Generator | None, device: Device
    ) -> tuple[Int64[Tensor, " num"], Float32[Tensor, " num"]]:
        """Times, and `1 / (T p(t))`. By inversion: a last digit of a loss moves few times, if any."""
        dtype = torch.float64 if has_float64(torch.device(device)) else torch.float32
        u = exact(torch.rand(num, generator=generator, device=device, dtype=dtype))
        p = self.probabilities.to(u.device)
        t = torch.searchsorted(p.cumsum(0), u).clamp(max=len(p) - 1)
        return t.to(device), (1 / (len(p) * p[t])).float().to(device)

    def observe(self, t: Int64[Tensor, " b"], losses: Float[Tensor, " b"]) -> None:
        """Each loss takes the place of the oldest at its time; what is not finite is passed over."""
        for time, loss in zip(t.tolist(), losses.tolist(), strict=True):
            if math.isfinite(loss):
                self.losses[time, self.counts[time] % self.losses.shape[1]] = loss
                self.counts[time] += 1

    def state(self) -> dict[str, Any]:
        return {"losses": self.losses.tolist(), "counts": self.counts.tolist()}

    def restore(self, state: dict[str, Any]) -> None:
        self.losses = torch.tensor(state["losses"], dtype=torch.float64)
        self.counts = torch.tensor(state["counts"])


# Apple's devices have no float64: what needs it is computed on the CPU there.


@cache
def has_float64(device: torch.device) -> bool:
    """Whether tensors of float64 can lie there."""
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except TypeError:
        return False
    return True


def exact(values: Tensor) -> Tensor:
    """The values in float64: where they are, if that can be, else on the CPU."""
    return (values if has_float64(values.device) else values.cpu()).double()
