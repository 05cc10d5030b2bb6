"""Likelihood by the probability flow ODE of a diffusion (Song et al. 2021b)."""

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
    probe: Images | None = None,
    generator: torch.Generator | None = None,
) -> Float32[Tensor, " b"]:
    """Compute `-log2 p(x_0 | y)` per dimension, where p is a density; for 8-bit pixels in [-1, 1] add log2(127.5).

    Heun's method integrates the probability flow from `x_0` to the noise, whose density is known, together with the
    flow's divergence. The divergence is estimated without bias by Hutchinson's method with random signs, `probe`.
    Alpha and sigma are divided by their norm, so that steps stay small where sigma is large. The cost is `2 (num_steps
    - 1)` calls of the model and twice as many backward passes.
    """
    if probe is None:
        probe = torch.randint(0, 2, x_0.shape, generator=generator, device=x_0.device).to(x_0.dtype) * 2 - 1
    steps = diffusion.reverse_steps(num_steps, "log_snr")[::-1]
    wrapped = diffusion.precondition(model)

    def flow(x: Tensor, step: Step) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the `x_0` and noise predicted at the normalised `x`, and the divergences [b] of both."""
        t, at = step
        times = torch.full((len(x),), t, device=x.device)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            x_t = x * norm(step)
            x_0, noise, _ = diffusion.predict(wrapped(x_t, times, y), x_t, times, at)
            products = [torch.autograd.grad(output, x, probe, retain_graph=True)[0] for output in (x_0, noise)]
        return x_0.detach(), noise.detach(), [(probe * product).sum(dim=(1, 2, 3)) for product in products]

    def norm(step: Step) -> Tensor:
        return (step[1].alpha ** 2 + step[1].sigma ** 2).sqrt()

    alphas, sigmas = ([getattr(step[1], name) / norm(step) for step in steps] for name in ("alpha", "sigma"))
    x = alphas[0] * x_0
    log_det = x_0[0].numel() * alphas[0].log() + x_0.new_zeros(len(x_0))  # of the Jacobian of the map from x_0 to x
    for index, (step, next_step) in enumerate(pairwise(steps)):
        x_0_start, noise_start, divergence_start = flow(x, step)
        dalpha, dsigma = (levels[index + 1] - levels[index] for levels in (alphas, sigmas))
        x_0_end, noise_end, divergence_end = flow(x + dalpha * x_0_start + dsigma * noise_start, next_step)
        x = x + dalpha * (x_0_start + x_0_end) / 2 + dsigma * (noise_start + noise_end) / 2
        log_det += dalpha * (divergence_start[0] + divergence_end[0]) / 2
        log_det += dsigma * (divergence_start[1] + divergence_end[1]) / 2

    std = diffusion.path.prior_std / norm(steps[-1])
    log_prior = -0.5 * ((x / std) ** 2 + (2 * math.pi * std**2).log()).sum(dim=(1, 2, 3))
    return -((log_prior + log_det) / (x_0[0].numel() * math.log(2))).float()
