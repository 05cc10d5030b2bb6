"""Flows whose model takes both ends of a step and predicts the average velocity: MeanFlow and shortcut models."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor
from torch.autograd import forward_ad

from diffusion.calls import eval_mode, num_classes_of, with_and_without_label
from diffusion.diffusion import Auxiliary, Denoiser, Diffusion, mean_per_sample, with_auxiliary
from diffusion.forward_mode import differentiable_forward
from diffusion.options import SamplingOptions
from diffusion.paths import Flow
from diffusion.samplers import AVERAGES, SAMPLERS, num_steps_for
from diffusion.times import Device, DrawTimes
from diffusion.transition import Images, Labels, Timesteps
from settings import check_name

TANGENTS = ("sample", "model")
PREDICTIONS_OF_AVERAGES = ("velocity", "x_0")
ADAPTIVE_EPS = 1e-3  # c of the adaptive weight (Geng et al. 2025, section 4.3)


class AverageVelocity(Diffusion, ABC):
    """A model of the average velocity `u(x_t, r, t) = (x_t - x_r) / (t - r)`, which takes a step of any length by one
    call.

    For a share of each batch, `interval_share`, r differs from t, and the target is computed from the model itself. For
    the others r is t, and training is flow matching: `u(x_t, t, t)` is the velocity, which is what general samplers
    use.

    With the prediction `x_0` in place of `velocity`, the model predicts `x_t - t u`, the data that a step of velocity u
    from t to 0 leads to (Lu et al. 2026), and its squared error is measured there.

    The path is a linear flow, `sampler` a name in `AVERAGES`, and `adaptive_power` p of the loss weight `1 / (mse +
    c)^p`. `guidance` holds `guidance_scale` and `guidance_max` of `Diffusion`.
    """

    model_args = {"second_time": True}  # noqa: RUF012

    def __init__(
        self,
        path: Flow,
        *,
        prediction: str,
        times: DrawTimes,
        sampler: str,
        interval_share: float,
        adaptive_power: float,
        **guidance: Any,
    ) -> None:
        check_name("--diffusion.prediction", prediction, PREDICTIONS_OF_AVERAGES)
        samplers = {sampler: AVERAGES[sampler], **SAMPLERS}
        super().__init__(path, prediction, times=times, default_sampler=sampler, samplers=samplers, **guidance)
        self.interval_share, self.adaptive_power = interval_share, adaptive_power

    @abstractmethod
    def interval_of(self, t: Timesteps, second: Timesteps) -> tuple[Timesteps, Timesteps]:
        """Return (r, t), the interval of a step, from a training time and the second number drawn with it."""

    @abstractmethod
    def average_velocity(
        self, model: Denoiser, x_t: Images, t: Timesteps, v: Images, index: Int64[Tensor, " n"], **inputs: Tensor
    ) -> Images:
        """Return the training target: the average velocity from t to r for samples at `index`, the velocity `v` for
        others. The model's `inputs` are `y`, `r` and others, with a row for each sample."""

    def precondition(self, model: Denoiser) -> Denoiser:
        """Wrap the model as a function of the path's `x_t`, `t` and `r`; `r` is `t` by default."""
        wrapped = super().precondition(model)

        def preconditioned(x_t: Tensor, t: Tensor, y: Tensor, *, r: Tensor | None = None, **extras: Any) -> Tensor:
            return wrapped(x_t, t, y, r=self.path.model_inputs(x_t, t if r is None else r)[1], **extras)

        return preconditioned

    def velocity_of(self, model: Denoiser) -> Denoiser:
        """Wrap the model as the average velocity `u(x_t, t, y, r=r)`, whatever it predicts."""
        preconditioned = self.precondition(model)
        if self.prediction == "velocity":
            return preconditioned

        def velocity(x_t: Tensor, t: Tensor, y: Tensor, **extras: Any) -> Tensor:
            x_0 = preconditioned(x_t, t, y, **extras).to(x_t.dtype)
            return (x_t - x_0) / broadcast(t.clamp(min=self._finite_times[0]))

        return velocity

    def draw_loss_args(
        self, shape: Sequence[int], generator: torch.Generator | None = None, device: Device = "cpu"
    ) -> dict[str, Tensor]:
        """Draw a second number for each sample, and choose evenly spaced samples whose r differs from t. The choice,
        `is_interval`, stays on the CPU, so that indexing by it does not wait for the device."""
        positions = torch.arange(shape[0] + 1, dtype=torch.float64)
        is_interval = (positions * self.interval_share).floor().diff() > 0
        drawn = {"second": self.draw_second(shape[0], generator, device), "is_interval": is_interval}
        return drawn | super().draw_loss_args(shape, generator, device)

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
        is_interval: Bool[Tensor, " b"] | None = None,
        g: Float[Tensor, " b"] | None = None,
    ) -> dict[str, Float32[Tensor, " b"]]:
        """Compute `mse` and `loss` for each sample; the loss is `mse` times the adaptive weight. Auxiliary losses apply
        to the samples with r = t, because only their outputs predict the data."""
        t, noise = self.draw(x_0, t, noise, generator)
        if second is None or is_interval is None:
            second, is_interval, *_ = self.draw_loss_args(x_0.shape, generator, x_0.device).values()
        extras = self.draw_guidance(len(x_0), generator, x_0.device) if g is None else {"g": g}
        index = is_interval.nonzero().flatten().to(x_0.device, non_blocking=True)
        start, end = self.interval_of(t[index], second[index])
        r, t = t.index_copy(0, index, start), t.index_copy(0, index, end)

        x_0 = x_0.float()
        x_t, v = self.q_sample(x_0, t, noise), noise - x_0
        if not len(index):
            index = index.new_zeros(1)  # all processes must call the model equally often
        target = self.average_velocity(model, x_t, t, v, index, y=y, r=r, **extras)
        if self.prediction == "x_0":
            target = x_t - broadcast(t) * target
        output = self.precondition(model)(x_t, t, y, r=r, **extras).float()
        mse = mean_per_sample((target - output).square())
        terms = {"loss": mse / (mse.detach() + ADAPTIVE_EPS) ** self.adaptive_power, "mse": mse}
        if auxiliary:
            share = self.signal_share(t) * (r == t)
            terms = with_auxiliary(terms, auxiliary, self.predict(output, x_t, t).x_0, x_0, y, share)
        return terms


