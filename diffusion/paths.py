"""Paths from data to noise, `x_t = alpha(t) x_0 + sigma(t) noise`. Each defines its time, which grows with noise."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Float64, Int64, Shaped
from torch import Tensor

from diffusion.targets import Target
from diffusion.transition import Images, Level, Timesteps, Transition
from machine.precision import to_float64

HALF_PI = math.pi / 2


class ProbabilityPath(ABC):
    """Alpha and sigma as functions of time, and whatever else depends on the definition of time."""

    max_time: int | float  # the last time, that of the noise
    noise_range: tuple[float, float]  # smallest and largest sigma / alpha, both finite and above 0
    prior_std: float = 1.0  # standard deviation of `x_t` at the last time
    targets: Mapping[str, Target] = MappingProxyType({})  # prediction targets beside those of all paths

    @abstractmethod
    def __call__(self, t: Shaped[Tensor, "*n"]) -> Level:
        """Return `alpha` and `sigma` at times `t`, possibly on the CPU."""

    @abstractmethod
    def time_at(self, ratio: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return the times at which sigma / alpha is `ratio`."""

    @abstractmethod
    def noise_rank(self, t: Shaped[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Map times to a scale from 0, least noise, to 1, most noise."""

    @abstractmethod
    def timesteps(self, num_steps: int) -> Shaped[Tensor, " num_steps"]:
        """Return evenly spaced times for a sampler, ascending."""

    @abstractmethod
    def model_inputs(self, x_t: Images, t: Timesteps) -> tuple[Images, Timesteps]:
        """Convert `x_t` and `t` to the inputs of a backbone, whose times run from 0 to 999 by default."""

    def levels(self, t: Timesteps) -> Level:
        """Return `alpha` and `sigma` at times `t` in float32, as `[b 1 1 1]` on `t`'s device."""
        return Level(*(rearrange(number.float().to(t.device), "b -> b 1 1 1") for number in self(t)))


class GaussianChain(ProbabilityPath):
    """The discrete-time chain of DDPM (Ho et al. 2020): `q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I)`, from the variance
    that is added at each time, `betas`.

    `alpha_t^2 = alpha_bar_t = 1 - sigma_t^2`. Times are 0..T-1, least noise first; the step from t = 0 leads to the
    data. The backbone's time inputs are `model_times` at 0 and T-1, if not 0 and T-1, and linear in between.
    """

    def __init__(self, betas: Float64[Tensor, " T"], model_times: Sequence[float] | None = None) -> None:
        self.betas, self.num_timesteps, self.max_time = betas, len(betas), len(betas) - 1
        self.model_times = None if model_times is None else check_model_times(model_times)
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0)  # [T]
        # alpha = cos(angle), sigma = sin(angle).
        self._angle = torch.atan2((1 - self.alphas_cumprod).sqrt(), self.alphas_cumprod.sqrt())  # [T]
        ratios = self._angle[self.alphas_cumprod > 0].tan()
        self.noise_range = (ratios[0].item(), ratios[-1].item())
        self._tables: dict[torch.device, Tensor] = {}

    def __call__(self, t: Shaped[Tensor, "*n"]) -> Level:
        """Return `alpha` and `sigma` in float64; between the chain's times, their angle is interpolated linearly."""
        t = to_float64(t)
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
        """Return evenly spaced times in 0..T-1, with both ends; a single step starts at T-1, the noise."""
        if not 1 <= num_steps <= self.num_timesteps:
            raise ValueError(f"--num_steps {num_steps} must lie in 1..{self.num_timesteps}, the training timesteps")
        if num_steps == 1:
            return torch.tensor([self.max_time])
        stride = self.max_time / (num_steps - 1)
        return torch.tensor([round(stride * i) for i in range(num_steps)])

    def model_inputs(self, x_t: Images, t: Timesteps) -> tuple[Images, Timesteps]:
        if self.model_times is None:
            return x_t, t
        first, last = self.model_times
        return x_t, first + (last - first) / self.max_time * t

    def levels(self, t: Timesteps) -> Level:
        """Return `alpha` and `sigma` in float32; integer times are looked up in a table on `t`'s device."""
        return super().levels(t) if t.is_floating_point() else Level(*self.transition(t)[:2])

    def transition(self, t: Int64[Tensor, " b"]) -> Transition:
        """Return the step from each `t` to `t - 1` in float32, as `[b 1 1 1]` on `t`'s device."""
        if t.device not in self._tables:
            chain = Transition.chain(*self(torch.arange(self.num_timesteps)))
            self._tables[t.device] = torch.stack([*chain], dim=1).float().to(t.device)
        return Transition(*rearrange(self._tables[t.device][t], "b k -> k b 1 1 1"))


def check_model_times(model_times: Sequence[float]) -> tuple[float, float]:
    """Return the backbone's time inputs at both ends; raise `ValueError` unless they are different and finite."""
    if len(model_times) != 2 or not math.isfinite(sum(model_times)) or model_times[0] == model_times[1]:
        raise ValueError(f"--diffusion.model_times {list(model_times)}: give two different numbers, such as [0, 999]")
    return model_times[0], model_times[1]


def check_num_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"--num_steps {num_steps} must be at least 1")


