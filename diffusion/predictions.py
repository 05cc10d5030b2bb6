"""What a model may put out, and a loss be counted in: combinations of the data and the noise that `x_t` is made of."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.transition import AtLevel, Images


class Target(NamedTuple):
    """The combination `data x_0 + noise noise`, whose weights depend on the level; None leaves that part out.

    With `x_t`, another combination, it gives both parts back: two equations for two unknowns.
    """

    data: Callable[[AtLevel], Tensor] | None
    noise: Callable[[AtLevel], Tensor] | None

    def of(self, x_0: Images, noise: Images, at: AtLevel) -> Images:
        if self.data is None or self.noise is None:
            return noise if self.data is None else x_0
        return self.data(at) * x_0 + self.noise(at) * noise

    def read(self, output: Images, x_t: Images, at: AtLevel) -> tuple[Images, Images]:
        """`x_0` and noise off an output for `x_t`."""
        if self.noise is None:
            return output, (x_t - at.alpha * output) / at.sigma
        if self.data is None:
            return (x_t - at.sigma * output) / at.alpha, output
        data, noise, determinant = self.data(at), self.noise(at), self.determinant(at)
        return (noise * x_t - at.sigma * output) / determinant, (at.alpha * output - data * x_t) / determinant

    def determinant(self, at: AtLevel) -> Tensor:
        """Of the two equations: an error of `x_0`, `x_t` given, is `sigma / |determinant|` times that of the output. So
        the ratio of two determinants converts errors of one target to those of another."""
        from_noise = 0 if self.noise is None else at.alpha * self.noise(at)
        from_data = 0 if self.data is None else at.sigma * self.data(at)
        return torch.as_tensor(from_noise - from_data)


def one(at: AtLevel) -> Tensor:
    return torch.ones_like(at.alpha)


# A path may have further ones: a flow its `velocity`, EDM its `F`.
PREDICTIONS = {
    "epsilon": Target(data=None, noise=one),  # Ho et al. 2020, eq. 14 and 15
    "x_0": Target(data=one, noise=None),
    "v": Target(data=lambda at: -at.sigma, noise=lambda at: at.alpha),  # Salimans and Ho 2022, appendix D
}