def broadcast(values: Timesteps) -> Tensor:
    return rearrange(values, "b -> b 1 1 1")


class MeanFlow(AverageVelocity):
    """MeanFlow: the average velocity `u(x_t, r, t) = (x_t - x_r) / (t - r)` from an identity (Geng et al. 2025).

    Differentiating `(t - r) u` along the path gives `u = v - (t - r) du/dt`. The right-hand side is the target, with
    the sample's velocity `v`, the model's own `du/dt`, and no gradient (section 4.1).

    Guidance is part of training: `v` is replaced by `omega v + kappa u(x_t, t, t | y) + (1 - omega - kappa) u(x_t, t,
    t)`, which corresponds to a scale of `omega / (1 - kappa)` (section 4.2 and appendix B.2).

    With `guidance_max`, each sample's scale g is an input of the model, as in improved MeanFlow (Geng et al. 2025b).
    Here omega is 1 and kappa `1 - 1 / g`, so that v is not weighted more than without guidance.

    With `tangent="model"`, `du/dt` is taken along the velocity that the model predicts rather than the sample's. That
    reduces the target's variance, as the velocities of samples that pass through `x_t` differ and the model learns
    their mean (improved MeanFlow, Geng et al. 2025b).

    `du/dt` is a Jacobian-vector product or, with a `difference` h, the difference quotient of two calls at t - h and
    t + h. The embeddings of time oscillate fast, so the exact derivative is mostly that of ripples that the quotient
    averages out. The quotient also needs no forward-mode differentiation, so a compiled model stays compiled.

    Args:
        path: a linear flow.
        omega: weight of the sample's velocity; omega 1 with kappa 0 trains without guidance.
        kappa: weight of the model's velocity given the label.
        tangent: the velocity along which `du/dt` is taken, of `TANGENTS`.
        difference: h of the difference quotient, in (0, 0.5); None takes the exact derivative.
        of_flow: further arguments of `AverageVelocity`; t is the larger and r the smaller of two drawn `times`.
    """

    def __init__(
        self, path: Flow, *, omega: float, kappa: float, tangent: str, difference: float | None = None, **of_flow: Any
    ) -> None:
        check_name("--diffusion.tangent", tangent, TANGENTS)
        super().__init__(path, sampler="meanflow", **of_flow)
        self.omega, self.kappa, self.tangent, self.difference = omega, kappa, tangent, difference
        if (omega, kappa) != (1, 0):
            if self.guidance_max is not None:
                raise ValueError(
                    f"--diffusion.omega {omega} and kappa {kappa} set one scale, --diffusion.guidance_max "
                    f"{self.guidance_max} all up to it: leave one out (omega 1, kappa 0; guidance_max null)"
                )
            self.guidance_settings = "omega and kappa"

    def samples_are_guided(self, sampler: str) -> bool:
        return True  # or by none, as the model is not called twice

    @property
    def num_forward_passes(self) -> float:
        """See `Diffusion`. A Jacobian-vector product counts as two forward passes, as many as a difference takes."""
        of_derivative = 3 if self.tangent == "model" else 2
        return 3 + (2 if self.guidance_settings else 0) + self.interval_share * of_derivative

    def interval_of(self, t: Timesteps, second: Timesteps) -> tuple[Timesteps, Timesteps]:
        return torch.minimum(t, second), torch.maximum(t, second)

    @torch.no_grad()
    def average_velocity(
        self, model: Denoiser, x_t: Images, t: Timesteps, v: Images, index: Int64[Tensor, " n"], **inputs: Tensor
    ) -> Images:
        """Return `v - (t - r) du/dt` for samples at `index`, and `v` for others."""
        u, x, end = self.velocity_of(model), x_t[index], t[index]
        others = {name: values[index] for name, values in inputs.items()}
        with eval_mode(model) if self.difference else differentiable_forward(model):
            v = self.guided(model, x_t, t, v, **inputs)
            tangent = v[index]
            if self.tangent == "model":
                tangent = u(x, end, **{**others, "r": end}).to(x.dtype)  # the model has learned the guided velocity
            du_dt = self.derivative(u, x, end, tangent, others)
        return v.index_copy(0, index, v[index] - broadcast(end - others["r"]) * du_dt)

    def derivative(self, u: Denoiser, x: Images, t: Timesteps, tangent: Images, others: Mapping[str, Tensor]) -> Images:
        """Return `du/dt`, the derivative of `u(x, t, **others)` along (tangent, 1) of (x, t)."""
        if not self.difference:
            dual_x, dual_t = forward_ad.make_dual(x, tangent), forward_ad.make_dual(t, torch.ones_like(t))
            du_dt = forward_ad.unpack_dual(u(dual_x, dual_t, **others)).tangent
            assert du_dt is not None
            return du_dt
        before, after = torch.maximum(t - self.difference, others["r"]), (t + self.difference).clamp(max=1)
        ends = [(x + broadcast(end - t) * tangent, end) for end in (before, after)]
        x_ends, t_ends = (torch.cat(both) for both in zip(*ends, strict=True))
        doubled = {name: torch.cat([values] * 2) for name, values in others.items()}
        u_before, u_after = u(x_ends, t_ends, **doubled).to(x.dtype).chunk(2)
        return (u_after - u_before) / broadcast((after - before).clamp(min=1e-12))

    def guided(self, model: Denoiser, x_t: Images, t: Timesteps, v: Images, *, y: Labels, **inputs: Tensor) -> Images:
        """Return the guided velocity of samples with a label, and `v` for those with the null label."""
        if not self.guidance_settings:
            return v
        null_label = num_classes_of(model)
        both = with_and_without_label(self.velocity_of(model), null_label, x_t, t, y, **{**inputs, "r": t})
        labelled, unlabelled = (u.to(x_t.dtype) for u in both)
        kappa = broadcast(1 - 1 / inputs["g"]) if "g" in inputs else self.kappa
        guided = self.omega * v + kappa * labelled + (1 - self.omega - kappa) * unlabelled
        return torch.where(broadcast(y == null_label), v, guided)


