"""The score SDE of a diffusion (Song et al. 2021b): the same path, seen as `dx = f(t) x dt + g(t) dw`.

A Gaussian chain is the variance-preserving SDE, EDM the variance-exploding one; a flow has one too. Time derivatives
are taken of `diffusion.path`, in the diffusion's own time: steps of a Gaussian chain, [0, 1] of a flow, sigma of EDM.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from diffusion.diffusion import Denoiser, Diffusion


class Coefficients(NamedTuple):
    """Of the SDE at some times, in float64 on the CPU."""

    f: Float[Tensor, " b"]  # d log alpha / dt
    g_squared: Float[Tensor, " b"]  # d sigma^2 / dt - 2 f sigma^2


def coefficients(diffusion: Diffusion, t: Float[Tensor, " b"]) -> Coefficients:
    """Drift and diffusion of the forward SDE whose marginals are those of the path (Kingma et al. 2021, section 3)."""
    with torch.enable_grad():
        t = t.detach().cpu().double().requires_grad_()
        alpha, sigma = diffusion.path(t)
        (f,) = torch.autograd.grad((alpha.log() + 0 * t).sum(), t, retain_graph=True)  # alpha may be constant
        (growth,) = torch.autograd.grad(sigma.square().sum(), t)
    return Coefficients(f, growth - 2 * f * sigma.detach() ** 2)


def score(
    diffusion: Diffusion,
    model: Denoiser,
    x_t: Float[Tensor, "b c h w"],
    t: Shaped[Tensor, " b"],
    y: Int64[Tensor, " b"],
) -> Float[Tensor, "b c h w"]:
    """`grad log p_t(x_t)`: the predicted noise over `-sigma`."""
    noise = diffusion.predict(diffusion.precondition(model)(x_t, t, y), x_t, t).noise
    return -noise / diffusion.path.levels(t).sigma
