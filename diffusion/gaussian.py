"""Discrete-time Gaussian diffusion (Ho et al. 2020) with learned variances (Nichol and Dhariwal 2021).

`q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I)`, `alpha_t^2 = alpha_bar_t = 1 - sigma_t^2`, for t in 0..T-1,
least noise first; the step from t = 0 leads to the data itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from jaxtyping import Float, Float32, Int64, Shaped
from torch import Tensor

from diffusion.bound import discretized_log_likelihood, normal_kl
from diffusion.diffusion import Denoiser, Diffusion, Prediction, mean_per_sample
from diffusion.float64 import exact
from diffusion.predictions import PREDICTIONS, AtLevel, Level
from diffusion.schedules import SCHEDULES, check_name, with_zero_terminal_snr
from diffusion.times import TIMES, LossSecondMoments, Times, check_model_times
from diffusion.transition import Transition

FIXED_LOG_VARIANCES: dict[str, Callable[[Transition], Tensor]] = {  # Ho et al. 2020, section 3.2
    "fixed_small": lambda at: at.log_variance_min,
    "fixed_large": lambda at: at.log_variance_max,
}
VARIANCES = ("learned_range", *FIXED_LOG_VARIANCES)


def bound_weight(snr: Tensor, snr_next: Tensor) -> Tensor:
    """The variational bound, in nats: T terms of a sum (Kingma et al. 2021, eq. 14). The one at t = 0 is a likelihood,
    which has no such weight; it counts like t = 1."""
    weight = 0.5 * len(snr) * (snr_next - snr)
    return torch.cat([weight[1:2], weight[1:]])


WEIGHTINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # What the squared error of x_0 counts, as a function of SNR(t) and of SNR(t - 1), which is infinite at t = 0.
    "min_snr": lambda snr, snr_next: snr.clamp(max=5),  # Hang et al. 2023, gamma = 5
    "p2": lambda snr, snr_next: snr / (1 + snr),  # Choi et al. 2022, k = gamma = 1
    "vlb": bound_weight,
}


class GaussianDiffusion(Diffusion):
    """The diffusion of DDPM and its descendants; its tables are computed in float64 and used in float32.

    Args:
        schedule: of the noise, by its name in `SCHEDULES`.
        num_timesteps: T.
        prediction: what the model puts out: `epsilon`, `x_0` or `v`.
        variance: of the reverse step. `learned_range` has the model interpolate, in log space, between the
            posterior variance and beta (Nichol and Dhariwal 2021, eq. 15); it doubles the model's output
            channels. `fixed_small` and `fixed_large` are these two bounds themselves.
        weighting: of the squared error: `uniform`, or a name in `WEIGHTINGS`.
        times: at which the model is trained, by name in `TIMES`, or `importance`: as the square root of the loss's
            second moment there (Nichol and Dhariwal 2021, eq. 18).
        zero_terminal_snr: rescale the schedule so that T-1 is pure noise (Lin et al. 2023, algorithm 1).
        model_times: what the backbone is given at 0 and at T-1, where that is not the time itself.

    Raises:
        ValueError: for a name that is not in the tables, listing those that are, too few timesteps, or a
            prediction that says nothing of the data at T-1.
    """

    default_sampler = "ddpm"

    def __init__(
        self,
        schedule: str = "linear",
        num_timesteps: int = 1000,
        prediction: str = "epsilon",
        variance: str = "learned_range",
        weighting: str = "uniform",
        times: str = "uniform",
        zero_terminal_snr: bool = False,
        model_times: Sequence[float] | None = None,
    ) -> None:
        check_name("schedule", schedule, SCHEDULES)
        check_name("prediction", prediction, PREDICTIONS)
        check_name("variance", variance, VARIANCES)
        check_name("weighting", weighting, ("uniform", *WEIGHTINGS))
        check_name("times", times, (*TIMES, "importance"))
        if num_timesteps < 2:
            raise ValueError(f"--diffusion.num_timesteps {num_timesteps} must be at least 2")
        self.betas = SCHEDULES[schedule](num_timesteps)  # [T], float64
        if self.betas.max() >= 1:
            raise ValueError(
                f"--diffusion.num_timesteps {num_timesteps} is too few for the {schedule} schedule: beta "
                f"reaches {self.betas.max():.3g}; use more, or --diffusion.schedule cosine"
            )
        if zero_terminal_snr and prediction == "epsilon":
            raise ValueError(
                "--diffusion.zero_terminal_snr true: x_t at T-1 is then the noise itself, and predicting that says "
                "nothing of the data; use --diffusion.prediction v or x_0"
            )
        if zero_terminal_snr:
            self.betas = with_zero_terminal_snr(self.betas)
        self.num_timesteps = num_timesteps
        self.prediction = prediction
        self.variance = variance
        self.weighting = weighting
        self.times_name = times
        self.model_times = None if model_times is None else check_model_times(model_times)
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)  # [T], float64
        self.max_time = num_timesteps - 1
        self._angle = torch.atan2((1 - self.alphas_cumprod).sqrt(), self.alphas_cumprod.sqrt())  # [T], up to pi / 2
        ratios = self._angle[self.alphas_cumprod > 0].tan()
        self.noise_range = (ratios[0].item(), ratios[-1].item())
        self._tables: dict[torch.device, Tensor] = {}

    @property
    def learns_variance(self) -> bool:
        """Whether the model puts out a second half of channels that sets the variance."""
        return self.variance not in FIXED_LOG_VARIANCES

    def output_channels(self, in_channels: int) -> int:
        """Twice the channels of the data where the variance is learned, else the same."""
        return 2 * in_channels if self.learns_variance else in_channels

    # Times.

    def precondition(self, model: Denoiser) -> Denoiser:
        """The backbone is given the time itself, or `model_times`."""
        if self.model_times is None:
            return model
        first, last = self.model_times
        rate = (last - first) / self.max_time
        return lambda x_t, t, y, **extras: model(x_t, first + rate * t, y, **extras)

    def sample_timesteps(
        self, num: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Int64[Tensor, " num"]:
        """Training times on 0..T-1, before anything is known of the losses; the generator lies on `device`."""
        if self.times_name in ("uniform", "importance"):
            return torch.randint(self.num_timesteps, (num,), generator=generator, device=device)
        return (TIMES[self.times_name](num, generator, device) * self.num_timesteps).long()

    def times(self) -> Times:
        """What draws the times of training steps."""
        if self.times_name == "importance":
            return LossSecondMoments(self.num_timesteps)
        return Times(self.sample_timesteps)

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

    def path(self, t: Shaped[Tensor, "*n"]) -> Level:
        """`alpha = cos(angle)` and `sigma = sin(angle)`, in float64, on the CPU where `t`'s device has none. Between
        the chain's times the angle is linear."""
        t = exact(t)
        below = t.long().clamp(max=self.num_timesteps - 2)
        table = self._angle.to(t.device)
        angle = torch.lerp(table[below], table[below + 1], t - below)
        return Level(angle.cos(), angle.sin())

    def time_at(self, ratio: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The inverse of `path`, as a function of sigma / alpha."""
        angle = ratio.double().atan()
        above = torch.searchsorted(self._angle, angle).clamp(1, self.num_timesteps - 1)
        low, high = self._angle[above - 1], self._angle[above]
        return above - 1 + ((angle - low) / (high - low)).clamp(0, 1)

    def noise_rank(self, t: Shaped[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The share `t / T` of the chain's length."""
        return t / self.num_timesteps

    def transition(self, t: Int64[Tensor, " b"]) -> Transition:
        """The step from each `t` to `t - 1`, in float32 as `[b 1 1 1]` on `t`'s device."""
        *transition, _ = self._at(t)
        return Transition(*transition)

    def levels(self, t: Shaped[Tensor, " b"]) -> Level:
        """`alpha` and `sigma` in float32 as `[b 1 1 1]`: looked up at the chain's own times."""
        return super().levels(t) if t.is_floating_point() else Level(*self._at(t)[:2])

    def loss_weight(self, t: Int64[Tensor, " b"]) -> Float32[Tensor, " b"]:
        """What the squared error of the output at `t` counts, as the weighting says."""
        return self._at(t)[-1].flatten()

    def _at(self, t: Int64[Tensor, " b"]) -> Tensor:
        """Everything that is tabulated, at `t`."""
        if t.device not in self._tables:
            self._tables[t.device] = self._tabulate().float().to(t.device)
        return rearrange(self._tables[t.device][t], "b k -> k b 1 1 1")

    def _tabulate(self) -> Tensor:
        """The full chain's transitions and weights [T k]."""
        chain = Transition.chain(*self.path(torch.arange(self.num_timesteps)))
        if self.weighting == "uniform":
            return torch.stack([*chain, torch.ones_like(self.betas)], dim=1)
        snr, snr_next = (chain.alpha / chain.sigma) ** 2, (chain.alpha_next / chain.sigma_next) ** 2
        weight = WEIGHTINGS[self.weighting](snr, snr_next) * PREDICTIONS[self.prediction].x_0_error(chain)
        return torch.stack([*chain, weight], dim=1)

    # Noise in, noise out.

    def target(
        self, x_0: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], t: Shaped[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        """What a perfect model puts out, without its variance."""
        return PREDICTIONS[self.prediction].target(x_0, noise, self.levels(t))

    def read(
        self, raw: Float[Tensor, "b c h w"], x_t: Float[Tensor, "b c h w"], at: AtLevel
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        """`x_0` and noise, by what the backbone predicts."""
        return PREDICTIONS[self.prediction].x_0(raw, x_t, at), PREDICTIONS[self.prediction].noise(raw, x_t, at)

    def predict(
        self,
        output: Float[Tensor, "b c_out h w"],
        x_t: Float[Tensor, "b c h w"],
        t: Shaped[Tensor, " b"],
        transition: Transition | None = None,
    ) -> Prediction:
        """What a raw model output says of `x_t`: `x_0`, `noise` and, where learned, the log-variance.

        The variance is that of the step from `t` to `t - 1`, or of another `transition` from `t`.
        """
        at = self.transition(t) if transition is None else transition
        raw, *share = output.to(x_t.dtype).chunk(2 if self.learns_variance else 1, dim=1)
        x_0, noise = self.read(raw, x_t, at)
        if not share:
            return Prediction(x_0, noise)
        # The model's -1 is the smallest variance, its 1 the largest (Nichol and Dhariwal 2021, eq. 15).
        fraction = (share[0] + 1) / 2
        log_variance = fraction * at.log_variance_max + (1 - fraction) * at.log_variance_min
        return Prediction(x_0, noise, log_variance)

    def reverse_log_variance(self, prediction: Prediction, transition: Transition) -> Tensor:
        """Log-variance of the model's own reverse step, learned or fixed."""
        if prediction.log_variance is not None:
            return prediction.log_variance
        return FIXED_LOG_VARIANCES[self.variance](transition)

    def reverse_std(self, prediction: Prediction, transition: Transition) -> Tensor:
        """The same as a standard deviation."""
        return torch.exp(0.5 * self.reverse_log_variance(prediction, transition))

    # The objective.

    def terms(
        self,
        output: Float[Tensor, "b c_out h w"],
        x_0: Float[Tensor, "b c h w"],
        x_t: Float[Tensor, "b c h w"],
        t: Int64[Tensor, " b"],
        noise: Float[Tensor, "b c h w"],
    ) -> dict[str, Float32[Tensor, " b"]]:
        """`loss`, `mse` and, where the variance is learned, `vb`.

        `mse` is the simple loss (Ho et al. 2020, eq. 14), which the weighting weighs. `vb` is the term of the
        variational bound at `t`, in bits per dimension, with the mean frozen: it trains the variance alone. The hybrid
        loss is `mse + T / 1000 * vb`: eq. 16 of Nichol and Dhariwal 2021 with their weight of 0.001, as `vb` is one
        of T terms of a sum.
        """
        raw, share = output.split([x_0.shape[1], output.shape[1] - x_0.shape[1]], dim=1)
        terms = super().terms(raw, x_0, x_t, t, noise)
        if not self.learns_variance:
            return terms
        mean_frozen = torch.cat([raw.detach(), share], dim=1)
        vb = self._variational_bound(self.predict(mean_frozen, x_t, t), x_0, x_t, t)
        return {**terms, "loss": terms["loss"] + self.num_timesteps / 1000 * vb, "vb": vb}

    def _variational_bound(self, prediction: Prediction, x_0: Tensor, x_t: Tensor, t: Tensor) -> Float32[Tensor, " b"]:
        """`L_t` in bits per dimension (Ho et al. 2020, eq. 5): a divergence, or at t = 0 a likelihood."""
        at = self.transition(t)
        mean = at.posterior_mean(prediction.x_0, x_t)
        log_variance = self.reverse_log_variance(prediction, at)
        true_mean = at.posterior_mean(x_0, x_t)
        divergence = mean_per_sample(normal_kl(true_mean, at.log_variance_min, mean, log_variance))
        likelihood = mean_per_sample(discretized_log_likelihood(x_0, mean, 0.5 * log_variance))
        return torch.where(t == 0, -likelihood, divergence) / math.log(2)
