"""Samplers: each one function that reads like its paper's algorithm; `sample` calls them by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from diffusion.gaussian import GaussianDiffusion, Transition
from diffusion.guidance import guide
from diffusion.process import Denoiser, Prediction

Callback = Callable[[int, Tensor, Tensor], None]
"""Called with (step, x_t after the step, x_0 predicted in it)."""

Generators = torch.Generator | Sequence[torch.Generator]
"""One for the batch, or one a sample."""


@torch.no_grad()
def sample(
    process: GaussianDiffusion,
    model: Denoiser,
    noise: Float[Tensor, "b c h w"],
    y: Int64[Tensor, " b"],
    *,
    sampler: str = "ddpm",
    num_steps: int = 150,
    eta: float = 0.0,
    guidance_scale: float = 1.0,
    legacy_cfg_channels: int | None = None,
    num_classes: int | None = None,
    step_noise: Float[Tensor, "num_steps b c h w"] | None = None,
    generator: Generators | None = None,
    callback: Callback | None = None,
) -> Float[Tensor, "b c h w"]:
    """From unit normal `noise` to data, `x_0`, in `num_steps` calls of the model.

    Random steps take their noise from `step_noise`, one slice a step in order, else from `generator`. With a
    generator for each sample, a sample depends on its own noise, label and stream alone, whatever batch it is
    in. `num_classes`, the null label that guidance needs, is by default the model's attribute of that name.

    Args:
        sampler: name in `SAMPLERS`.
        eta: of DDIM, from 0 (deterministic) to 1 (as random as DDPM); the others do not use it.
        guidance_scale: strength of classifier-free guidance, none at 1; see `guide`.
        callback: called after each step with (step, `x_t`, predicted `x_0`).

    Raises:
        ValueError: for an unknown sampler, a number out of its range, or guidance of an unconditional model,
            naming the flag.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"--sampler {sampler}: unknown, choose from {', '.join(SAMPLERS)}")
    if not 0 <= eta <= 1:
        raise ValueError(f"--eta {eta} must lie in [0, 1]")
    if step_noise is not None and step_noise.shape != (num_steps, *noise.shape):
        raise ValueError(f"step_noise {list(step_noise.shape)} must be {[num_steps, *noise.shape]}: a slice a step")

    guided = guide(
        model,
        getattr(model, "num_classes", 0) if num_classes is None else num_classes,
        guidance_scale,
        latent_channels=noise.shape[1],
        legacy_cfg_channels=legacy_cfg_channels,
    )
    slices = None if step_noise is None else iter(step_noise)

    def denoise(x_t: Tensor, t: int, transition: Transition) -> Prediction:
        times = torch.full((len(x_t),), t, device=x_t.device)
        return process.predict(guided(x_t, times, y), x_t, times, transition)

    def draw_noise() -> Tensor:
        return randn_like(noise, generator) if slices is None else next(slices)

    x = noise
    moments = SAMPLERS[sampler](process, denoise, noise, num_steps, draw_noise, eta)
    for step, (x, x_0) in enumerate(moments):
        if callback is not None:
            callback(step, x, x_0)
    return x


Denoise = Callable[[Tensor, int, Transition], Prediction]
Moments = Iterator[tuple[Tensor, Tensor]]  # (x_t, predicted x_0) after each step


def ddpm(
    process: GaussianDiffusion,
    denoise: Denoise,
    x_t: Float[Tensor, "b c h w"],
    num_steps: int,
    draw_noise: Callable[[], Tensor],
    eta: float,
) -> Moments:
    """Ancestral sampling with the process's variances (Ho et al. 2020, algorithm 2); `eta` plays no part."""
    for t, transition in process.reverse_steps(num_steps):
        prediction = denoise(x_t, t, transition)
        x_t = process.posterior_mean(prediction.x_0, x_t, transition)
        if transition.posterior_std > 0:  # the step to the data is not random
            log_variance = process.reverse_log_variance(prediction, transition)
            x_t = x_t + torch.exp(0.5 * log_variance) * draw_noise()
        yield x_t, prediction.x_0


def ddim(
    process: GaussianDiffusion,
    denoise: Denoise,
    x_t: Float[Tensor, "b c h w"],
    num_steps: int,
    draw_noise: Callable[[], Tensor],
    eta: float,
) -> Moments:
    """The implicit sampler (Song et al. 2021, eq. 12), random in proportion to `eta` (eq. 16)."""
    for t, transition in process.reverse_steps(num_steps):
        x_0, noise, _ = denoise(x_t, t, transition)
        std = eta * transition.posterior_std
        x_t = transition.alpha_next * x_0 + (transition.sigma_next**2 - std**2).clamp(min=0).sqrt() * noise
        if std > 0:
            x_t = x_t + std * draw_noise()
        yield x_t, x_0


def dpmpp_2m(
    process: GaussianDiffusion,
    denoise: Denoise,
    x_t: Float[Tensor, "b c h w"],
    num_steps: int,
    draw_noise: Callable[[], Tensor],
    eta: float,
) -> Moments:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2): each step also uses the `x_0` of the one before. Deterministic:
    neither noise nor `eta` play a part. The first step and the step to the data are of first order."""
    before = None
    for t, at in process.reverse_steps(num_steps):
        x_0 = denoise(x_t, t, at).x_0
        decay = at.alpha * at.sigma_next / (at.sigma * at.alpha_next)  # e^-h; h: how far the log-SNR's half rises
        h = -decay.log()
        extrapolated = x_0
        if before is not None and at.sigma_next > 0:
            earlier, earlier_h = before
            extrapolated = x_0 + h / (2 * earlier_h) * (x_0 - earlier)
        x_t = at.sigma_next / at.sigma * x_t + at.alpha_next * (1 - decay) * extrapolated
        before = x_0, h
        yield x_t, x_0


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpmpp_2m": dpmpp_2m}


def randn_like(like: Tensor, generator: Generators | None = None) -> Tensor:
    """Unit normal noise on `like`'s device, drawn on the generator's; of several, each draws for one sample.

    Raises:
        ValueError: when there are several generators, but not one for each sample.
    """
    if isinstance(generator, Sequence):
        if len(generator) != len(like):
            raise ValueError(f"{len(generator)} generators for {len(like)} samples: pass one, or one for each")
        drawn = [torch.randn(like.shape[1:], generator=own, device=own.device) for own in generator]
        return torch.stack(drawn).to(like.device)
    source = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=source).to(like.device)