class Curve(NamedTuple):
    """The path of a flow over times from 0 to 1, and its velocity `d x_t / dt = alpha' x_0 + sigma' noise`."""

    level: Callable[[Tensor], Level]
    time_at: Callable[[Tensor], Tensor]  # sigma / alpha -> time
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


class Flow(ProbabilityPath):
    """A straight or circular path, a `curve` in `CURVES`, from the data at t = 0 to the noise at t = 1 (Lipman et al.
    2023).

    The shift maps times by `t -> shift t / (1 + (shift - 1) t)`, towards the noise if above 1 (Esser et al. 2024, eq.
    23). The backbone's time inputs are `model_times` at t = 0 and t = 1, and linear in between.
    """

    noise_range = (0.002, 80.0)  # for spacings by noise level, as in EDM; their last time is still 1
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
        """Apply the shift to times."""
        return self.shift * t / (1 + (self.shift - 1) * t)

    def timesteps(self, num_steps: int) -> Float[Tensor, " num_steps"]:
        """Return `1 / n, 2 / n, ... 1`, shifted."""
        check_num_steps(num_steps)
        return self.shifted(torch.arange(1, num_steps + 1, dtype=torch.float64) / num_steps)

    def model_inputs(self, x_t: Images, t: Timesteps) -> tuple[Images, Timesteps]:
        first, last = self.model_times
        return x_t, first + (last - first) * t


class VarianceExploding(ProbabilityPath):
    """The path of EDM, `x_t = x_0 + sigma noise`, with sigma as its time (Karras et al. 2022).

    The backbone F has inputs and targets of unit variance at every noise level: `x_0 = c_skip x_t + c_out F(c_in x_t,
    c_noise)` (eq. 7 and table 1). `c_noise` is linear in log sigma as published, but runs from 0 at `sigma_min` to 999
    at `sigma_max`.
    """

    def __init__(self, sigma_data: float, sigma_min: float, sigma_max: float) -> None:
        for name, value in {"sigma_data": sigma_data, "sigma_min": sigma_min}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"--diffusion.{name} {value} must be above 0")
        if not sigma_min < sigma_max < math.inf:
            raise ValueError(f"--diffusion.sigma_max {sigma_max} must lie above --diffusion.sigma_min {sigma_min}")
        self.sigma_data, self.noise_range = sigma_data, (sigma_min, sigma_max)
        self.prior_std = self.max_time = sigma_max
        # F = (x_0 - c_skip x_t) / c_out (eq. 8), in a form without cancellation at small sigma.
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
        """Map log sigma linearly to 0 at `sigma_min` and 1 at `sigma_max`."""
        low, high = map(math.log, self.noise_range)
        return (t.log() - low) / (high - low)

    def timesteps(self, num_steps: int) -> Float[Tensor, " num_steps"]:
        """Return evenly spaced sigmas from `sigma_min` to `sigma_max`; unlike `karras`, most at strong noise."""
        check_num_steps(num_steps)
        return torch.linspace(*self.noise_range, num_steps, dtype=torch.float64)

    def model_inputs(self, x_t: Images, t: Timesteps) -> tuple[Images, Timesteps]:
        """Return `c_in x_t` and `c_noise` (Karras et al. 2022, table 1)."""
        c_in = (self.levels(t).sigma ** 2 + self.sigma_data**2).rsqrt()
        return c_in * x_t, 999 * self.noise_rank(t).float()
