"""What a model may be trained to put out, and how `x_0` and noise are read off an output."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


class Level(NamedTuple):
    """A point of the path `x_t = alpha x_0 + sigma noise`."""

    alpha: Tensor
    sigma: Tensor


@runtime_checkable
class AtLevel(Protocol):
    """Whatever knows alpha and sigma: a `Level`, or the upper end of a `Transition`."""

    @property
    def alpha(self) -> Tensor:
        """The share of the data."""
        ...

    @property
    def sigma(self) -> Tensor:
        """The standard deviation of the noise."""
        ...


class Target(NamedTuple):
    """One parameterisation, its three readings and what a unit of its error is worth in `x_0`."""

    target: Callable[[Tensor, Tensor, AtLevel], Tensor]  # of (x_0, noise, level)
    x_0: Callable[[Tensor, Tensor, AtLevel], Tensor]  # of (output, x_t, level)
    noise: Callable[[Tensor, Tensor, AtLevel], Tensor]
    x_0_error: Callable[[AtLevel], Tensor]  # squared error of x_0 over that of the output


PREDICTIONS = {
    "epsilon": Target(  # Ho et al. 2020, eq. 14 and 15
        target=lambda x_0, noise, at: noise,
        x_0=lambda output, x_t, at: (x_t - at.sigma * output) / at.alpha,
        noise=lambda output, x_t, at: output,
        x_0_error=lambda at: (at.sigma / at.alpha) ** 2,
    ),
    "x_0": Target(
        target=lambda x_0, noise, at: x_0,
        x_0=lambda output, x_t, at: output,
        noise=lambda output, x_t, at: (x_t - at.alpha * output) / at.sigma,
        x_0_error=lambda at: torch.ones_like(at.alpha),
    ),
    "v": Target(  # Salimans and Ho 2022, appendix D; alpha^2 + sigma^2 = 1
        target=lambda x_0, noise, at: at.alpha * noise - at.sigma * x_0,
        x_0=lambda output, x_t, at: at.alpha * x_t - at.sigma * output,
        noise=lambda output, x_t, at: at.sigma * x_t + at.alpha * output,
        x_0_error=lambda at: at.sigma**2,
    ),
}
