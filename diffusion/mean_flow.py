"""MeanFlow: a flow's average velocity, learned by its derivative along the path."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm

from diffusion.average_velocity import AverageVelocity, num_classes_of, over_images
from diffusion.diffusion import Denoiser
from diffusion.paths import Flow
from diffusion.samplers import evaluating
from diffusion.times import DrawTimes
from diffusion.transition import Images, Labels, Timesteps


class MeanFlow(AverageVelocity):
    """The average velocity `u(x_t, r, t) = (x_t - x_r) / (t - r)` (Geng et al. 2025).

    Differentiated along the path, `(t - r) u` says that `u = v - (t - r) du/dt`: the model is held against that, `v` of
    the sample and `du/dt` the model's own, as constants (section 4.1).

    Guidance is trained: `v` is replaced by `omega v + kappa u(x_t, t, t | y) + (1 - omega - kappa) u(x_t, t, t)`, which
    is guided by the scale `omega / (1 - kappa)` (section 4.2 and appendix B.2).

    Args:
        path: linear.
        times: of which a sample gets two, t the larger one.
        interval_share: as in `AverageVelocity`.
        adaptive_power: as in `AverageVelocity`.
        omega: share of the sample's own velocity; 1 beside a kappa of 0 is no guidance.
        kappa: share of the model's velocity under the label.
    """

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
        shares = {"interval_share": interval_share, "adaptive_power": adaptive_power}
        super().__init__(path, times=times, sampler="meanflow", **shares)
        self.omega, self.kappa, self.guided_samplers = omega, kappa, tuple(self.samplers)
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
        with differentiable_forward(model):
            v = self.guided(model, x_t, t, y, v)
            x, now = forward_ad.make_dual(x_t[index], v[index]), t[index]
            now = forward_ad.make_dual(now, torch.ones_like(now))
            du_dt = forward_ad.unpack_dual(u(x, now, y[index], r=r[index])).tangent
            assert du_dt is not None
        return v.index_copy(0, index, v[index] - over_images((t - r)[index]) * du_dt)

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
