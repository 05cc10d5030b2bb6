"""Flows whose model is told both ends of a step, and puts out the average velocity: MeanFlow and shortcuts."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float32, Int64
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm

from diffusion.diffusion import Auxiliary, Denoiser, Diffusion, mean_per_sample, with_auxiliary
from diffusion.options import SamplingOptions
from diffusion.paths import Flow
from diffusion.samplers import AVERAGES, SAMPLERS, evaluating, num_steps_of
from diffusion.times import Device, DrawTimes
from diffusion.transition import Images, Labels, Timesteps
from settings import check_name

TANGENTS = ("sample", "model")
LEAST_ERROR = 1e-3  # c of the adaptive weight (Geng et al. 2025, section 4.3)


class AverageVelocity(Diffusion, ABC):
    """A model of `u(x_t, r, t) = (x_t - x_r) / (t - r)`, by which a step of any length takes one call.

    For a share of a batch r is not t, and the model is held against a target of its own making. For all others r is t
    and this is flow matching: `u(x_t, t, t)` is the velocity, which is all that samplers but its own ask for.

    Args:
        path: linear.
        times: draws training times.
        sampler: its own, of `AVERAGES`.
        interval_share: of the samples for whom r is not t.
        adaptive_power: p of the weight `1 / (mse + c)^p`.
    """

    model_args = {"second_time": True}  # noqa: RUF012

    def __init__(
        self, path: Flow, *, times: DrawTimes, sampler: str, interval_share: float, adaptive_power: float
    ) -> None:
        samplers = {sampler: AVERAGES[sampler], **SAMPLERS}
        super().__init__(path, "velocity", times=times, default_sampler=sampler, samplers=samplers)
        self.interval_share, self.adaptive_power = interval_share, adaptive_power

    @abstractmethod
    def step_of(self, t: Timesteps, second: Timesteps) -> tuple[Timesteps, Timesteps]:
        """(r, t) of a step, by a training time and the second number that was drawn for it."""

    @abstractmethod
    def average_velocity(
        self, model: Denoiser, x_t: Images, r: Timesteps, t: Timesteps, y: Labels, v: Images, index: Int64[Tensor, " n"]
    ) -> Images:
        """What the model is held against: the average velocity of samples at `index`, the velocity `v` of others."""

    def precondition(self, model: Denoiser) -> Denoiser:
        """The model as a function of the path's own `x_t`, `t` and `r`, by default `t`."""
        told = super().precondition(model)

        def preconditioned(x_t: Tensor, t: Tensor, y: Tensor, *, r: Tensor | None = None, **extras: Any) -> Tensor:
            return told(x_t, t, y, r=self.path.told(x_t, t if r is None else r)[1], **extras)

        return preconditioned

    def draw_more(
        self, shape: Sequence[int], generator: torch.Generator | None = None, device: Device = "cpu"
    ) -> dict[str, Tensor]:
        """A second number for each sample, and whether it counts: for every so many in the order of the batch. That
        lies on the CPU, where it is known without waiting for the device how many these are."""
        places = torch.arange(shape[0] + 1, dtype=torch.float64)
        counts = (places * self.interval_share).floor().diff() > 0
        return {"second": self.draw_second(shape[0], generator, device), "counts": counts}

    def draw_second(self, num: int, generator: torch.Generator | None, device: Device) -> Tensor:
        return self.sample_timesteps(num, generator, device)

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
        second: Timesteps | None = None,
        counts: Bool[Tensor, " b"] | None = None,
    ) -> dict[str, Float32[Tensor, " b"]]:
        """Per sample `mse`, and `loss`, which is it times the adaptive weight. Auxiliary terms are of those samples for
        whom r is t, as no other output tells the data."""
        t, noise = self.draw(x_0, t, noise, generator)
        if second is None or counts is None:
            second, counts = self.draw_more(x_0.shape, generator, x_0.device).values()
        apart = counts.nonzero().flatten().to(x_0.device, non_blocking=True)
        r, later = self.step_of(t[apart], second[apart])
        r, t = t.index_copy(0, apart, r), t.index_copy(0, apart, later)

        x_0 = x_0.float()
        x_t, v = self.q_sample(x_0, t, noise), self.target(x_0, noise, t)
        some = apart if len(apart) else apart.new_zeros(1)  # so that all processes call the model as often
        target = self.average_velocity(model, x_t, r, t, y, v, some)
        output = self.precondition(model)(x_t, t, y, r=r).float()
        mse = mean_per_sample((target - output).square())
        terms = {"loss": mse / (mse.detach() + LEAST_ERROR) ** self.adaptive_power, "mse": mse}
        if auxiliary:
            share = self.signal_share(t) * (r == t)
            terms = with_auxiliary(terms, auxiliary, self.predict(output, x_t, t).x_0, x_0, y, share)
        return terms

    def with_and_without_label(
        self, model: Denoiser, x_t: Images, r: Timesteps, t: Timesteps, y: Labels
    ) -> tuple[Images, Images]:
        """The model's average velocities, of a batch of twice the size."""
        told = torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, num_classes_of(model))])
        labelled, unlabelled = self.precondition(model)(*told, r=torch.cat([r, r])).to(x_t.dtype).chunk(2)
        return labelled, unlabelled


