"""Flow matching (Lipman et al. 2023; Liu et al. 2023; SiT, Ma et al. 2024): the model predicts a velocity.

Time runs from the data, t = 0, to the noise, t = 1; a backbone is given 999 t unless it was trained on other numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from diffusion.diffusion import Denoiser, Diffusion
from diffusion.predictions import AtLevel, Level, Target
from diffusion.schedules import check_name
from diffusion.times import TIMES, check_model_times

HALF_PI = math.pi / 2


class Path(NamedTuple):
    """A way from data to noise, and its velocity `d x_t / dt = alpha' x_0 + sigma' noise` as what a model puts out."""

    level: Callable[[Tensor], Level]  # of t
    time_at: Callable[[Tensor], Tensor]  # of sigma / alpha
    velocity: Target


PATHS = {
    "linear": Path(
        level=lambda t: Level(1 - t, t),
        time_at=lambda ratio: ratio / (1 + ratio),
        velocity=Target(
            target=lambda x_0, noise, at: noise - x_0,
            x_0=lambda output, x_t, at: x_t - at.sigma * output,
            noise=lambda output, x_t, at: x_t + at.alpha * output,
            x_0_error=lambda at: at.sigma**2,
        ),
    ),
    "trigonometric": Path(  # Albergo and Vanden-Eijnden 2023; `v` up to a constant
        level=lambda t: Level((HALF_PI * t).cos(), (HALF_PI * t).sin()),
        time_at=lambda ratio: ratio.atan() / HALF_PI,
        velocity=Target(
            target=lambda x_0, noise, at: HALF_PI * (at.alpha * noise - at.sigma * x_0),
            x_0=lambda output, x_t, at: at.alpha * x_t - at.sigma / HALF_PI * output,
            noise=lambda output, x_t, at: at.sigma * x_t + at.alpha / HALF_PI * output,
            x_0_error=lambda at: (at.sigma / HALF_PI) ** 2,
        ),
    ),
}


class FlowMatching(Diffusion):
    """A straight or circular path between data and noise, in continuous time.

    Args:
        path: by its name in `PATHS`.
        times: at which the model is trained, by name in `TIMES`.
        shift: of training and sampling times alike, `t -> shift t / (1 + (shift - 1) t)`: above 1 towards the noise,
            for larger images (Esser et al. 2024, eq. 23).
        model_times: what the backbone is given at t = 0 and at t = 1.

    Raises:
        ValueError: for a name that is not in the tables, or a shift that is not positive.
    """

    default_sampler = "euler"
    noise_range = (0.002, 80.0)  # of spacings by noise level: EDM's; the last time is 1 all the same
    max_time = 1.0

    def __init__(
        self,
        path: str = "linear",
        times: str = "uniform",
        shift: float = 1.0,
        model_times: Sequence[float] = (0.0, 999.0),
    ) -> None:
        check_name("path", path, PATHS)
        check_name("times", times, TIMES)
        if not 0 < shift < math.inf:
            raise ValueError(f"--diffusion.shift {shift} must be above 0; 1 shifts nothing")
        self.path_name, self.times_name, self.shift = path, times, shift
        self.model_times = check_model_times(model_times)
        self._path = PATHS[path]

    def sample_timesteps(
        self, num: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Float[Tensor, " num"]:
        """Training times in [0, 1)."""
        return self._shifted(TIMES[self.times_name](num, generator, device))

    def timesteps(self, num_steps: int) -> Float[Tensor, " num_steps"]:
        """`1 / n, 2 / n, ... 1`, shifted.

        Raises:
            ValueError: for no steps.
        """
        if num_steps < 1:
            raise ValueError(f"--num_steps {num_steps} must be at least 1")
        return self._shifted(torch.arange(1, num_steps + 1, dtype=torch.float64) / num_steps)

    def _shifted(self, t: Tensor) -> Tensor:
        return self.shift * t / (1 + (self.shift - 1) * t)

    def path(self, t: Shaped[Tensor, "*n"]) -> Level:
        """`alpha` and `sigma` of the chosen path."""
        return self._path.level(t)

    def time_at(self, ratio: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The inverse of `path`, as a function of sigma / alpha."""
        return self._path.time_at(ratio)

    def noise_rank(self, t: Shaped[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The time itself, which runs from 0 to 1."""
        return t

    def precondition(self, model: Denoiser) -> Denoiser:
        """The backbone is given `model_times`, by default 999 t."""
        first, last = self.model_times
        return lambda x_t, t, y, **extras: model(x_t, first + (last - first) * t, y, **extras)

    def target(
        self, x_0: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], t: Shaped[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        """The velocity `dx_t / dt` along the path."""
        return self._path.velocity.target(x_0, noise, self.levels(t))

    def read(
        self, raw: Float[Tensor, "b c h w"], x_t: Float[Tensor, "b c h w"], at: AtLevel
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        """`x_0` and noise: where the velocity leads to, both ways."""
        return self._path.velocity.x_0(raw, x_t, at), self._path.velocity.noise(raw, x_t, at)
