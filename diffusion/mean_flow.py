"""MeanFlow: a flow's average velocity from one time to another, by which one call leads from noise to data."""

from __future__ import annotations

import warnings
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
from diffusion.paths import Flow
from diffusion.samplers import SAMPLERS, evaluating
from diffusion.samplers.one_step import meanflow
from diffusion.times import Device, DrawTimes
from diffusion.transition import Images, Labels, Timesteps

LEAST_ERROR = 1e-3  # c of the adaptive weight (Geng et al. 2025, section 4.3)


class MeanFlow(Diffusion):
    """The average velocity of a flow, `u(x_t, r, t) = (x_t - x_r) / (t - r)` (Geng et al. 2025).

    Differentiated along the path, `(t - r) u` says that `u = v - (t - r) du/dt`: the model is held against that, `v` of
    the sample and `du/dt` the model's own, as constants (section 4.1). Where r is t this is flow matching, and
    `u(x_t, t, t)` the velocity, which is all that samplers other than `meanflow` ask for.

    Guidance is trained: `v` is replaced by `omega v + kappa u(x_t, t, t | y) + (1 - omega - kappa) u(x_t, t, t)`, which
    is guided by the scale `omega / (1 - kappa)` (section 4.2 and appendix B.2).

    Args:
        path: linear.
        times: of which a sample gets two; t is the larger one.
        interval_share: of the samples for whom r is not t.
        adaptive_power: p of the weight `1 / (mse + c)^p`.
        omega, kappa: 1 and 0 are no guidance.
    """

    model_args = {"second_time": True}  # noqa: RUF012
    is_guided = True

    def __init__(
        self,
        path: Flow,
        *,
        times: DrawTimes,
        interval_share: float,
        adaptive_power: float,
        omega: float,
        kappa: float,
    ) -> None:
        samplers = {"meanflow": meanflow, **SAMPLERS}
        super().__init__(path, "velocity", times=times, default_sampler="meanflow", samplers=samplers)
        self.interval_share, self.adaptive_power, self.omega, self.kappa = interval_share, adaptive_power, omega, kappa

    @property
    def learns_guidance(self) -> bool:
        return (self.omega, self.kappa) != (1, 0)

    def precondition(self, model: Denoiser) -> Denoiser:
        """The model as a function of the path's own `x_t`, `t` and `r`, by default `t`."""
        told = super().precondition(model)

        def preconditioned(x_t: Tensor, t: Tensor, y: Tensor, *, r: Tensor | None = None, **extras: Any) -> Tensor:
            return told(x_t, t, y, r=self.path.told(x_t, t if r is None else r)[1], **extras)

        return preconditioned

    def draw_more(
        self, shape: Sequence[int], generator: torch.Generator | None = None, device: Device = "cpu"
    ) -> dict[str, Tensor]:
        """A second time for each sample, and whether it counts: for every so many in the order of the batch. That lies
        on the CPU, where it is known without waiting for the device how many these are."""
        places = torch.arange(shape[0] + 1, dtype=torch.float64)
        counts = (places * self.interval_share).floor().diff() > 0
        return {"second": self.sample_timesteps(shape[0], generator, device), "counts": counts}

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
        pair = torch.stack([t, second])[:, apart]
        r, t = t.index_copy(0, apart, pair.amin(0)), t.index_copy(0, apart, pair.amax(0))

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

    @torch.no_grad()
    def average_velocity(
        self, model: Denoiser, x_t: Images, r: Timesteps, t: Timesteps, y: Labels, v: Images, index: Int64[Tensor, " n"]
    ) -> Images:
        """`v - (t - r) du/dt` of samples at `index`, and `v` of all others: a Jacobian-vector product of the model with
        the tangent (v, 0, 1) of (x_t, r, t)."""
        u = self.precondition(model)
        with differentiable_forward(model):
            v = self.guided(model, x_t, t, y, v)
            x, now = forward_ad.make_dual(x_t[index], v[index]), t[index]
            now = forward_ad.make_dual(now, torch.ones_like(now))
            du_dt = forward_ad.unpack_dual(u(x, now, y[index], r=r[index])).tangent
            assert du_dt is not None
        return v.index_copy(0, index, v[index] - rearrange((t - r)[index], "n -> n 1 1 1") * du_dt)

    def guided(self, model: Denoiser, x_t: Images, t: Timesteps, y: Labels, v: Images) -> Images:
        """The velocity under the guidance that is trained, of samples that have a label."""
        if not self.learns_guidance:
            return v
        null_label = torch.full_like(y, num_classes_of(model))
        twice = torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([y, null_label])
        labelled, unlabelled = self.precondition(model)(*twice).float().chunk(2)
        mixed = self.omega * v + self.kappa * labelled + (1 - self.omega - self.kappa) * unlabelled
        return torch.where(rearrange(y == null_label, "b -> b 1 1 1"), v, mixed)


@contextmanager
def differentiable_forward(model: object) -> Iterator[None]:
    """A place for forward derivatives of a model as samplers call it: without stochastic depth, and without norms over
    the batch, which would mix samples; and as it is uncompiled, as generated kernels have no such derivatives. Norms of
    bfloat16 would have them in float32, which no product takes: they are all in float32."""
    load_forward_rules()
    parts = model.modules() if isinstance(model, nn.Module) else ()
    norms = [part for part in parts if isinstance(part, nn.LayerNorm | _BatchNorm)]
    hooks = [norm.register_forward_pre_hook(lambda norm, inputs: widened(*inputs)) for norm in norms]
    try:
        with evaluating(model), torch.compiler.set_stance("force_eager"), forward_ad.dual_level():
            yield
    finally:
        for hook in hooks:
            hook.remove()


def widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@cache
def load_forward_rules() -> None:
    """Which torch does at the first derivative, with a warning about scripts of its own."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.filterwarnings("ignore", message=r"`?torch\.jit\.", category=FutureWarning)
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


def num_classes_of(model: Any) -> int:
    """The backbone's, whatever it is wrapped in."""
    return next(part.num_classes for part in model.modules() if hasattr(part, "num_classes"))
