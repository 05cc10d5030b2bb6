"""Noise schedules of discrete-time diffusion: the variance `beta_t` added at each of `T` steps, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float64
from torch import Tensor


def linear(num_timesteps: int) -> Float64[Tensor, " T"]:
    """From 1e-4 to 0.02 in equal steps (Ho et al. 2020, section 4), scaled to keep the end point at other T."""
    scale = 1000 / num_timesteps
    return torch.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=torch.float64)


def cosine(num_timesteps: int) -> Float64[Tensor, " T"]:
    """`alpha_bar(s) = cos^2((s + 0.008) / 1.008 * pi / 2)`, betas at most 0.999 (Nichol and Dhariwal 2021, eq. 17)."""

    def alpha_bar(s: float) -> float:
        return math.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2

    steps = range(num_timesteps)
    betas = [1 - alpha_bar((i + 1) / num_timesteps) / alpha_bar(i / num_timesteps) for i in steps]
    return torch.tensor(betas, dtype=torch.float64).clamp(max=0.999)


SCHEDULES: dict[str, Callable[[int], Tensor]] = {"linear": linear, "cosine": cosine}
