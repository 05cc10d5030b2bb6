"""One-step samplers, which do not reuse earlier predictions."""

import math
from typing import Annotated

import torch

from diffusion.samplers.chain import Chain, Trajectory
from diffusion.transition import Images, Transition


def ddpm(chain: Chain, x_t: Images) -> Trajectory:
    """Ancestral sampling with the diffusion's own variances (Ho et al. 2020, algorithm 2)."""
    for t, at in chain.steps:
        prediction = chain.denoise(x_t, t, at)
        x_t = at.posterior_mean(prediction.x_0, x_t)
        if at.sigma_next > 0:  # the step to the data is deterministic
            x_t = x_t + torch.exp(0.5 * chain.diffusion.reverse_log_variance(prediction, at)) * chain.draw_noise()
        yield x_t, prediction.x_0


def ddim(chain: Chain, x_t: Images, *, eta: Annotated[float, "[0, 1]"] = 0.0) -> Trajectory:
    """DDIM (Song et al. 2021, eq. 12); `eta` scales its noise from 0 to that of ancestral sampling at 1 (eq. 16)."""
    for t, at in chain.steps:
        x_0, noise, _ = chain.denoise(x_t, t, at)
        std = eta * at.posterior_std
        x_t = at.alpha_next * x_0 + (at.sigma_next**2 - std**2).clamp(min=0).sqrt() * noise
        if std > 0:
            x_t = x_t + std * chain.draw_noise()
        yield x_t, x_0


def euler(chain: Chain, x_t: Images) -> Trajectory:
    """Euler's method for the probability flow `dx = x_0 dalpha + noise dsigma`; the same as DDIM at `eta` 0."""
    for t, at in chain.steps:
        x_0, noise, _ = chain.denoise(x_t, t, at)
        x_t = at.alpha_next * x_0 + at.sigma_next * noise
        yield x_t, x_0


def average_velocity_steps(chain: Chain, x_t: Images) -> Trajectory:
    """Steps by the average velocity, `x_r = x_t - (t - r) u(x_t, r, t)`, exact for any length (Geng et al. 2025,
    algorithm 2; Frans et al. 2024, algorithm 2)."""
    for t, at in chain.steps:
        r = torch.full((len(x_t),), at.sigma_next.item(), device=x_t.device)  # on a linear path sigma is the time
        x_0, noise, _ = chain.denoise(x_t, t, at, r=r)
        x_t = at.alpha_next * x_0 + at.sigma_next * noise
        yield x_t, x_0


def euler_maruyama(chain: Chain, x_t: Images) -> Trajectory:
    """Euler-Maruyama method for the reverse-time SDE (Song et al. 2021b, eq. 6). It is an Euler step on the probability
    flow, followed by a Langevin step with the variance of q(x_t | x_s), at most 2 sigma_t sigma_s."""
    for t, at in chain.steps:
        x_0, noise, _ = chain.denoise(x_t, t, at)
        x_t = at.alpha_next * x_0 + at.sigma_next * noise
        if at.sigma_next > 0:
            variance = at.log_variance_max.exp().clamp(max=2 * at.sigma * at.sigma_next)  # of q(x_t | x_s)
            # The score is -noise / sigma.
            x_t = x_t - 0.5 * variance / at.sigma * noise + variance.sqrt() * chain.draw_noise()
        yield x_t, x_0


def heun(chain: Chain, x_t: Images, *, churn: Annotated[float, "[0, inf)"] = 0.0) -> Trajectory:
    """Heun's method for `dx = x_0 dalpha + noise dsigma` (Karras et al. 2022, algorithm 2). `churn` is the amount of
    noise added over all steps, S_churn of the paper. Each step calls the model twice, except that to the data."""
    next_steps = [*chain.steps[1:], None]
    for (t, at), next_step in zip(chain.steps, next_steps, strict=True):
        if churn:
            x_t, t, at = add_churn(chain, x_t, t, at, churn / len(chain.steps))
        x_0, noise, _ = chain.denoise(x_t, t, at)
        x_s = at.alpha_next * x_0 + at.sigma_next * noise
        if next_step is not None:
            x_0_end, noise_end, _ = chain.denoise(x_s, *next_step)
            dalpha, dsigma = at.alpha_next - at.alpha, at.sigma_next - at.sigma
            x_s = x_t + dalpha * (x_0 + x_0_end) / 2 + dsigma * (noise + noise_end) / 2
        x_t = x_s
        yield x_t, x_0


def add_churn(
    chain: Chain, x_t: Images, t: int | float, at: Transition, share: float
) -> tuple[Images, int | float, Transition]:
    """Add noise to `x_t`, and return it with its time and the step from there (Karras et al. 2022, algorithm 2, lines 4
    to 6, with S_noise = 1).

    The noise level sigma / alpha grows by the factor `1 + share`, at most sqrt(2), up to the end of the path.
    """
    ratio = (at.sigma / at.alpha).item()
    raised = min(ratio * (1 + min(share, math.sqrt(2) - 1)), chain.diffusion.path.noise_range[1])
    if raised <= ratio:
        return x_t, t, at
    time = chain.diffusion.path.time_at(torch.tensor([raised], dtype=torch.float64))[0]
    alpha, sigma = (coefficient[0] for coefficient in chain.diffusion.path(time[None]))  # scalars keep x_t's dtype
    x_t = alpha / at.alpha * x_t + alpha * math.sqrt(raised**2 - ratio**2) * chain.draw_noise()
    return x_t, time.item(), Transition.between(alpha, sigma, at.alpha_next, at.sigma_next)
