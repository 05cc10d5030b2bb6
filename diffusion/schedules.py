"""Noise schedules of discrete-time diffusion: the variance `beta_t` added at each of T steps, in float64."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float64
from torch import Tensor


def linear(num_timesteps: int) -> Float64[Tensor, " T"]:
    """Betas from 1e-4 to 0.02 in equal steps, scaled by 1000 / T (Ho et al. 2020, section 4, where T = 1000)."""
    scale = 1000 / num_timesteps
    return torch.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=torch.float64)


def scaled_linear(num_timesteps: int) -> Float64[Tensor, " T"]:
    """Square roots of betas from 0.00085^0.5 to 0.012^0.5 in equal steps, for any T (Rombach et al. 2022)."""
    return torch.linspace(0.00085**0.5, 0.012**0.5, num_timesteps, dtype=torch.float64).square()


def linear_unscaled(num_timesteps: int) -> Float64[Tensor, " T"]:
    """Betas from 1e-4 to 0.02 for any T. Short chains then do not reach the noise: 25 steps end at alpha_bar 0.78."""
    return torch.linspace(1e-4, 0.02, num_timesteps, dtype=torch.float64)


def cosine(num_timesteps: int) -> Float64[Tensor, " T"]:
    """`alpha_bar(s) = cos^2((s + 0.008) / 1.008 * pi / 2)`, betas at most 0.999 (Nichol and Dhariwal 2021, eq. 17)."""
    s = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    alpha_bar = torch.cos((s + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def sigmoid(num_timesteps: int) -> Float64[Tensor, " T"]:
    """`alpha_bar(s)` falls as a logistic curve, s from -3 to 3, betas at most 0.999 (Jabri et al. 2022, appendix B)."""
    s = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    curve = torch.sigmoid(3 - 6 * s)
    alpha_bar = (curve - curve[-1]) / (curve[0] - curve[-1])
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


SCHEDULES: dict[str, Callable[[int], Tensor]] = {
    schedule.__name__: schedule for schedule in (linear, scaled_linear, linear_unscaled, cosine, sigmoid)
}


def with_zero_terminal_snr(betas: Float64[Tensor, " T"]) -> Float64[Tensor, " T"]:
    """Rescale a schedule such that its last `alpha_bar` is 0 and its first unchanged (Lin et al. 2023, algorithm 1)."""
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha_bar = root**2
    return 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
