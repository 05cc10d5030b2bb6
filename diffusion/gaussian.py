"""Discrete-time Gaussian diffusion (Ho et al. 2020) with learned variances (Nichol and Dhariwal 2021).

`q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)`, `t` in `0..T-1`, least noise first.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from diffusion.process import Denoiser, Prediction
from diffusion.schedules import SCHEDULES

VARIANCES = ("learned_range", "fixed_small", "fixed_large")


class GaussianDiffusion:
    """The process of the paper, with its tables in float64.

    Args:
        schedule: name in `SCHEDULES`.
        num_timesteps: T.
        prediction: what the model puts out: `epsilon`, `x_0` or `v`.
        variance: of the reverse step: `learned_range` interpolates between the two bounds in log space (Nichol and
            Dhariwal 2021, eq. 15) and trains with the hybrid loss (eq. 16); `fixed_small` and `fixed_large` are the
            bounds themselves.

    Raises:
        ValueError: for a name that is not in the tables, listing those that are.
    """

    def __init__(
        self,
        schedule: str = "linear",
        num_timesteps: int = 1000,
        prediction: str = "epsilon",
        variance: str = "learned_range",
    ) -> None:
        _check("schedule", schedule, SCHEDULES)
        _check("prediction", prediction, TO_X_0)
        _check("variance", variance, VARIANCES)
        if num_timesteps < 2:
            raise ValueError(f"--diffusion.num_timesteps {num_timesteps} must be at least 2")
        self.num_timesteps, self.prediction, self.variance = num_timesteps, prediction, variance
        self.betas: Float64[Tensor, " T"] = SCHEDULES[schedule](num_timesteps)
        self.alphas_cumprod: Float64[Tensor, " T"] = torch.cumprod(1 - self.betas, dim=0)
        # One entry more at the end, so that the index -1 means "before the first step": no noise at all.
        self._alpha_bar = torch.cat([self.alphas_cumprod, torch.ones(1, dtype=torch.float64)])

    @property
    def learns_variance(self) -> bool:
        """Whether the model puts out a second half of channels that sets the variance."""
        return self.variance == "learned_range"

    def output_channels(self, channels: int) -> int:
        """Twice the channels where the variance is learned."""
        return 2 * channels if self.learns_variance else channels

    def sample_timesteps(
        self, num: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Int64[Tensor, " num"]:
        """Uniform training timesteps."""
        return torch.randint(self.num_timesteps, (num,), generator=generator, device=device)

    def timesteps(self, num_steps: int) -> Int64[Tensor, " num_steps"]:
        """The respaced original timesteps, ascending: evenly spread, first and last included.

        Raises:
            ValueError: when there are fewer timesteps than steps.
        """
        if not 1 <= num_steps <= self.num_timesteps:
            raise ValueError(f"--num_steps {num_steps} must lie in 1..{self.num_timesteps}")
        stride = (self.num_timesteps - 1) / max(1, num_steps - 1)
        if num_steps == 1:
            return torch.tensor([self.num_timesteps - 1])
        return torch.tensor([round(stride * i) for i in range(num_steps)])

    def q_sample(
        self, x_0: Float[Tensor, "b c h w"], t: Int64[Tensor, " b"], noise: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, "b c h w"]:
        """Draw from `q(x_t | x_0)` (Ho et al. 2020, eq. 4)."""
        alpha_bar = self.alpha_bar(t)
        return alpha_bar.sqrt().float() * x_0 + (1 - alpha_bar).sqrt().float() * noise

    def predict(
        self,
        output: Float[Tensor, "b c_out h w"],
        x_t: Float[Tensor, "b c h w"],
        t: Int64[Tensor, " b"],
        previous: Int64[Tensor, " b"] | None = None,
    ) -> Prediction:
        """What a raw model output says of `x_t`; `previous` is the time the reverse step goes to (default t - 1)."""
        previous = t - 1 if previous is None else previous
        raw, *fraction = output.float().chunk(2 if self.learns_variance else 1, dim=1)
        alpha_bar = self.alpha_bar(t)
        alpha, sigma = alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()
        x_0 = TO_X_0[self.prediction](raw, x_t, alpha, sigma)
        noise = raw if self.prediction == "epsilon" else (x_t - alpha * x_0) / sigma
        if not fraction:
            return Prediction(x_0, noise, None)
        smallest, largest = self._log_variance_bounds(t, previous)
        share = (fraction[0] + 1) / 2
        return Prediction(x_0, noise, share * largest.float() + (1 - share) * smallest.float())

    def posterior(
        self,
        x_0: Float[Tensor, "b c h w"],
        x_t: Float[Tensor, "b c h w"],
        t: Int64[Tensor, " b"],
        previous: Int64[Tensor, " b"],
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b 1 1 1"]]:
        """Mean and log-variance of `q(x_previous | x_t, x_0)` (Ho et al. 2020, eq. 6 and 7), any stride."""
        now, then = self.alpha_bar(t), self.alpha_bar(previous)
        step = now / then  # the alpha of the stride
        weight_x_0 = then.sqrt() * (1 - step) / (1 - now)
        weight_x_t = step.sqrt() * (1 - then) / (1 - now)
        return weight_x_0.float() * x_0 + weight_x_t.float() * x_t, self._log_variance_bounds(t, previous)[0].float()

    def reverse_log_variance(
        self, prediction: Prediction, t: Int64[Tensor, " b"], previous: Int64[Tensor, " b"]
    ) -> Tensor:
        """Log-variance of the model's own reverse step, learned or fixed."""
        if prediction.log_variance is not None:
            return prediction.log_variance
        smallest, largest = self._log_variance_bounds(t, previous)
        return (smallest if self.variance == "fixed_small" else largest).float()

    def training_loss(
        self,
        model: Denoiser,
        x_0: Float[Tensor, "b c h w"],
        y: Int64[Tensor, " b"],
        *,
        t: Int64[Tensor, " b"] | None = None,
        noise: Float[Tensor, "b c h w"] | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Float[Tensor, " b"]]:
        """Per-sample `loss = mse (+ vb)`: the hybrid loss of Nichol and Dhariwal 2021, eq. 16.

        `vb` is the term of the variational bound in bits per dimension; its gradient reaches the variance alone.
        Published code weighs it by `T / 1000`.
        """
        if t is None:
            t = self.sample_timesteps(len(x_0), generator=generator, device=x_0.device)
        if noise is None:
            noise = torch.randn(x_0.shape, generator=generator, device=x_0.device)
        x_t = self.q_sample(x_0, t, noise)
        output = model(x_t, t, y).float()
        raw = output[:, : x_0.shape[1]]
        target = {"epsilon": noise, "x_0": x_0, "v": self._velocity(x_0, noise, t)}[self.prediction]
        mse = _mean_per_sample((target - raw).square())
        if not self.learns_variance:
            return {"loss": mse, "mse": mse}
        frozen = torch.cat([raw.detach(), output[:, x_0.shape[1] :]], dim=1)
        vb = self._variational_bound(frozen, x_0, x_t, t)
        return {"loss": mse + vb * (self.num_timesteps / 1000), "mse": mse, "vb": vb}

    def _velocity(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """`v = alpha noise - sigma x_0` (Salimans and Ho 2022, appendix D)."""
        alpha_bar = self.alpha_bar(t)
        return alpha_bar.sqrt().float() * noise - (1 - alpha_bar).sqrt().float() * x_0

    def _variational_bound(self, output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """`L_t` in bits per dimension (Ho et al. 2020, eq. 5): a KL divergence, the likelihood of `x_0` at t = 0."""
        true_mean, true_log_variance = self.posterior(x_0, x_t, t, t - 1)
        prediction = self.predict(output, x_t, t)
        mean, _ = self.posterior(prediction.x_0, x_t, t, t - 1)
        log_variance = self.reverse_log_variance(prediction, t, t - 1)
        divergence = _normal_kl(true_mean, true_log_variance, mean, log_variance)
        likelihood = _discretized_log_likelihood(x_0, mean, 0.5 * log_variance)
        return torch.where(t == 0, -_mean_per_sample(likelihood), _mean_per_sample(divergence)) / math.log(2)

    def _log_variance_bounds(self, t: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of the posterior variance and of beta, for the stride from `t` to `previous`.

        The posterior of the very first step has no variance; its logarithm is taken from the second step, as in the
        published code.
        """
        now, then = self.alpha_bar(t), self.alpha_bar(previous)
        beta = 1 - now / then
        second = 1 - self._alpha_bar[1] / self._alpha_bar[0]
        floor = second * (1 - self._alpha_bar[0]) / (1 - self._alpha_bar[1])
        variance = beta * (1 - then) / (1 - now)
        variance = torch.where(then == 1, floor.to(variance.device), variance)
        return variance.log(), beta.log()

    def alpha_bar(self, t: Int64[Tensor, " b"]) -> Float64[Tensor, "b 1 1 1"]:
        """`alpha_bar_t`, and 1 at t = -1: the data."""
        if self._alpha_bar.device != t.device:
            self._alpha_bar = self._alpha_bar.to(t.device)
        return rearrange(self._alpha_bar[t], "b -> b 1 1 1")


def _epsilon_to_x_0(raw: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return (x_t - sigma * raw) / alpha


def _x_0_to_x_0(raw: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return raw


def _v_to_x_0(raw: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return alpha * x_t - sigma * raw


TO_X_0 = {"epsilon": _epsilon_to_x_0, "x_0": _x_0_to_x_0, "v": _v_to_x_0}


def _check(flag: str, name: str, known) -> None:
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
    """Log-probability of `x` in bins of 1/127.5 over [-1, 1], open at the ends (Ho et al. 2020, eq. 13).

    The normal distribution function is the tanh approximation that published results were computed with.
    """

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    inverse_std = torch.exp(-log_std)
    upper = cdf(inverse_std * (x - mean + 1 / 255))
    lower = cdf(inverse_std * (x - mean - 1 / 255))
    inside = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return inside.clamp(min=1e-12).log()