class Shortcut(AverageVelocity):
    """Shortcut model: steps of length 1, 1/2, 1/4, ..., each consistent with two steps of half its length (Frans et al.
    2024).

    The target is `u(x_t, r, t) = (u(x_t, m, t) + u(x_m, r, m)) / 2`, with the middle m and both half steps by the model
    itself, without gradient (section 3.2). The halves of the shortest step are Euler steps by the velocity.

    Guidance is part of training: it is applied to the velocity in these Euler steps and so passes on to all longer
    steps, while the velocity itself stays unguided.

    Args:
        path: a linear flow.
        sections: number of Euler steps that the path is divided into, a power of two.
        of_flow: further arguments of `AverageVelocity`; the interval of a step is the one that contains the drawn time.
    """

    def __init__(self, path: Flow, *, sections: int, **of_flow: Any) -> None:
        if sections < 2 or not is_power_of_two(sections):
            raise ValueError(f"--diffusion.sections {sections} must be a power of two, such as 128")
        super().__init__(path, sampler="shortcut", **of_flow)
        self.sections = sections

    def samples_are_guided(self, sampler: str) -> bool:
        return bool(self.guidance_settings) and sampler == self.default_sampler

    @property
    def num_forward_passes(self) -> float:
        return 3 + self.interval_share * (4 if self.guidance_settings else 2)

    def check_options(self, options: SamplingOptions) -> None:
        """Refuse steps and spacings that `shortcut` lacks: lengths must be trained ones, or shorter than all."""
        if (options.sampler or self.default_sampler) != "shortcut":
            return
        most, num_steps = self.sections // 2, num_steps_for(options, self)
        if num_steps < most and not is_power_of_two(num_steps):
            raise ValueError(f"--sampling.num_steps {num_steps}: give 1, 2, 4, ... {most}, or --sampling.sampler euler")
        if options.spacing not in (None, "uniform"):
            raise ValueError(f"--sampling.spacing {options.spacing}: a shortcut's steps are uniform; leave it out")

    def precondition(self, model: Denoiser) -> Denoiser:
        """Wrap the model as a function of `x_t`, `t` and `r`; steps shorter than in training become the shortest."""
        wrapped, shortest = super().precondition(model), 2 / self.sections

        def preconditioned(x_t: Tensor, t: Tensor, y: Tensor, *, r: Tensor | None = None, **extras: Any) -> Tensor:
            r = t if r is None else torch.where(r < t, torch.minimum(r, t - shortest), t)
            return wrapped(x_t, t, y, r=r, **extras)

        return preconditioned

    def draw_second(self, num: int, generator: torch.Generator | None, device: Device) -> Tensor:
        return torch.rand(num, generator=generator, device=device)

    def interval_of(self, t: Timesteps, second: Timesteps) -> tuple[Timesteps, Timesteps]:
        """Return the step that contains t, of a length chosen by `second`; all lengths are equally likely."""
        num_lengths = self.sections.bit_length() - 1
        num_steps = (num_lengths * second).floor().exp2().round()
        end = (num_steps * t).ceil().clamp(min=1)
        return (end - 1) / num_steps, end / num_steps

    @torch.no_grad()
    def average_velocity(
        self, model: Denoiser, x_t: Images, t: Timesteps, v: Images, index: Int64[Tensor, " n"], **inputs: Tensor
    ) -> Images:
        """Return the mean of two half steps' velocities for samples at `index`, and `v` for others."""
        x, t = x_t[index], t[index]
        inputs = {name: values[index] for name, values in inputs.items()}
        r = inputs["r"]
        middle = (r + t) / 2
        with eval_mode(model):
            first = self.half_step_velocity(model, x, t, **{**inputs, "r": middle})
            second = self.half_step_velocity(model, x - broadcast(t - middle) * first, middle, **inputs)
        average = torch.where(broadcast(r == t), v[index], (first + second) / 2)
        return v.index_copy(0, index, average)

    def half_step_velocity(
        self, model: Denoiser, x_t: Images, t: Timesteps, *, y: Labels, r: Timesteps, **extras: Tensor
    ) -> Images:
        """Return the average velocity of half a step; for half the shortest step, the guided velocity at t."""
        is_shortest = (t - r) * self.sections <= 1
        r = torch.where(is_shortest, t, r)
        u = self.velocity_of(model)
        if not self.guidance_settings:
            return u(x_t, t, y, r=r).to(x_t.dtype)
        both = with_and_without_label(u, num_classes_of(model), x_t, t, y, r=r, **extras)
        labelled, unlabelled = (velocity.to(x_t.dtype) for velocity in both)
        scale = torch.where(is_shortest, extras.get("g", self.guidance_scale), 1.0).to(x_t.dtype)
        return torch.lerp(unlabelled, labelled, broadcast(scale))


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0