def num_classes_of(model: Any) -> int:
    """The backbone's, whatever it is wrapped in."""
    return next(part.num_classes for part in model.modules() if hasattr(part, "num_classes"))


def over_images(numbers: Timesteps) -> Tensor:
    return rearrange(numbers, "b -> b 1 1 1")


class MeanFlow(AverageVelocity):
    """The average velocity `u(x_t, r, t) = (x_t - x_r) / (t - r)` (Geng et al. 2025).

    Differentiated along the path, `(t - r) u` says that `u = v - (t - r) du/dt`: the model is held against that, `v` of
    the sample and `du/dt` the model's own, as constants (section 4.1).

    Guidance is trained: `v` is replaced by `omega v + kappa u(x_t, t, t | y) + (1 - omega - kappa) u(x_t, t, t)`, which
    is guided by the scale `omega / (1 - kappa)` (section 4.2 and appendix B.2).

    A sample's own velocity varies among all that pass through `x_t`, and a derivative along it varies more. Along the
    model's, which learns their mean, the target varies by `v` alone: improved MeanFlow (Geng et al. 2025b).

    Args:
        omega: share of the sample's own velocity; 1 beside a kappa of 0 is no guidance.
        kappa: share of the model's velocity under the label.
        tangent: the velocity along which `du/dt` is taken, of `TANGENTS`.
        of_flow: as of `AverageVelocity`; of two `times`, t is the larger one.
    """

    def __init__(self, path: Flow, *, omega: float, kappa: float, tangent: str, **of_flow: Any) -> None:
        check_name("--diffusion.tangent", tangent, TANGENTS)
        super().__init__(path, sampler="meanflow", **of_flow)
        self.omega, self.kappa, self.tangent, self.guided_samplers = omega, kappa, tangent, tuple(self.samplers)
        self.guidance_settings = "" if (omega, kappa) == (1, 0) else "omega and kappa"

    def step_of(self, t: Timesteps, second: Timesteps) -> tuple[Timesteps, Timesteps]:
        return torch.minimum(t, second), torch.maximum(t, second)

    @torch.no_grad()
    def average_velocity(
        self, model: Denoiser, x_t: Images, r: Timesteps, t: Timesteps, y: Labels, v: Images, index: Int64[Tensor, " n"]
    ) -> Images:
        """`v - (t - r) du/dt` of samples at `index`, and `v` of all others: a Jacobian-vector product of the model with
        the tangent (v, 0, 1) of (x_t, r, t)."""
        u = self.precondition(model)
        x, start, end, label = x_t[index], r[index], t[index], y[index]
        with differentiable_forward(model):
            v = self.guided(model, x_t, t, y, v)
            along = v[index]
            if self.tangent == "model":
                along = u(x, end, label, r=end).to(x.dtype)  # which has learned the guidance
            moving, ending = forward_ad.make_dual(x, along), forward_ad.make_dual(end, torch.ones_like(end))
            du_dt = forward_ad.unpack_dual(u(moving, ending, label, r=start)).tangent
            assert du_dt is not None
        return v.index_copy(0, index, v[index] - over_images(end - start) * du_dt)

    def guided(self, model: Denoiser, x_t: Images, t: Timesteps, y: Labels, v: Images) -> Images:
        """The velocity under the guidance that is trained, of samples that have a label."""
        if not self.guidance_settings:
            return v
        labelled, unlabelled = self.with_and_without_label(model, x_t, t, t, y)
        mixed = self.omega * v + self.kappa * labelled + (1 - self.omega - self.kappa) * unlabelled
        return torch.where(over_images(y == num_classes_of(model)), v, mixed)


@contextmanager
def differentiable_forward(model: object) -> Iterator[None]:
    """A place for forward derivatives of a model as samplers call it: without stochastic depth, and without norms over
    the batch, which would mix samples; and as it is uncompiled, as generated kernels have no such derivatives. Norms of
    bfloat16 would have them in float32, which no product takes: they are all in float32."""
    load_forward_rules()
    parts = model.modules() if isinstance(model, nn.Module) else ()
    norms = [part for part in parts if isinstance(part, nn.LayerNorm | _BatchNorm)]
    widened = lambda norm, inputs: inputs[0].to(torch.promote_types(inputs[0].dtype, torch.float32))  # noqa: E731
    hooks = [norm.register_forward_pre_hook(widened) for norm in norms]
    try:
        with evaluating(model), torch.compiler.set_stance("force_eager"), forward_ad.dual_level():
            yield
    finally:
        for hook in hooks:
            hook.remove()


