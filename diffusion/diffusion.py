"""A diffusion: what a model learns of data and noise along a path between them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from einops import reduce
from jaxtyping import Float, Float32, Shaped
from torch import Tensor

from diffusion.options import SamplingOptions
from diffusion.paths import GaussianChain, Path
from diffusion.predictions import PREDICTIONS
from diffusion.spacings import spaced_times
from diffusion.times import Device, DrawTimes
from diffusion.transition import AtLevel, Images, Labels, Output, Timesteps, Transition
from settings import check_name

Denoiser = Callable[..., Tensor]
"""A backbone, guided or not: a pure function of `(x_t [b c h w], t [b], y [b], **extras)`."""

Step = tuple[int | float, Transition]
"""A time at which a sampler calls the model, and the step from it to the next lower one."""

NOTHING: Mapping[str, Any] = MappingProxyType({})


class Prediction(NamedTuple):
    """The one currency between model and sampler: what a raw model output says of `x_t`."""

    x_0: Images
    noise: Images
    log_variance: Images | None = None  # of the reverse step, where the model learns it

    def clipped(self, limit: float, x_t: Images, at: AtLevel) -> "Prediction":
        """With `x_0` cut to what data can be, and the noise that this leaves."""
        x_0 = self.x_0.clamp(-limit, limit)
        return self._replace(x_0=x_0, noise=(x_t - at.alpha * x_0) / at.sigma)


class Auxiliary(NamedTuple):
    """A further term of the loss, of what the model says of the data."""

    name: str
    weight: float
    term: Callable[[Tensor, Tensor, Tensor], Tensor]  # (predicted x_0, x_0, y) -> [b]
    is_fixed: bool = True  # or it changes with training, so that its values at two steps do not compare


FIXED_LOG_VARIANCES: dict[str, Callable[[Transition], Tensor]] = {  # Ho et al. 2020, section 3.2
    "fixed_small": lambda at: at.log_variance_min,
    "fixed_large": lambda at: at.log_variance_max,
}
VARIANCES = ("learned_range", *FIXED_LOG_VARIANCES)


def snr(path: Path, t: Tensor) -> Tensor:
    at = path.levels(t)
    return (at.alpha / at.sigma) ** 2


def bound_weight(path: Path, t: Tensor) -> Tensor:
    """The variational bound of a chain, in nats: T terms of a sum (Kingma et al. 2021, eq. 14); t = 0 counts like 1."""
    assert isinstance(path, GaussianChain)
    at = path.transition(t.clamp(min=1))
    return 0.5 * path.num_timesteps * at.x_0_weight**2 * torch.exp(-at.log_variance_min)


WEIGHTINGS: dict[str, Callable[[Path, Tensor], Tensor]] = {
    # What the squared error of x_0 counts at a time, [b 1 1 1].
    "min_snr": lambda path, t: snr(path, t).clamp(max=5),  # Hang et al. 2023, gamma = 5
    "p2": lambda path, t: snr(path, t) / (1 + snr(path, t)),  # Choi et al. 2022, k = gamma = 1
    "vlb": bound_weight,
}


class Diffusion:
    """A path `x_t = alpha(t) x_0 + sigma(t) noise`, what a model puts out for `x_t`, and what its error counts.

    Args:
        path: from data to noise; times are its own.
        prediction: what the model puts out: a name in `PREDICTIONS`, or of the path's own `targets`.
        loss: the target that the squared error is counted in, by the same names; by default the prediction.
        times: draws training times: `(num, generator, device) -> [num]`.
        weighting: a name in `WEIGHTINGS`: what the squared error of `x_0` counts, whatever is predicted; in place of
            `loss`.
        variance: of the reverse step. `learned_range` has the model interpolate, in log space, between the posterior
            variance and beta (Nichol and Dhariwal 2021, eq. 15), for which it has twice the channels; of a chain.
            `fixed_small` and `fixed_large` are these two bounds themselves.
        uncertainty: have the model say in one more channel, of which the mean over the image counts, the logarithm u of
            the error it expects; the loss is then `mse / e^u + u`, least where u is log mse (Kendall et al. 2018;
            Karras et al. 2024, eq. 21, where u is a small network's and knows sigma alone). The best prediction stays
            the same.
        contrast: weight, below 1, that the distance to another sample's velocity has against that to the own one
            (contrastive flow matching, Stoica et al. 2025), where the loss is given a `negative`.
        default_sampler: where none is named.
        default_spacing: where none is named.
        samplers: where these alone can sample it.
    """

    guided_samplers: Sequence[str] = ()  # whose samples are guided as it was trained
    guidance_settings = ""  # by which it learns guidance, away from the null label

    def __init__(
        self,
        path: Path,
        prediction: str,
        loss: str | None = None,
        *,
        times: DrawTimes,
        weighting: str = "uniform",
        variance: str = "fixed_small",
        uncertainty: bool = False,
        contrast: float = 0.0,
        default_sampler: str = "euler",
        default_spacing: str = "uniform",
        samplers: Mapping[str, Callable[..., Iterator[tuple[Tensor, Tensor]]]] = NOTHING,
    ) -> None:
        targets = {**PREDICTIONS, **path.targets}
        check_name("--diffusion.prediction", prediction, targets)
        check_name("--diffusion.loss", loss or prediction, targets)
        check_name("--diffusion.variance", variance, VARIANCES)
        check_name("--diffusion.weighting", weighting, ("uniform", *WEIGHTINGS))
        if weighting != "uniform" and loss not in (None, prediction):
            raise ValueError(f"--diffusion.loss {loss} beside --diffusion.weighting {weighting}: leave one of them out")
        self.path, self.prediction, self.loss, self.weighting = path, prediction, loss or prediction, weighting
        if contrast and prediction != "velocity":
            raise ValueError(
                f"--diffusion.contrast {contrast}: is not for --diffusion.prediction {prediction}; leave it out"
            )
        self.variance, self.uncertainty, self.contrast = variance, uncertainty, contrast
        self._draw_times = times
        self.default_sampler, self.default_spacing, self.samplers = default_sampler, default_spacing, samplers
        self._target, self._loss_target = targets[prediction], targets[self.loss]
        self._informative = path.time_at(torch.tensor(path.noise_range, dtype=torch.float64)).tolist()

    @property
    def learns_variance(self) -> bool:
        """Whether the model puts out a second half of channels that sets the variance."""
        return self.variance not in FIXED_LOG_VARIANCES

    def output_channels(self, in_channels: int) -> int:
        """Channels that the backbone has to put out for data of `in_channels`."""
        return in_channels * (1 + self.learns_variance) + self.uncertainty

    # Times.

    def sample_timesteps(
        self, num: int, generator: torch.Generator | None = None, device: Device = "cpu"
    ) -> Shaped[Tensor, " num"]:
        return self._draw_times(num, generator, device)

    def reverse_steps(self, num_steps: int, spacing: str | None = None) -> list[Step]:
        """The chain that a sampler walks down to the data, in float64 scalars on the CPU. Where the noise is predicted,
        which says nothing of the data at pure noise, it starts at the path's largest finite ratio."""
        times = spaced_times(self.path, num_steps, spacing or self.default_spacing)
        if self._target.data is None and not self.path(times[-1:]).alpha > 0:
            times[-1] = self._informative[1]
        chain = Transition.chain(*self.path(times))
        steps = [Transition(*numbers) for numbers in zip(*chain, strict=True)]
        return list(zip(times.tolist(), steps, strict=True))[::-1]

    def check_options(self, options: SamplingOptions) -> None:
        """Refuses what its own sampler cannot do, naming the flag."""

    # Noise in, noise out.

    def q_sample(self, x_0: Images, t: Timesteps, noise: Images) -> Images:
        """`x_t`, a draw from `q(x_t | x_0)` by way of unit normal `noise`."""
        alpha, sigma = self.path.levels(t)
        return alpha * x_0 + sigma * noise

    def precondition(self, model: Denoiser) -> Denoiser:
        """The model as a function of the path's own `x_t` and `t`; extras pass through."""

        def preconditioned(x_t: Tensor, t: Tensor, y: Tensor, **extras: Any) -> Tensor:
            return model(*self.path.told(x_t, t), y, **extras)

        return preconditioned

    def target(self, x_0: Images, noise: Images, t: Timesteps) -> Images:
        """What a perfect model puts out for `x_t` made of this `x_0` and `noise`, without its variance."""
        return self._target.of(x_0, noise, self.path.levels(t))

    def read(self, raw: Images, x_t: Images, at: AtLevel) -> tuple[Images, Images]:
        """`x_0` and noise, off a raw output for `x_t`: the inverse of `target`."""
        return self._target.read(raw, x_t, at)

    def predict(self, output: Output, x_t: Images, t: Timesteps, transition: Transition | None = None) -> Prediction:
        """What a raw output says of `x_t`; the variance is that of the step to `t - 1` or of `transition`."""
        channels, output = x_t.shape[1], output.to(x_t.dtype)
        raw = output[:, :channels]
        if not self.learns_variance:
            return Prediction(*self.read(raw, x_t, self.path.levels(t) if transition is None else transition))
        at = self._transition(t) if transition is None else transition
        # The model's -1 is the smallest variance, its 1 the largest (Nichol and Dhariwal 2021, eq. 15).
        fraction = (output[:, channels : 2 * channels] + 1) / 2
        log_variance = fraction * at.log_variance_max + (1 - fraction) * at.log_variance_min
        return Prediction(*self.read(raw, x_t, at), log_variance)

    def reverse_log_variance(self, prediction: Prediction, transition: Transition) -> Tensor:
        """Log-variance of the model's own reverse step, learned or fixed."""
        if prediction.log_variance is not None:
            return prediction.log_variance
        return FIXED_LOG_VARIANCES[self.variance](transition)

    # The objective.

    def training_loss(
        self,
        model: Denoiser,
        x_0: Images,
        y: Labels,
        *,
        t: Timesteps | None = None,
        noise: Images | None = None,
        generator: torch.Generator | None = None,
        auxiliary: Sequence[Auxiliary] = (),
        extras: Mapping[str, Any] = NOTHING,
        negative: Float[Tensor, "b 2 c h w"] | None = None,
    ) -> dict[str, Float32[Tensor, " b"]]:
        """Per-sample `loss`, which is to be minimised, and the terms that it is made of, all in float32.

        `t` and `noise` are drawn when not given, by a generator on `x_0`'s device. An `auxiliary` term counts as the
        signal's share `alpha^2 / (alpha^2 + sigma^2)` says. The model is called with `extras` beside (x_t, t, y). A
        `negative` is `x_0` and noise of another sample for each, which `contrast` is to.
        """
        t, noise = self.draw(x_0, t, noise, generator)
        x_0 = x_0.float()
        x_t = self.q_sample(x_0, t, noise)
        output = self.precondition(model)(x_t, t, y, **extras).float()
        terms = self.terms(output, x_0, x_t, t, noise)
        if negative is not None:
            other, other_noise = negative.float().unbind(dim=1)
            distance = mean_per_sample((self.target(other, other_noise, t) - output).square())
            terms |= {"loss": terms["loss"] - self.contrast * self.loss_weight(t) * distance, "negative_mse": distance}
        if auxiliary:
            terms = with_auxiliary(terms, auxiliary, self.predict(output, x_t, t).x_0, x_0, y, self.signal_share(t))
        return terms

    def draw_more(
        self, shape: Sequence[int], generator: torch.Generator | None = None, device: Device = "cpu"
    ) -> dict[str, Tensor]:
        """What the loss is given by name beside times and noise, for a batch of this shape."""
        return {}

    def draw(
        self, x_0: Tensor, t: Tensor | None, noise: Tensor | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        if t is None:
            t = self.sample_timesteps(len(x_0), generator, x_0.device)
        if noise is None:
            noise = torch.randn(x_0.shape, generator=generator, device=x_0.device)
        return t, noise.float()

    def terms(
        self, output: Output, x_0: Images, x_t: Images, t: Timesteps, noise: Images
    ) -> dict[str, Float32[Tensor, " b"]]:
        """`loss`, `mse`, the squared error of the model's output, and where they are learned `vb` and `uncertainty`.

        `mse` is the simple loss (Ho et al. 2020, eq. 14), `vb` the bound's term at `t` in bits per dimension, with the
        mean frozen. The hybrid loss is `mse + T / 1000 * vb`: eq. 16 of Nichol and Dhariwal 2021, as `vb` is one of T
        terms.
        """
        channels = x_0.shape[1]
        mse = mean_per_sample((self.target(x_0, noise, t) - output[:, :channels]).square())
        terms = {"loss": self.loss_weight(t) * mse, "mse": mse}
        if self.learns_variance:
            mean_frozen = torch.cat([output[:, :channels].detach(), output[:, channels:]], dim=1)
            vb = self._variational_bound(self.predict(mean_frozen, x_t, t), x_0, x_t, t)
            terms |= {"loss": terms["loss"] + (self.path.max_time + 1) / 1000 * vb, "vb": vb}
        if self.uncertainty:
            u = mean_per_sample(output[:, -1:])
            terms |= {"loss": terms["loss"] * torch.exp(-u) + u, "uncertainty": u}
        return terms

    def loss_weight(self, t: Timesteps) -> Float32[Tensor, " b"]:
        """What the squared error of the output at `t` counts, as the weighting or the loss's target says. Where that
        grows without bound towards an end of a continuous path, it is that of the last time in `noise_range`."""
        if self.weighting == "uniform" and self.loss == self.prediction:
            return torch.ones(t.shape, device=t.device)
        if t.is_floating_point():
            t = t.clamp(*self._informative)
        at = self.path.levels(t)
        if self.weighting == "uniform":
            return (self._loss_target.determinant(at) / self._target.determinant(at)).square().flatten()
        x_0_error = (at.sigma / self._target.determinant(at)).square()  # over that of the output
        return (WEIGHTINGS[self.weighting](self.path, t) * x_0_error).flatten()

    def signal_share(self, t: Timesteps) -> Float32[Tensor, " b"]:
        """`alpha^2 / (alpha^2 + sigma^2)`."""
        alpha, sigma = self.path.levels(t)
        return (alpha**2 / (alpha**2 + sigma**2)).flatten()

    def _transition(self, t: Labels) -> Transition:
        assert isinstance(self.path, GaussianChain)  # the presets see to it
        return self.path.transition(t)

    def _variational_bound(self, prediction: Prediction, x_0: Tensor, x_t: Tensor, t: Tensor) -> Float32[Tensor, " b"]:
        """`L_t` in bits per dimension (Ho et al. 2020, eq. 5): a divergence, or at t = 0 a likelihood."""
        at = self._transition(t)
        mean = at.posterior_mean(prediction.x_0, x_t)
        log_variance = self.reverse_log_variance(prediction, at)
        true_mean = at.posterior_mean(x_0, x_t)
        divergence = mean_per_sample(normal_kl(true_mean, at.log_variance_min, mean, log_variance))
        likelihood = mean_per_sample(discretized_log_likelihood(x_0, mean, 0.5 * log_variance))
        return torch.where(t == 0, -likelihood, divergence) / math.log(2)


def with_auxiliary(
    terms: dict[str, Tensor], auxiliary: Sequence[Auxiliary], predicted: Tensor, x_0: Tensor, y: Tensor, share: Tensor
) -> dict[str, Tensor]:
    """The terms, and auxiliary ones of the predicted `x_0`, which count in `loss` with their weights and this share."""
    for further in auxiliary:
        terms = {**terms, further.name: share * further.term(predicted, x_0, y).float()}
        terms["loss"] = terms["loss"] + further.weight * terms[further.name]
    return terms


def mean_per_sample(values: Images) -> Float[Tensor, " b"]:
    return reduce(values, "b c h w -> b", "mean")


# Terms of the variational bound, in nats, element by element.


def normal_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL divergence between two normal distributions, element by element."""
    ratio = torch.exp(log_variance - other_log_variance)
    distance = (mean - other_mean).square() * torch.exp(-other_log_variance)
    return 0.5 * (other_log_variance - log_variance + ratio + distance - 1)


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-probability of `x` in bins of 2/255 over [-1, 1], open at the ends (Ho et al. 2020, eq. 13), by the tanh
    approximation of the normal distribution function that published results were computed with."""

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    inverse_std = torch.exp(-log_std)
    upper = cdf(inverse_std * (x - mean + 1 / 255))
    lower = cdf(inverse_std * (x - mean - 1 / 255))
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


Moments = Iterator[tuple[Tensor, Tensor]]
"""(x_t, predicted x_0) after each step."""


@dataclass(frozen=True)
class Chain:
    """The way from noise to data.

    Args:
        steps: each time, noisiest first, and the step from it to the next one; the last leads to the data.
        denoise: of (x_t, time, step): calls the model, guided; keywords are passed on to it.
        draw_noise: unit normal noise, fresh at each call.
    """

    diffusion: Diffusion
    steps: Sequence[Step]
    denoise: Callable[..., Prediction]
    draw_noise: Callable[[], Tensor]
