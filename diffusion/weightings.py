"""Weights of the squared error of `x_0`, each a function `(path, t) -> [b 1 1 1]`."""

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.paths import GaussianChain, ProbabilityPath


def snr(path: ProbabilityPath, t: Tensor) -> Tensor:
    """Signal-to-noise ratio `(alpha / sigma)^2`, as [b 1 1 1]."""
    at = path.levels(t)
    return (at.alpha / at.sigma) ** 2


def bound_weight(path: ProbabilityPath, t: Tensor) -> Tensor:
    """Weight of the error of `x_0` in the variational bound of a chain, in nats: T times a term of its sum over t
    (Kingma et al. 2021, eq. 14). t = 0 has the weight of t = 1."""
    assert isinstance(path, GaussianChain)
    at = path.transition(t.clamp(min=1))
    return 0.5 * path.num_timesteps * at.x_0_weight**2 * torch.exp(-at.log_variance_min)


WEIGHTINGS: dict[str, Callable[[ProbabilityPath, Tensor], Tensor]] = {
    "min_snr": lambda path, t: snr(path, t).clamp(max=5),  # Hang et al. 2023, gamma = 5
    "p2": lambda path, t: snr(path, t) / (1 + snr(path, t)),  # Choi et al. 2022, k = gamma = 1
    "vlb": bound_weight,
}
