"""Coefficients of a path: alpha and sigma at a time, and a reverse step between two times with its posterior."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

Images = Float[Tensor, "b c h w"]
Output = Float[Tensor, "b c_out h w"]
Timesteps = Shaped[Tensor, " b"]
Labels = Int64[Tensor, " b"]


class Level(NamedTuple):
    """The coefficients of `x_t = alpha x_0 + sigma noise` at a time."""

    alpha: Tensor
    sigma: Tensor


class Transition(NamedTuple):
    """A reverse step from time t to an earlier time s; all coefficients follow from alpha and sigma at both.

    The posterior is `q(x_s | x_t, x_0) = N(x_0_weight x_0 + x_t_weight x_t, posterior_std^2)` (Ho et al. 2020, eq. 7;
    for any path, Kingma et al. 2021, appendix A). Coefficients are scalars or broadcast over `[b c h w]`.
    """

    alpha: Tensor  # at t
    sigma: Tensor
    alpha_next: Tensor  # at s
    sigma_next: Tensor
    x_0_weight: Tensor
    x_t_weight: Tensor
    posterior_std: Tensor  # 0 when s is the data
    log_variance_min: Tensor  # of the posterior; finite even where its variance is 0
    log_variance_max: Tensor  # log beta, of q(x_t | x_s)

    @classmethod
    def between(cls, alpha: Tensor, sigma: Tensor, alpha_next: Tensor, sigma_next: Tensor) -> "Transition":
        """Compute the step from (alpha, sigma) at t to (alpha_next, sigma_next) at s."""
        alpha_ratio = alpha / alpha_next  # q(x_t | x_s) = N(alpha_ratio x_s, beta)
        beta = sigma**2 - (alpha_ratio * sigma_next) ** 2
        variance = beta * (sigma_next / sigma) ** 2
        x_0_weight, x_t_weight = alpha_next * beta / sigma**2, alpha_ratio * (sigma_next / sigma) ** 2
        std, log_variance_min, log_variance_max = variance.sqrt(), variance.log(), beta.log()
        posterior = x_0_weight, x_t_weight, std, log_variance_min, log_variance_max
        return cls(alpha, sigma, alpha_next, sigma_next, *posterior)

    @classmethod
    def chain(cls, alpha: Float[Tensor, " n"], sigma: Float[Tensor, " n"]) -> "Transition":
        """Return the steps between levels of ascending noise, each coefficient [n]; the first leads to the data."""
        alpha_next = torch.cat([alpha.new_ones(1), alpha[:-1]])
        sigma_next = torch.cat([sigma.new_zeros(1), sigma[:-1]])
        steps = cls.between(alpha, sigma, alpha_next, sigma_next)
        # The step to the data has variance 0, but the likelihood there needs a finite log-variance: as in the
        # published code, it is that of the next step.
        floor = steps.log_variance_min[1:2] if len(sigma) > 1 else steps.log_variance_max
        return steps._replace(log_variance_min=torch.cat([floor, steps.log_variance_min[1:]]))

    @property
    def exp_neg_h(self) -> Tensor:
        """`e^-h`: 0 for a step to the data or from pure noise."""
        return self.alpha * self.sigma_next / (self.sigma * self.alpha_next)

    @property
    def h(self) -> Tensor:
        """The increase of `log(alpha / sigma)` in the step."""
        return -self.exp_neg_h.log()

    def posterior_mean(self, x_0: Images, x_t: Images) -> Images:
        """Return the mean of `q(x_s | x_t, x_0)`."""
        return self.x_0_weight * x_0 + self.x_t_weight * x_t


AtLevel = Level | Transition  # both have alpha and sigma at t
