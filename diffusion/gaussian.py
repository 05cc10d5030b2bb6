"""Discrete-time Gaussian diffusion (Ho et al. 2020) with learned variances (Nichol and Dhariwal 2021).

`q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I)`, `alpha_t^2 = alpha_bar_t = 1 - sigma_t^2`, for t in 0..T-1,
least noise first; the step from t = 0 leads to the data itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from diffusion.process import Denoiser, Prediction
from diffusion.schedules import SCHEDULES


class Transition(NamedTuple):
    """One reverse step, from time t to an earlier time s: float32 numbers that broadcast over `[b c h w]`."""

    alpha: Tensor  # at t
    sigma: Tensor
    alpha_next: Tensor  # at s
    sigma_next: Tensor
    x_0_weight: Tensor  # in the mean of q(x_s | x_t, x_0), Ho et al. 2020, eq. 7
    x_t_weight: Tensor
    posterior_std: Tensor  # of q(x_s | x_t, x_0); 0 when s is the data
    log_variance_min: Tensor  # of the posterior, kept finite
    log_variance_max: Tensor  # log beta


class Target(NamedTuple):
    """What a model is trained to put out, and how `x_0` and noise are read off an output."""

    target: Callable[[Tensor, Tensor, Transition], Tensor]  # of (x_0, noise, transition)
    x_0: Callable[[Tensor, Tensor, Transition], Tensor]  # of (output, x_t, transition)
    noise: Callable[[Tensor, Tensor, Transition], Tensor]


PREDICTIONS = {
    "epsilon": Target(  # Ho et al. 2020, eq. 14 and 15
        target=lambda x_0, noise, at: noise,
        x_0=lambda output, x_t, at: (x_t - at.sigma * output) / at.alpha,
        noise=lambda output, x_t, at: output,
    ),
    "x_0": Target(
        target=lambda x_0, noise, at: x_0,
        x_0=lambda output, x_t, at: output,
        noise=lambda output, x_t, at: (x_t - at.alpha * output) / at.sigma,
    ),
    "v": Target(  # Salimans and Ho 2022, appendix D
        target=lambda x_0, noise, at: at.alpha * noise - at.sigma * x_0,
        x_0=lambda output, x_t, at: at.alpha * x_t - at.sigma * output,
        noise=lambda output, x_t, at: at.sigma * x_t + at.alpha * output,
    ),
}

FIXED_LOG_VARIANCES: dict[str, Callable[[Transition], Tensor]] = {  # Ho et al. 2020, section 3.2
    "fixed_small": lambda at: at.log_variance_min,
    "fixed_large": lambda at: at.log_variance_max,
}
VARIANCES = ("learned_range", *FIXED_LOG_VARIANCES)


class GaussianDiffusion:
    """The process of DDPM and its descendants; its tables are computed in float64 and used in float32.

    Args:
        schedule: of the noise, by its name in `SCHEDULES`.
        num_timesteps: T.
        prediction: what the model puts out: `epsilon`, `x_0` or `v`.
        variance: of the reverse step. `learned_range` has the model interpolate, in log space, between the
            posterior variance and beta (Nichol and Dhariwal 2021, eq. 15); it doubles the model's output
            channels. `fixed_small` and `fixed_large` are these two bounds themselves.

    Raises:
        ValueError: for a name that is not in the tables, listing those that are, or too few timesteps.
    """

    def __init__(
        self,
        schedule: str = "linear",
        num_timesteps: int = 1000,
        prediction: str = "epsilon",
        variance: str = "learned_range",
    ) -> None:
        _check("schedule", schedule, SCHEDULES)
        _check("prediction", prediction, PREDICTIONS)
        _check("variance", variance, VARIANCES)
        if num_timesteps < 2:
            raise ValueError(f"--diffusion.num_timesteps {num_timesteps} must be at least 2")
        self.betas = SCHEDULES[schedule](num_timesteps)  # [T], float64
        if self.betas.max() >= 1:
            raise ValueError(
                f"--diffusion.num_timesteps {num_timesteps} is too few for the {schedule} schedule: beta "
                f"reaches {self.betas.max():.3g}; use more, or --diffusion.schedule cosine"
            )
        self.num_timesteps = num_timesteps
        self.prediction = prediction
        self.variance = variance
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)  # [T], float64
        self._tables: dict[torch.device, Tensor] = {}

    @property
    def learns_variance(self) -> bool:
        """Whether the model puts out a second half of channels that sets the variance."""
        return self.variance not in FIXED_LOG_VARIANCES

    def output_channels(self, in_channels: int) -> int:
        """Twice the channels of the data where the variance is learned, else the same."""
        return 2 * in_channels if self.learns_variance else in_channels

    # Times.

    def sample_timesteps(
        self, num: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Int64[Tensor, " num"]:
        """Training times, uniform on 0..T-1; the generator lies on `device`."""
        return torch.randint(self.num_timesteps, (num,), generator=generator, device=device)

    def timesteps(self, num_steps: int) -> Int64[Tensor, " num_steps"]:
        """The times of a shorter chain, ascending: evenly spread over 0..T-1, both ends included.

        A single step is taken from T-1, where the noise is.

        Raises:
            ValueError: when there are fewer timesteps than steps.
        """
        if not 1 <= num_steps <= self.num_timesteps:
            raise ValueError(f"--num_steps {num_steps} must lie in 1..{self.num_timesteps}, the training timesteps")
        if num_steps == 1:
            return torch.tensor([self.num_timesteps - 1])
        stride = (self.num_timesteps - 1) / (num_steps - 1)
        return torch.tensor([round(stride * i) for i in range(num_steps)])

    def transition(self, t: Int64[Tensor, " b"]) -> Transition:
        """The step from each `t` to `t - 1`, as `[b 1 1 1]` on `t`'s device."""
        if t.device not in self._tables:
            self._tables[t.device] = self._tabulate(torch.arange(self.num_timesteps)).to(t.device)
        return Transition(*rearrange(self._tables[t.device][t], "b k -> k b 1 1 1"))

    def reverse_steps(self, num_steps: int) -> list[tuple[int, Transition]]:
        """The respaced chain walked down to the data: each time, and the step from it to the next lower one.

        The numbers stay on the CPU as scalars, which a device takes with its kernels' arguments.
        """
        timesteps = self.timesteps(num_steps)
        rows = zip(timesteps.tolist(), self._tabulate(timesteps), strict=True)
        return [(t, Transition(*row)) for t, row in rows][::-1]

    def _tabulate(self, timesteps: Int64[Tensor, " n"]) -> Float32[Tensor, "n k"]:
        """The fields of `Transition` for each step down the chain of ascending `timesteps`."""
        now = self.alphas_cumprod[timesteps]
        then = torch.cat([now.new_ones(1), now[:-1]])
        beta = 1 - now / then
        variance = beta * (1 - then) / (1 - now)
        # The step to the data has no variance. Its logarithm, which the likelihood there needs, is taken from
        # the step above it, as in the published code.
        floor = variance[1:2] if len(timesteps) > 1 else beta
        table = Transition(
            alpha=now.sqrt(),
            sigma=(1 - now).sqrt(),
            alpha_next=then.sqrt(),
            sigma_next=(1 - then).sqrt(),
            x_0_weight=then.sqrt() * beta / (1 - now),
            x_t_weight=(now / then).sqrt() * (1 - then) / (1 - now),
            posterior_std=variance.sqrt(),
            log_variance_min=torch.cat([floor, variance[1:]]).log(),
            log_variance_max=beta.log(),
        )
        return torch.stack(table, dim=1).float()

    # Noise in, noise out.

    def q_sample(
        self, x_0: Float[Tensor, "b c h w"], t: Int64[Tensor, " b"], noise: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, "b c h w"]:
        """`x_t`, a draw from `q(x_t | x_0)` by way of unit normal `noise` (Ho et al. 2020, eq. 4)."""
        at = self.transition(t)
        return at.alpha * x_0 + at.sigma * noise

    def predict(
        self,
        output: Float[Tensor, "b c_out h w"],
        x_t: Float[Tensor, "b c h w"],
        t: Int64[Tensor, " b"],
        transition: Transition | None = None,
    ) -> Prediction:
        """What a raw model output says of `x_t`: `x_0`, `noise` and, where learned, the log-variance.

        The variance is that of the step from `t` to `t - 1`, or of another `transition` from `t`.
        """
        at = self.transition(t) if transition is None else transition
        raw, *share = output.float().chunk(2 if self.learns_variance else 1, dim=1)
        read = PREDICTIONS[self.prediction]
        x_0, noise = read.x_0(raw, x_t, at), read.noise(raw, x_t, at)
        if not share:
            return Prediction(x_0, noise)
        # The model's -1 is the smallest variance, its 1 the largest (Nichol and Dhariwal 2021, eq. 15).
        fraction = (share[0] + 1) / 2
        log_variance = fraction * at.log_variance_max + (1 - fraction) * at.log_variance_min
        return Prediction(x_0, noise, log_variance)

    def posterior_mean(
        self, x_0: Float[Tensor, "b c h w"], x_t: Float[Tensor, "b c h w"], transition: Transition
    ) -> Float[Tensor, "b c h w"]:
        """Mean of `q(x_s | x_t, x_0)` (Ho et al. 2020, eq. 7)."""
        return transition.x_0_weight * x_0 + transition.x_t_weight * x_t

    def reverse_log_variance(self, prediction: Prediction, transition: Transition) -> Tensor:
        """Log-variance of the model's own reverse step, learned or fixed."""
        if prediction.log_variance is not None:
            return prediction.log_variance
        return FIXED_LOG_VARIANCES[self.variance](transition)

    # The objective.

    def training_loss(
        self,
        model: Denoiser,
        x_0: Float[Tensor, "b c h w"],
        y: Int64[Tensor, " b"],
        *,
        t: Int64[Tensor, " b"] | None = None,
        noise: Float[Tensor, "b c h w"] | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Float32[Tensor, " b"]]:
        """Per-sample `loss`, `mse` and, where the variance is learned, `vb`; all in float32.

        `mse` is the simple loss (Ho et al. 2020, eq. 14). `vb` is the term of the variational bound at `t`,
        in bits per dimension, with the mean frozen: it trains the variance alone. The hybrid loss is
        `mse + T / 1000 * vb`: eq. 16 of Nichol and Dhariwal 2021 with their weight of 0.001, as `vb` is one
        of T terms of a sum. `t` and `noise` are drawn when not given, by a generator on `x_0`'s device.
        """
        if t is None:
            t = self.sample_timesteps(len(x_0), generator, x_0.device)
        if noise is None:
            noise = torch.randn(x_0.shape, generator=generator, device=x_0.device)
        x_0, noise = x_0.float(), noise.float()
        at = self.transition(t)
        x_t = self.q_sample(x_0, t, noise)
        output = model(x_t, t, y).float()

        raw, share = output.split([x_0.shape[1], output.shape[1] - x_0.shape[1]], dim=1)
        mse = _mean_per_sample((PREDICTIONS[self.prediction].target(x_0, noise, at) - raw).square())
        if not self.learns_variance:
            return {"loss": mse, "mse": mse}

        mean_frozen = torch.cat([raw.detach(), share], dim=1)
        vb = self._variational_bound(self.predict(mean_frozen, x_t, t), x_0, x_t, t)
        return {"loss": mse + self.num_timesteps / 1000 * vb, "mse": mse, "vb": vb}

    def _variational_bound(self, prediction: Prediction, x_0: Tensor, x_t: Tensor, t: Tensor) -> Float32[Tensor, " b"]:
        """`L_t` in bits per dimension (Ho et al. 2020, eq. 5): a divergence, or at t = 0 a likelihood."""
        at = self.transition(t)
        mean = self.posterior_mean(prediction.x_0, x_t, at)
        log_variance = self.reverse_log_variance(prediction, at)
        true_mean = self.posterior_mean(x_0, x_t, at)
        divergence = _mean_per_sample(_normal_kl(true_mean, at.log_variance_min, mean, log_variance))
        likelihood = _mean_per_sample(_discretized_log_likelihood(x_0, mean, 0.5 * log_variance))
        return torch.where(t == 0, -likelihood, divergence) / math.log(2)


def _check(flag: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise ValueError(f"--diffusion.{flag} {name}: unknown, choose from {', '.join(known)}")


def _mean_per_sample(values: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    return reduce(values, "b c h w -> b", "mean")


def _normal_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL divergence between normals, in nats, element by element."""
    ratio = torch.exp(log_variance - other_log_variance)
    distance = (mean - other_mean).square() * torch.exp(-other_log_variance)
    return 0.5 * (other_log_variance - log_variance + ratio + distance - 1)


def _discretized_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-probability, in nats, of `x` in bins of 2/255 over [-1, 1], open at the ends (Ho et al., eq. 13).

    The normal distribution function is the tanh approximation that published results were computed with.
    """

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    inverse_std = torch.exp(-log_std)
    upper = cdf(inverse_std * (x - mean + 1 / 255))
    lower = cdf(inverse_std * (x - mean - 1 / 255))
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()
