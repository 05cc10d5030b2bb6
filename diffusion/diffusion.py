"""A diffusion: a path from data to noise, the model's prediction target on it, and its training loss."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Float32, Shaped
from torch import Tensor

from diffusion.bound import discretized_log_likelihood, normal_kl
from diffusion.calls import eval_mode, num_classes_of, with_and_without_label
from diffusion.options import SamplingOptions
from diffusion.paths import GaussianChain, ProbabilityPath
from diffusion.spacings import spaced_times
from diffusion.targets import TARGETS
from diffusion.times import Device, DrawTimes
from diffusion.transition import AtLevel, Images, Labels, Output, Timesteps, Transition
from diffusion.weightings import WEIGHTINGS
from settings import check_name

Denoiser = Callable[..., Tensor]
"""A backbone, guided or not: a pure function of `(x_t [b c h w], t [b], y [b], **extras)`."""

Step = tuple[int | float, Transition]
"""A time at which a sampler calls the model, and the transition from there to the next lower time."""

EMPTY: Mapping[str, Any] = MappingProxyType({})


class Prediction(NamedTuple):
    """The data and noise predicted for `x_t`; all that samplers see of a model's output."""

    x_0: Images
    noise: Images
    log_variance: Images | None = None  # of the reverse step, where the model learns it

    def clipped(self, limit: float, x_t: Images, at: AtLevel) -> "Prediction":
        """Clamp `x_0` to [-limit, limit] and recompute the noise to match `x_t`."""
        x_0 = self.x_0.clamp(-limit, limit)
        return self._replace(x_0=x_0, noise=(x_t - at.alpha * x_0) / at.sigma)


class Auxiliary(NamedTuple):
    """An auxiliary loss on the predicted data."""

    name: str
    weight: float
    term: Callable[[Tensor, Tensor, Tensor], Tensor]  # (predicted x_0, x_0, y) -> [b]
    is_fixed: bool = True  # False: the loss itself changes in training, so values of different steps do not compare


FIXED_LOG_VARIANCES: dict[str, Callable[[Transition], Tensor]] = {  # Ho et al. 2020, section 3.2
    "fixed_small": lambda at: at.log_variance_min,
    "fixed_large": lambda at: at.log_variance_max,
}
VARIANCES = ("learned_range", *FIXED_LOG_VARIANCES)


