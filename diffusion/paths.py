"""Paths from data to noise, `x_t = alpha(t) x_0 + sigma(t) noise`, each in its own time, which grows with the noise."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Float64, Int64, Shaped
from torch import Tensor

from diffusion.predictions import Target
from diffusion.transition import Images, Level, Timesteps, Transition
from machine.precision import exact

HALF_PI = math.pi / 2


class Path(ABC):
    """Alpha and sigma at each time, and what else follows from a choice of time."""

    max_time: int | float  # the last, where the noise is
    noise_range: tuple[float, float]  # of sigma / alpha, both finite and above 0
    prior_std: float = 1.0  # of `x_t` at the last time
    targets: Mapping[str, Target] = MappingProxyType({})  # that mean something here alone

    @abstractmethod
    def __call__(self, t: Shaped[Tensor, "*n"]) -> Level:
        """`alpha` and `sigma` at times `t`; they may lie on the CPU."""

    @abstractmethod
    def time_at(self, ratio: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The times at which sigma / alpha is `ratio`."""

    @abstractmethod
    def noise_rank(self, t: Shaped[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Where a time lies on the way from the least noise, 0, to the most, 1."""

    @abstractmethod
    def timesteps(self, num_steps: int) -> Shaped[Tensor, " num_steps"]:
        """Evenly spread times for a sampler, ascending."""

    @abstractmethod
    def told(self, x_t: Images, t: Timesteps) -> tuple[Images, Timesteps]:
        """`x_t` and `t` as a backbone is given them: by default times from 0 to 999."""

    def levels(self, t: Timesteps) -> Level:
        """`alpha` and `sigma` in float32 as `[b 1 1 1]` on `t`'s device."""
        return Level(*(rearrange(number.float().to(t.device), "b -> b 1 1 1") for number in self(t)))


class GaussianChain(Path):
    """`q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I)`, `alpha_t^2 = alpha_bar_t = 1 - sigma_t^2`, for t in 0..T-1, least
    noise first; the step from t = 0 leads to the data itself (Ho et al. 2020).

    Args:
        betas: variance added at each time, in float64.
        model_times: what the backbone is given at 0 and at T-1, where that is not the time itself.
    """

    def __init__(self, betas: Float64[Tensor, " T"], model_times: Sequence[float] | None = None) -> None:
        self.betas, self.num_timesteps, self.max_time = betas, len(betas), len(betas) - 1
        self.model_times = None if model_times is None else check_model_times(model_times)
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0)  # [T]
        self._angle = torch.atan2((1 - self.alphas_cumprod).sqrt(), self.alphas_cumprod.sqrt())  # [T], up to pi / 2
        ratios = self._angle[self.alphas_cumprod > 0].tan()
        self.noise_range = (ratios[0].item(), ratios[-1].item())
        self._tables: dict[torch.device, Tensor] = {}

    def __call__(self, t: Shaped[Tensor, "*n"]) -> Level:
        """`cos` and `sin` of the angle, in float64, on the CPU where needed; it is linear between the chain's times."""
        t = exact(t)
        below = t.long().clamp(max=self.num_timesteps - 2)
        table = self._angle.to(t.device)
        angle = torch.lerp(table[below], table[below + 1], t - below)
        return Level(angle.cos(), angle.sin())

    def time_at(self, ratio: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        angle = ratio.double().atan()
        above = torch.searchsorted(self._angle, angle).clamp(1, self.num_timesteps - 1)
        low, high = self._angle[above - 1], self._angle[above]
        return above - 1 + ((angle - low) / (high - low)).clamp(0, 1)

    def noise_rank(self, t: Shaped[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return t / self.num_timesteps

    def timesteps(self, num_steps: int) -> Int64[Tensor, " num_steps"]:
        """Evenly spread over 0..T-1, both ends included; a single step is taken from T-1, where the noise is."""
        if not 1 <= num_steps <= self.num_timesteps:
            raise ValueError(f"--num_steps {num_steps} must lie in 1..{self.num_timesteps}, the training timesteps")
        if num_steps == 1:
            return torch.tensor([self.max_time])
        stride = self.max_time / (num_steps - 1)
        return torch.tensor([round(stride * i) for i in range(num_steps)])

    def told(self, x_t: Images, t: Timesteps) -> tuple[Images, Timesteps]:
        if self.model_times is None:
            return x_t, t
        first, last = self.model_times
        return x_t, first + (last - first) / self.max_time * t

    def levels(self, t: Timesteps) -> Level:
        """Looked up at the chain's own times."""
        return super().levels(t) if t.is_floating_point() else Level(*self.transition(t)[:2])

    def transition(self, t: Int64[Tensor, " b"]) -> Transition:
        """The step from each `t` to `t - 1`, in float32 as `[b 1 1 1]` on `t`'s device."""
        if t.device not in self._tables:
            chain = Transition.chain(*self(torch.arange(self.num_timesteps)))
            self._tables[t.device] = torch.stack([*chain], dim=1).float().to(t.device)
        return Transition(*rearrange(self._tables[t.device][t], "b k -> k b 1 1 1"))


def check_model_times(model_times: Sequence[float]) -> tuple[float, float]:
    """What a backbone is given at the first and at the last time of a diffusion: two different numbers."""
    if len(model_times) != 2 or not math.isfinite(sum(model_times)) or model_times[0] == model_times[1]:
        raise ValueError(f"--diffusion.model_times {list(model_times)}: give two different numbers, such as [0, 999]")
    return model_times[0], model_times[1]


def check_num_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"--num_steps {num_steps} must be at least 1")


class Curve(NamedTuple):
    """A flow's path over times from 0 to 1, and its velocity `d x_t / dt = alpha' x_0 + sigma' noise`."""

    level: Callable[[Tensor], Level]
    time_at: Callable[[Tensor], Tensor]  # of sigma / alpha
    velocity: Target


CURVES = {
    "linear": Curve(
        level=lambda t: Level(1 - t, t),
        time_at=lambda ratio: ratio / (1 + ratio),
        velocity=Target(data=lambda at: -torch.ones_like(at.alpha), noise=lambda at: torch.ones_like(at.alpha)),
    ),
    "trigonometric": Curve(  # Albergo and Vanden-Eijnden 2023; `v` up to a constant
        level=lambda t: Level((HALF_PI * t).cos(), (HALF_PI * t).sin()),
        time_at=lambda ratio: ratio.atan() / HALF_PI,
        velocity=Target(data=lambda at: -HALF_PI * at.sigma, noise=lambda at: HALF_PI * at.alpha),
    ),
}


class Flow(Path):
    """A straight or circular path, from the data at t = 0 to the noise at t = 1 (Lipman et al. 2023).

    Args:
        curve: by its name in `CURVES`.
        shift: of times, `t -> shift t / (1 + (shift - 1) t)`: above 1 towards the noise (Esser et al. 2024, eq. 23).
        model_times: what the backbone is given at t = 0 and at t = 1.
    """

    noise_range = (0.002, 80.0)  # of spacings by noise level: EDM's; the last time is 1 all the same
    max_time = 1.0

    def __init__(self, curve: str, shift: float, model_times: Sequence[float]) -> None:
        if not 0 < shift < math.inf:
            raise ValueError(f"--diffusion.shift {shift} must be above 0; 1 shifts nothing")
        self.curve, self.shift, self.model_times = curve, shift, check_model_times(model_times)
        self.targets = {"velocity": CURVES[curve].velocity}

    def __call__(self, t: Shaped[Tensor, "*n"]) -> Level:
        return CURVES[self.curve].level(t)

    def time_at(self, ratio: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return CURVES[self.curve].time_at(ratio)

    def noise_rank(self, t: Shaped[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return t

    def shifted(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Times that were spread evenly."""
        return self.shift * t / (1 + (self.shift - 1) * t)

    def timesteps(self, num_steps: int) -> Float[Tensor, " num_steps"]:
        """`1 / n, 2 / n, ... 1`, shifted."""
        check_num_steps(num_steps)
        return self.shifted(torch.arange(1, num_steps + 1, dtype=torch.float64) / num_steps)

    def told(self, x_t: Images, t: Timesteps) -> tuple[Images, Timesteps]:
        first, last = self.model_times
        return x_t, first + (last - first) * t


class VarianceExploding(Path):
    """`x_t = x_0 + sigma noise`, with the time sigma itself (Karras et al. 2022).

    A backbone F sees its input scaled to unit variance and learns a target of unit variance at every noise level:
    `x_0 = c_skip x_t + c_out F(c_in x_t, c_noise)` (eq. 7 and table 1). `c_noise` is linear in log sigma as published,
    but runs from 0 at `sigma_min` to 999 at `sigma_max`.
    """

    def __init__(self, sigma_data: float, sigma_min: float, sigma_max: float) -> None:
        for name, value in {"sigma_data": sigma_data, "sigma_min": sigma_min}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"--diffusion.{name} {value} must be above 0")
        if not sigma_min < sigma_max < math.inf:
            raise ValueError(f"--diffusion.sigma_max {sigma_max} must lie above --diffusion.sigma_min {sigma_min}")
        self.sigma_data, self.noise_range = sigma_data, (sigma_min, sigma_max)
        self.prior_std = self.max_time = sigma_max
        # (x_0 - c_skip x_t) / c_out (eq. 8), without the cancellation at weak noise.
        F = Target(
            data=lambda at: at.sigma / (sigma_data * (at.sigma**2 + sigma_data**2).sqrt()),
            noise=lambda at: -sigma_data * (at.sigma**2 + sigma_data**2).rsqrt(),
        )
        self.targets = {"F": F}

    def __call__(self, t: Shaped[Tensor, "*n"]) -> Level:
        return Level(torch.ones_like(t), t)

    def time_at(self, ratio: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return ratio

    def noise_rank(self, t: Shaped[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Where log sigma lies between those of `sigma_min` and `sigma_max`."""
        low, high = map(math.log, self.noise_range)
        return (t.log() - low) / (high - low)

    def timesteps(self, num_steps: int) -> Float[Tensor, " num_steps"]:
        """Evenly from `sigma_min` to `sigma_max`; the spacing `karras` spends few on strong noise."""
        check_num_steps(num_steps)
        return torch.linspace(*self.noise_range, num_steps, dtype=torch.float64)

    def told(self, x_t: Images, t: Timesteps) -> tuple[Images, Timesteps]:
        """The input scaled by `c_in`, and `c_noise` in place of sigma (Karras et al. 2022, table 1)."""
        c_in = (self.levels(t).sigma ** 2 + self.sigma_data**2).rsqrt()
        return c_in * x_t, 999 * self.noise_rank(t).float()
