"""The design of Karras et al. 2022 (EDM): `x_t = x_0 + sigma noise`, with the time sigma itself.

The backbone F sees its input scaled to unit variance and learns a target of unit variance at every noise level:
`x_0 = c_skip x_t + c_out F(c_in x_t, c_noise)` (eq. 7 and table 1).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Float32, Shaped
from torch import Tensor

from diffusion.diffusion import Denoiser, Diffusion, Prediction, mean_per_sample
from diffusion.predictions import AtLevel, Level
from diffusion.transition import Transition


class EDM(Diffusion):
    """Preconditioned denoising with log-normal noise levels.

    The weight `(sigma^2 + sigma_data^2) / (sigma sigma_data)^2` of the error of `x_0` makes that of F count alike at
    all levels, so the loss is F's own mean squared error. `c_noise` is linear in log sigma as published, but runs from
    0 at `sigma_min` to 999 at `sigma_max`, which is what the backbones' time embeddings are made for.

    Args:
        sigma_data: standard deviation of the data; latents of this project have about 1.
        P_mean: mean of log sigma in training. Published: -1.2 for data of 0.5, which is -0.5 for data of 1.
        P_std: its standard deviation.
        sigma_min: least noise that a sampler visits before the data.
        sigma_max: noise that it starts from.
        uncertainty: have the model say in one more channel, of which the mean over the image counts, the logarithm u of
            the error it expects; the loss is then `mse / e^u + u`, least where u is log mse (Kendall et al. 2018;
            Karras et al. 2024, eq. 21, where u is a small network's and knows sigma alone). The best prediction stays
            the same.

    Raises:
        ValueError: for numbers that are not positive, or levels that do not ascend.
    """

    default_sampler = "heun"
    default_spacing = "karras"

    def __init__(
        self,
        sigma_data: float = 1.0,
        P_mean: float = -0.5,
        P_std: float = 1.2,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        uncertainty: bool = False,
    ) -> None:
        for name, value in {"sigma_data": sigma_data, "P_std": P_std, "sigma_min": sigma_min}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"--diffusion.{name} {value} must be above 0")
        if not sigma_min < sigma_max < math.inf:
            raise ValueError(f"--diffusion.sigma_max {sigma_max} must lie above --diffusion.sigma_min {sigma_min}")
        self.sigma_data, self.P_mean, self.P_std = sigma_data, P_mean, P_std
        self.uncertainty = uncertainty
        self.noise_range = (sigma_min, sigma_max)
        self.prior_std = self.max_time = sigma_max

    def output_channels(self, in_channels: int) -> int:
        """Those of the data, and one for the uncertainty."""
        return in_channels + self.uncertainty

    def sample_timesteps(
        self, num: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Float[Tensor, " num"]:
        """Noise levels sigma whose logarithm is normal."""
        return (self.P_mean + self.P_std * torch.randn(num, generator=generator, device=device)).exp()

    def timesteps(self, num_steps: int) -> Float[Tensor, " num_steps"]:
        """Evenly from `sigma_min` to `sigma_max`; the default spacing is `karras`, which spends few on strong noise.

        Raises:
            ValueError: for no steps.
        """
        if num_steps < 1:
            raise ValueError(f"--num_steps {num_steps} must be at least 1")
        return torch.linspace(*self.noise_range, num_steps, dtype=torch.float64)

    def path(self, t: Shaped[Tensor, "*n"]) -> Level:
        """Alpha is 1, and sigma is the time."""
        return Level(torch.ones_like(t), t)

    def time_at(self, ratio: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The ratio itself, since alpha is 1."""
        return ratio

    def noise_rank(self, t: Shaped[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Where log sigma lies between those of `sigma_min` and `sigma_max`."""
        low, high = map(math.log, self.noise_range)
        return (t.log() - low) / (high - low)

    def precondition(self, model: Denoiser) -> Denoiser:
        """The input scaled by `c_in`, and `c_noise` in place of sigma."""

        def preconditioned(x_t: Tensor, t: Tensor, y: Tensor, **extras: Any) -> Tensor:
            _, sigma = self.levels(t)
            c_in = (sigma**2 + self.sigma_data**2).rsqrt()
            return model(c_in * x_t, 999 * self.noise_rank(t).float(), y, **extras)

        return preconditioned

    def target(
        self, x_0: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], t: Shaped[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        """`(x_0 - c_skip x_t) / c_out` (eq. 8), without the cancellation at weak noise."""
        _, sigma = self.levels(t)
        return (sigma * x_0 - self.sigma_data**2 * noise) / (self.sigma_data * (sigma**2 + self.sigma_data**2).sqrt())

    def read(
        self, raw: Float[Tensor, "b c h w"], x_t: Float[Tensor, "b c h w"], at: AtLevel
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        """`x_0 = c_skip x_t + c_out raw`, and noise = (x_t - x_0) / sigma, without its cancellation at weak noise."""
        total = at.sigma**2 + self.sigma_data**2
        c_skip, c_out = self.sigma_data**2 / total, at.sigma * self.sigma_data / total.sqrt()
        return c_skip * x_t + c_out * raw, at.sigma / total * x_t - self.sigma_data / total.sqrt() * raw

    def predict(
        self,
        output: Float[Tensor, "b c_out h w"],
        x_t: Float[Tensor, "b c h w"],
        t: Shaped[Tensor, " b"],
        transition: Transition | None = None,
    ) -> Prediction:
        """What a raw model output says of `x_t`; its uncertainty is the training's matter."""
        return super().predict(output[:, : x_t.shape[1]], x_t, t, transition)

    def terms(
        self,
        output: Float[Tensor, "b c_out h w"],
        x_0: Float[Tensor, "b c h w"],
        x_t: Float[Tensor, "b c h w"],
        t: Shaped[Tensor, " b"],
        noise: Float[Tensor, "b c h w"],
    ) -> dict[str, Float32[Tensor, " b"]]:
        """`loss`, `mse` and, where it is learned, `uncertainty`, the u of that loss."""
        terms = super().terms(output[:, : x_0.shape[1]], x_0, x_t, t, noise)
        if not self.uncertainty:
            return terms
        u = mean_per_sample(output[:, x_0.shape[1] :])
        return {**terms, "loss": terms["loss"] * torch.exp(-u) + u, "uncertainty": u}