class Diffusion:
    """A path `x_t = alpha(t) x_0 + sigma(t) noise`, the target that a model predicts from `x_t`, and the loss.

    Args:
        path: the path from data to noise; it defines the time variable.
        prediction: the target that the model predicts: a name in `TARGETS` or in `path.targets`.
        loss: the target in which the squared error is measured, by the same names; by default the prediction.
        times: draws training times: `(num, generator, device) -> [num]`.
        weighting: a name in `WEIGHTINGS`, a weight of the squared error of `x_0` whatever the prediction; not to be
            combined with another `loss`.
        variance: variance of the reverse step. With `learned_range`, for Gaussian chains only, the model interpolates
            in log space between the posterior variance and beta (Nichol and Dhariwal 2021, eq. 15) by as many further
            channels. `fixed_small` and `fixed_large` are these two bounds.
        uncertainty: have the model predict the logarithm u of its own error as the mean of one more channel. The loss
            is then `mse / e^u + u`, minimal at u = log mse (Kendall et al. 2018; in Karras et al. 2024, eq. 21, u is
            a small network's function of sigma alone). The optimal prediction is unchanged.
        guidance_scale: scale of the guidance that the model learns in training, so that it samples without (see
            `guided_target`); 1 is none.
        guidance_max: have the model learn the guidance of every scale from 1 to this instead, and tell it the scale as
            its input `g`, which sampling then chooses (Meng et al. 2023); None is none.
        contrast: weight below 1 of the distance to another sample's velocity, which is subtracted from the loss where
            `training_loss` is given a `negative` (contrastive flow matching, Stoica et al. 2025).
        default_sampler: name of the sampler to use where none is given.
        default_spacing: name of the spacing to use where none is given.
        samplers: the only samplers that support this diffusion; empty: all in `SAMPLERS`.
    """

    model_args: Mapping[str, Any] = EMPTY  # arguments that a backbone for this diffusion has to be built with

    def __init__(
        self,
        path: ProbabilityPath,
        prediction: str,
        loss: str | None = None,
        *,
        times: DrawTimes,
        weighting: str = "uniform",
        variance: str = "fixed_small",
        uncertainty: bool = False,
        guidance_scale: float = 1.0,
        guidance_max: float | None = None,
        contrast: float = 0.0,
        default_sampler: str = "euler",
        default_spacing: str = "uniform",
        samplers: Mapping[str, Callable[..., Iterator[tuple[Tensor, Tensor]]]] = EMPTY,
    ) -> None:
        targets = {**TARGETS, **path.targets}
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
        if guidance_max is not None and guidance_scale != 1:
            raise ValueError(
                f"--diffusion.guidance_scale {guidance_scale} sets one scale, --diffusion.guidance_max {guidance_max} "
                "all up to it: leave one out (guidance_scale 1; guidance_max null)"
            )
        self.variance, self.uncertainty, self.contrast = variance, uncertainty, contrast
        self.guidance_scale, self.guidance_max = guidance_scale, guidance_max
        self.guidance_settings = "" if guidance_scale == 1 else "guidance_scale"
        if guidance_max is not None:
            self.guidance_settings, self.model_args = "guidance_max", {**self.model_args, "guidance_input": True}
        self._draw_times = times
        self.default_sampler, self.default_spacing, self.samplers = default_sampler, default_spacing, samplers
        self._target, self._loss_target = targets[prediction], targets[self.loss]
        self._finite_times = path.time_at(torch.tensor(path.noise_range, dtype=torch.float64)).tolist()

    @property
    def learns_variance(self) -> bool:
        """Whether the second half of the model's output channels sets the variance."""
        return self.variance not in FIXED_LOG_VARIANCES

    def output_channels(self, in_channels: int) -> int:
        """Number of channels that the backbone must output for data of `in_channels`."""
        return in_channels * (1 + self.learns_variance) + self.uncertainty

    # Times.

    def sample_timesteps(
        self, num: int, generator: torch.Generator | None = None, device: Device = "cpu"
    ) -> Shaped[Tensor, " num"]:
        return self._draw_times(num, generator, device)

    def reverse_steps(self, num_steps: int, spacing: str | None = None) -> list[Step]:
        """Return a sampler's times and transitions, noisiest first, as float64 scalars on the CPU.

        At pure noise, a prediction of the noise says nothing about `x_0`; with such a model, the chain starts at the
        last time with a finite ratio sigma / alpha.
        """
        times = spaced_times(self.path, num_steps, spacing or self.default_spacing)
        if self._target.data is None and not self.path(times[-1:]).alpha > 0:
            times[-1] = self._finite_times[1]
        chain = Transition.chain(*self.path(times))
        steps = [Transition(*scalars) for scalars in zip(*chain, strict=True)]
        return list(zip(times.tolist(), steps, strict=True))[::-1]

    def check_options(self, options: SamplingOptions) -> None:
        """Raise `ValueError`, naming the flag, for options that this diffusion's own sampler does not support."""

    # The forward process, and what a model's output means.

    def q_sample(self, x_0: Images, t: Timesteps, noise: Images) -> Images:
        """Sample `x_t` from `q(x_t | x_0)`, given unit normal `noise`."""
        alpha, sigma = self.path.levels(t)
        return alpha * x_0 + sigma * noise

    def precondition(self, model: Denoiser) -> Denoiser:
        """Wrap the model as a function of the path's `x_t` and `t`, which are converted to the model's inputs."""

        def preconditioned(x_t: Tensor, t: Tensor, y: Tensor, **extras: Any) -> Tensor:
            return model(*self.path.model_inputs(x_t, t), y, **extras)

        return preconditioned

    def target(self, x_0: Images, noise: Images, t: Timesteps) -> Images:
        """Return the model's prediction target, without the variance."""
        return self._target.combine(x_0, noise, self.path.levels(t))

    def invert_target(self, raw: Images, x_t: Images, at: AtLevel) -> tuple[Images, Images]:
        """Invert `target`: return the `x_0` and noise that a raw output implies at `x_t`."""
        return self._target.solve(raw, x_t, at)

    def predict(self, output: Output, x_t: Images, t: Timesteps, transition: Transition | None = None) -> Prediction:
        """Convert a raw output at `x_t` to a `Prediction` with the variance of `transition`, by default to t - 1."""
        channels, output = x_t.shape[1], output.to(x_t.dtype)
        raw = output[:, :channels]
        if not self.learns_variance:
            return Prediction(*self.invert_target(raw, x_t, self.path.levels(t) if transition is None else transition))
        at = self._transition(t) if transition is None else transition
        # An output of -1 stands for the smallest variance, 1 for the largest (Nichol and Dhariwal 2021, eq. 15).
        fraction = (output[:, channels : 2 * channels] + 1) / 2
        log_variance = fraction * at.log_variance_max + (1 - fraction) * at.log_variance_min
        return Prediction(*self.invert_target(raw, x_t, at), log_variance)

    def reverse_log_variance(self, prediction: Prediction, transition: Transition) -> Tensor:
        """Return the log-variance of the reverse step, learned or fixed."""
        if prediction.log_variance is not None:
            return prediction.log_variance
        return FIXED_LOG_VARIANCES[self.variance](transition)

    def samples_are_guided(self, sampler: str) -> bool:
        """Whether a sampler's samples are guided by the model alone, as training included guidance."""
        return bool(self.guidance_settings)

    def takes_guidance(self, sampler: str) -> bool:
        """Whether a sampler tells the model its guidance scale, in place of calling it twice."""
        return self.guidance_max is not None and self.samples_are_guided(sampler)

    @property
    def num_forward_passes(self) -> float:
        """Cost of training on one image, in forward passes of the backbone. A backward pass counts as two of them."""
        return 5.0 if self.guidance_settings else 3.0  # the guided target takes two

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
        extras: Mapping[str, Any] = EMPTY,
        negative: Float[Tensor, "b 2 c h w"] | None = None,
        g: Float[Tensor, " b"] | None = None,
    ) -> dict[str, Float32[Tensor, " b"]]:
        """Compute the per-sample `loss` to minimise, and the terms that it is made of, all in float32. The model is the
        raw one, before `precondition`. Times and unit normal noise are drawn by default, by a generator on the device
        of `x_0`.

        Args:
            auxiliary: further losses, each weighted by the signal's share `alpha^2 / (alpha^2 + sigma^2)` too.
            extras: keyword arguments for the model.
            negative: `x_0` and noise of another sample for each, for the contrastive term.
            g: guidance scales to learn; drawn by default where the model is told one.
        """
        t, noise = self.draw(x_0, t, noise, generator)
        extras = {**extras, **(self.draw_guidance(len(x_0), generator, x_0.device) if g is None else {"g": g})}
        x_0 = x_0.float()
        x_t = self.q_sample(x_0, t, noise)
        target = self.target(x_0, noise, t)
        if self.guidance_settings:
            target = self.guided_target(model, x_t, t, y, target, extras)
        output = self.precondition(model)(x_t, t, y, **extras).float()
        terms = self.terms(output, target, x_0, x_t, t)
        if negative is not None:
            negative_x_0, negative_noise = negative.float().unbind(dim=1)
            distance = mean_per_sample((self.target(negative_x_0, negative_noise, t) - output).square())
            terms |= {"loss": terms["loss"] - self.contrast * self.loss_weight(t) * distance, "negative_mse": distance}
        if auxiliary:
            terms = with_auxiliary(terms, auxiliary, self.predict(output, x_t, t).x_0, x_0, y, self.signal_share(t))
        return terms

    def draw_loss_args(
        self, shape: Sequence[int], generator: torch.Generator | None = None, device: Device = "cpu"
    ) -> dict[str, Tensor]:
        """Draw further random arguments of `training_loss` for a batch of this shape, by name."""
        return self.draw_guidance(shape[0], generator, device)

    def draw_guidance(self, num: int, generator: torch.Generator | None, device: Device) -> dict[str, Tensor]:
        """Draw the scales `g` that the model is told, log-uniformly in [1, `guidance_max`]; nothing if it is told none.

        The target depends on `1 - 1 / g`, most of whose range belongs to small scales.
        """
        if self.guidance_max is None:
            return {}
        return {"g": self.guidance_max ** torch.rand(num, generator=generator, device=device)}

    def draw(
        self, x_0: Tensor, t: Tensor | None, noise: Tensor | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Return times and float32 noise for a batch; whichever is None is drawn."""
        if t is None:
            t = self.sample_timesteps(len(x_0), generator, x_0.device)
        if noise is None:
            noise = torch.randn(x_0.shape, generator=generator, device=x_0.device)
        return t, noise.float()

    @torch.no_grad()
    def guided_target(
        self, model: Denoiser, x_t: Images, t: Timesteps, y: Labels, target: Images, extras: Mapping[str, Any] = EMPTY
    ) -> Images:
        """Return the target of a model that learns its own guidance; that of samples without a label stays as it is.

        The target moves by `1 - 1 / s` times the difference between the model's outputs with and without the label,
        for a scale of s: `guidance_scale`, or that of each sample, which the model is told. The model that agrees with
        its own targets then has the output of classifier-free guidance at that scale (model-guidance, Tang et al.
        2025).
        """
        null_label = num_classes_of(model)
        with eval_mode(model):
            both = with_and_without_label(self.precondition(model), null_label, x_t, t, y, **extras)
        labelled, unlabelled = (output[:, : x_t.shape[1]].float() for output in both)
        share = torch.where(y == null_label, 0.0, 1 - 1 / extras.get("g", self.guidance_scale))
        return target + rearrange(share, "b -> b 1 1 1") * (labelled - unlabelled)

    def terms(
        self, output: Output, target: Images, x_0: Images, x_t: Images, t: Timesteps
    ) -> dict[str, Float32[Tensor, " b"]]:
        """Compute `loss` and its parts: `mse` and, where the model learns them, `vb` and `uncertainty`.

        `mse` is the squared error of the output (the simple loss, Ho et al. 2020, eq. 14). `vb` is the term of the
        variational bound at `t`, in bits per dimension, without gradient to the mean. As `vb` is one of T terms, the
        hybrid loss `mse + T / 1000 * vb` is eq. 16 of Nichol and Dhariwal 2021.
        """
        channels = x_0.shape[1]
        mse = mean_per_sample((target - output[:, :channels]).square())
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
        """Return the weight of the squared error of the output at `t`, which follows from `weighting` or `loss`. Times
        of a continuous path are clamped to its `noise_range`, since the weight may diverge at the ends."""
        if self.weighting == "uniform" and self.loss == self.prediction:
            return torch.ones(t.shape, device=t.device)
        if t.is_floating_point():
            t = t.clamp(*self._finite_times)
        at = self.path.levels(t)
        if self.weighting == "uniform":
            return (self._loss_target.determinant(at) / self._target.determinant(at)).square().flatten()
        x_0_error_ratio = (at.sigma / self._target.determinant(at)).square()  # squared error of x_0 over the output's
        return (WEIGHTINGS[self.weighting](self.path, t) * x_0_error_ratio).flatten()

    def signal_share(self, t: Timesteps) -> Float32[Tensor, " b"]:
        """Return `alpha^2 / (alpha^2 + sigma^2)` for each sample."""
        alpha, sigma = self.path.levels(t)
        return (alpha**2 / (alpha**2 + sigma**2)).flatten()

    def _transition(self, t: Labels) -> Transition:
        assert isinstance(self.path, GaussianChain)  # the presets learn variances of chains only
        return self.path.transition(t)

    def _variational_bound(self, prediction: Prediction, x_0: Tensor, x_t: Tensor, t: Tensor) -> Float32[Tensor, " b"]:
        """Return `L_t` in bits per dimension (Ho et al. 2020, eq. 5): a KL divergence, or at 0 a log-likelihood."""
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
    """Add auxiliary losses on the predicted `x_0` to `terms`; each is scaled by `share` [b], and weighted in `loss`."""
    for loss in auxiliary:
        terms = {**terms, loss.name: share * loss.term(predicted, x_0, y).float()}
        terms["loss"] = terms["loss"] + loss.weight * terms[loss.name]
    return terms


def mean_per_sample(values: Images) -> Float[Tensor, " b"]:
    return reduce(values, "b c h w -> b", "mean")
