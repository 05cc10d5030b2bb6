"""Prediction targets of a model, and of its loss: linear combinations of the data and noise that `x_t` is made of."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.transition import AtLevel, Images


class Target(NamedTuple):
    """The target `data(at) * x_0 + noise(at) * noise`; None stands for a weight of zero. Since `x_t` is another linear
    combination of the two, a predicted target and `x_t` determine both `x_0` and noise."""

    data: Callable[[AtLevel], Tensor] | None
    noise: Callable[[AtLevel], Tensor] | None

    def combine(self, x_0: Images, noise: Images, at: AtLevel) -> Images:
        """Compute the target from data and noise."""
        if self.data is None or self.noise is None:
            return noise if self.data is None else x_0
        return self.data(at) * x_0 + self.noise(at) * noise

    def solve(self, output: Images, x_t: Images, at: AtLevel) -> tuple[Images, Images]:
        """Solve for `x_0` and noise, given a predicted target and `x_t`."""
        if self.noise is None:
            return output, (x_t - at.alpha * output) / at.sigma
        if self.data is None:
            return (x_t - at.sigma * output) / at.alpha, output
        data, noise, determinant = self.data(at), self.noise(at), self.determinant(at)
        return (noise * x_t - at.sigma * output) / determinant, (at.alpha * output - data * x_t) / determinant

    def determinant(self, at: AtLevel) -> Tensor:
        """Return the determinant of the linear system that `solve` solves.

        At fixed `x_t`, the error of `x_0` is `sigma / |determinant|` times the error of the output, so the ratio of two
        determinants converts errors between two targets.
        """
        from_noise = 0 if self.noise is None else at.alpha * self.noise(at)
        from_data = 0 if self.data is None else at.sigma * self.data(at)
        return torch.as_tensor(from_noise - from_data)


def ones(at: AtLevel) -> Tensor:
    return torch.ones_like(at.alpha)


# Targets of every path. A path may define more: a flow its `velocity`, EDM its `F`.
TARGETS = {
    "epsilon": Target(data=None, noise=ones),  # Ho et al. 2020, eq. 14 and 15
    "x_0": Target(data=ones, noise=None),
    "v": Target(data=lambda at: -at.sigma, noise=lambda at: at.alpha),  # Salimans and Ho 2022, appendix D
}
