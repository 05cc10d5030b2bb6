"""Numbers of a path: its level at a time, and the step from one level to another, with the posterior between them."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

Images = Float[Tensor, "b c h w"]
Output = Float[Tensor, "b c_out h w"]
Timesteps = Shaped[Tensor, " b"]
Labels = Int64[Tensor, " b"]


class Level(NamedTuple):
    """A point of the path `x_t = alpha x_0 + sigma noise`."""

    alpha: Tensor
    sigma: Tensor


class Transition(NamedTuple):
    """A reverse step from time t to an earlier time s; everything follows from alpha and sigma at both.

    The posterior is `q(x_s | x_t, x_0) = N(x_0_weight x_0 + x_t_weight x_t, posterior_std^2)` (Ho et al. 2020, eq. 7,
    for any path: Kingma et al. 2021, appendix A). The numbers broadcast over `[b c h w]`.
    """

    alpha: Tensor  # at t
    sigma: Tensor
    alpha_next: Tensor  # at s
    sigma_next: Tensor
    x_0_weight: Tensor
    x_t_weight: Tensor
    posterior_std: Tensor  # 0 when s is the data
    log_variance_min: Tensor  # of the posterior, kept finite
    log_variance_max: Tensor  # of q(x_t | x_s): log beta

    @classmethod
    def between(cls, alpha: Tensor, sigma: Tensor, alpha_next: Tensor, sigma_next: Tensor) -> "Transition":
        kept = alpha / alpha_next
        beta = sigma**2 - (kept * sigma_next) ** 2
        variance = beta * (sigma_next / sigma) ** 2
        x_0_weight, x_t_weight = alpha_next * beta / sigma**2, kept * (sigma_next / sigma) ** 2
        spread = variance.sqrt(), variance.log(), beta.log()
        return cls(alpha, sigma, alpha_next, sigma_next, x_0_weight, x_t_weight, *spread)

    @classmethod
    def chain(cls, alpha: Float[Tensor, " n"], sigma: Float[Tensor, " n"]) -> "Transition":
        """The steps down a chain of ascending noise, each [n]: from every level to the one before, at last to the
        data."""
        alpha_next = torch.cat([alpha.new_ones(1), alpha[:-1]])
        sigma_next = torch.cat([sigma.new_zeros(1), sigma[:-1]])
        steps = cls.between(alpha, sigma, alpha_next, sigma_next)
        # The step to the data has no variance. Its logarithm, which the likelihood there needs, is taken from the step
        # above it, as in the published code.
        floor = steps.log_variance_min[1:2] if len(sigma) > 1 else steps.log_variance_max
        return steps._replace(log_variance_min=torch.cat([floor, steps.log_variance_min[1:]]))

    @property
    def contraction(self) -> Tensor:
        """`e^-rise`: 0 to the data, and from pure noise."""
        return self.alpha * self.sigma_next / (self.sigma * self.alpha_next)

    @property
    def rise(self) -> Tensor:
        """How far `log(alpha / sigma)` rises in the step; often called h."""
        return -self.contraction.log()

    def posterior_mean(self, x_0: Images, x_t: Images) -> Images:
        """Mean of `q(x_s | x_t, x_0)`."""
        return self.x_0_weight * x_0 + self.x_t_weight * x_t


AtLevel = Level | Transition  # whose upper end is one