@cache
def load_forward_rules() -> None:
    """Which torch does at the first derivative, with a warning about scripts of its own."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.filterwarnings("ignore", message=r"`?torch\.jit\.", category=FutureWarning)
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


class Shortcut(AverageVelocity):
    """Steps of 1, 1/2, 1/4, ... of the path (Frans et al. 2024), each of which leads where two of half its length do:
    `u(x_t, r, t) = (u(x_t, m, t) + u(x_m, r, m)) / 2`, m the middle, is what the model is held against (section 3.2).
    Both halves are its own, without gradients. Halves of the shortest step are Euler's, by the velocity.

    Guidance is trained: it is that of the velocity in these, so that all steps have it and the velocity itself has not.

    Args:
        sections: the path's, a power of two: as many as Euler's steps in place of all.
        guidance_scale: 1 is none.
        of_flow: as of `AverageVelocity`; `times` fall into the intervals of the grid.
    """

    def __init__(self, path: Flow, *, sections: int, guidance_scale: float, **of_flow: Any) -> None:
        if sections < 2 or not is_power_of_two(sections):
            raise ValueError(f"--diffusion.sections {sections} must be a power of two, such as 128")
        super().__init__(path, sampler="shortcut", **of_flow)
        self.sections, self.guidance_scale = sections, guidance_scale
        if guidance_scale != 1:
            self.guided_samplers, self.guidance_settings = ("shortcut",), "guidance_scale"

    def check_options(self, options: SamplingOptions) -> None:
        """Of its own sampler: steps of lengths that are trained, or shorter ones, which are taken for the shortest."""
        if (options.sampler or self.default_sampler) != "shortcut":
            return
        most, num_steps = self.sections // 2, num_steps_of(options, self)
        if num_steps < most and not is_power_of_two(num_steps):
            raise ValueError(f"--sampling.num_steps {num_steps}: give 1, 2, 4, ... {most}, or --sampling.sampler euler")
        if options.spacing not in (None, "uniform"):
            raise ValueError(f"--sampling.spacing {options.spacing}: a shortcut's steps are uniform; leave it out")

    def precondition(self, model: Denoiser) -> Denoiser:
        """Steps shorter than any that is trained are told as the shortest."""
        told, shortest = super().precondition(model), 2 / self.sections

        def preconditioned(x_t: Tensor, t: Tensor, y: Tensor, *, r: Tensor | None = None, **extras: Any) -> Tensor:
            r = t if r is None else torch.where(r < t, torch.minimum(r, t - shortest), t)
            return told(x_t, t, y, r=r, **extras)

        return preconditioned

    def draw_second(self, num: int, generator: torch.Generator | None, device: Device) -> Tensor:
        return torch.rand(num, generator=generator, device=device)

    def step_of(self, t: Timesteps, second: Timesteps) -> tuple[Timesteps, Timesteps]:
        """That in which t lies, of all those of a length; each length is as likely."""
        num_lengths = self.sections.bit_length() - 1
        num_steps = (num_lengths * second).floor().exp2().round()
        end = (num_steps * t).ceil().clamp(min=1)
        return (end - 1) / num_steps, end / num_steps

    @torch.no_grad()
    def average_velocity(
        self, model: Denoiser, x_t: Images, r: Timesteps, t: Timesteps, y: Labels, v: Images, index: Int64[Tensor, " n"]
    ) -> Images:
        """The mean of two half steps' of samples at `index`, and `v` of all others."""
        x, r, t, y = x_t[index], r[index], t[index], y[index]
        middle = (r + t) / 2
        with evaluating(model):
            first = self.half(model, x, middle, t, y)
            second = self.half(model, x - over_images(t - middle) * first, r, middle, y)
        average = torch.where(over_images(r == t), v[index], (first + second) / 2)
        return v.index_copy(0, index, average)

    def half(self, model: Denoiser, x_t: Images, r: Timesteps, t: Timesteps, y: Labels) -> Images:
        """A half step's average velocity, or the velocity, guided, where that is the shortest step's."""
        is_shortest = (t - r) * self.sections <= 1
        r = torch.where(is_shortest, t, r)
        if self.guidance_scale == 1:
            return self.precondition(model)(x_t, t, y, r=r).to(x_t.dtype)
        labelled, unlabelled = self.with_and_without_label(model, x_t, r, t, y)
        scale = torch.where(is_shortest, self.guidance_scale, 1.0).to(x_t.dtype)
        return torch.lerp(unlabelled, labelled, over_images(scale))


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0
