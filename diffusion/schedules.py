"""Noise schedules of discrete-time diffusion: the variance `beta_t` added at each of T steps, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float64
from torch import Tensor


def linear(num_timesteps: int) -> Float64[Tensor, " T"]:
    """From 1e-4 to 0.02 in equal steps (Ho et al. 2020, section 4); for T other than 1000, times 1000 / T."""
    scale = 1000 / num_timesteps
    return torch.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=torch.float64)


def cosine(num_timesteps: int) -> Float64[Tensor, " T"]:
    """`alpha_bar(s) = cos^2((s + 0.008) / 1.008 * pi / 2)`, betas at most 0.999.

    Nichol and Dhariwal 2021, eq. 17; elsewhere called `squaredcos_cap_v2`.
    """
    s = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    alpha_bar = torch.cos((s + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


SCHEDULES: dict[str, Callable[[int], Tensor]] = {"linear": linear, "cosine": cosine}
