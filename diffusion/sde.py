"""Likelihood along the probability flow of a diffusion (Song et al. 2021b)."""

import math
from itertools import pairwise

import torch
from jaxtyping import Float32
from torch import Tensor

from diffusion.diffusion import Denoiser, Diffusion, Step
from diffusion.transition import Images, Labels


def bits_per_dimension(
    diffusion: Diffusion,
    model: Denoiser,
    x_0: Images,
    y: Labels,
    *,
    num_steps: int = 100,
    spacing: str = "log_snr",
    probe: Images | None = None,
    generator: torch.Generator | None = None,
) -> Float32[Tensor, " b"]:
    """`-log2 p(x_0 | y)` over the number of dimensions, of a density; for pixels of 8 bits in [-1, 1] add log2(127.5).

    Heun's method takes `x_0` up the probability flow to the noise, whose density is known, and adds up the flow's
    divergence on the way, by Hutchinson's estimate, unbiased in `probe`, random signs. Alpha and sigma are divided by
    their norm, so that steps stay small where sigma grows without bound. It costs `2 (num_steps - 1)` calls of the
    model and twice as many backward passes.
    """
    if probe is None:
        probe = torch.randint(0, 2, x_0.shape, generator=generator, device=x_0.device).to(x_0.dtype) * 2 - 1
    steps = diffusion.reverse_steps(num_steps, spacing)[::-1]
    wrapped = diffusion.precondition(model)

    def flow(x: Tensor, step: Step) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Predicted `x_0` and noise of `x_t` over the norm, and the divergences [b] of both."""
        t, at = step
        times = torch.full((len(x),), t, device=x.device)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            x_t = x * norm(step)
            x_0, noise, _ = diffusion.predict(wrapped(x_t, times, y), x_t, times, at)
            both = [torch.autograd.grad(output, x, probe, retain_graph=True)[0] for output in (x_0, noise)]
        return x_0.detach(), noise.detach(), [(probe * product).sum(dim=(1, 2, 3)) for product in both]

    def norm(step: Step) -> Tensor:
        return (step[1].alpha ** 2 + step[1].sigma ** 2).sqrt()

    alphas, sigmas = ([getattr(step[1], name) / norm(step) for step in steps] for name in ("alpha", "sigma"))
    x = alphas[0] * x_0
    expansion = x_0[0].numel() * alphas[0].log() + x_0.new_zeros(len(x_0))  # log of the volume's growth
    for number, (here, after) in enumerate(pairwise(steps)):
        x_0_here, noise_here, divergence = flow(x, here)
        dalpha, dsigma = (levels[number + 1] - levels[number] for levels in (alphas, sigmas))
        x_0_there, noise_there, divergence_there = flow(x + dalpha * x_0_here + dsigma * noise_here, after)
        x = x + dalpha * (x_0_here + x_0_there) / 2 + dsigma * (noise_here + noise_there) / 2
        expansion += dalpha * (divergence[0] + divergence_there[0]) / 2
        expansion += dsigma * (divergence[1] + divergence_there[1]) / 2

    std = diffusion.path.prior_std / norm(steps[-1])
    log_prior = -0.5 * ((x / std) ** 2 + (2 * math.pi * std**2).log()).sum(dim=(1, 2, 3))
    return -((log_prior + expansion) / (x_0[0].numel() * math.log(2))).float()
