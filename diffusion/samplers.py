"""Samplers: each one function that reads like its paper's algorithm, and `sample`, which calls them by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from diffusion.gaussian import GaussianDiffusion
from diffusion.guidance import guide
from diffusion.process import Denoiser, Prediction

Callback = Callable[[int, Tensor, Tensor], None]  # (step, x_t after it, x_0 predicted by it)
DrawNoise = Callable[[int], Tensor]  # step -> noise [b c h w]


@torch.inference_mode()
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
    step_noise: Float[Tensor, "num_steps b c h w"] | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    callback: Callback | None = None,
) -> Float[Tensor, "b c h w"]:
    """From `noise` (unit normal) to `x_0`.

    Random steps take their noise from `step_noise`, one slice a step in order, else from `generator`: one for the
    batch, or one a sample, so that each sample is a function of its own stream whatever batch it is in.
    `model.num_classes` is the null label of a guided model.

    Raises:
        ValueError: for an unknown sampler, or a number out of its range, naming the flag.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"--sampler {sampler}: unknown, choose from {', '.join(SAMPLERS)}")
    if not 0 <= eta <= 1:
        raise ValueError(f"--eta {eta} must lie in [0, 1]")

    def draw_noise(step: int) -> Tensor:
        return step_noise[step] if step_noise is not None else randn_like(noise, generator)

    channels = noise.shape[1]
    num_classes = getattr(model, "num_classes", 0)
    guided = guide(
        model, num_classes, guidance_scale, channels=channels, legacy_cfg_channels=legacy_cfg_channels
    )

    def denoise(x_t: Tensor, t: Tensor, previous: Tensor) -> Prediction:
        return process.predict(guided(x_t, t, y), x_t, t, previous)

    timesteps = process.timesteps(num_steps)
    return SAMPLERS[sampler](process, denoise, noise, timesteps, draw_noise, callback or _ignore, eta)


def ddpm(
    process: GaussianDiffusion,
    denoise: Callable[[Tensor, Tensor, Tensor], Prediction],
    x_t: Float[Tensor, "b c h w"],
    timesteps: Int64[Tensor, " num_steps"],
    draw_noise: DrawNoise,
    callback: Callback,
    eta: float,
) -> Float[Tensor, "b c h w"]:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), respaced, with the process's variances; `eta` is not used."""
    for step, t, previous in _strides(timesteps, x_t):
        prediction = denoise(x_t, t, previous)
        mean, _ = process.posterior(prediction.x_0, x_t, t, previous)
        x_t = mean
        if not _is_last(step, timesteps):
            log_variance = process.reverse_log_variance(prediction, t, previous)
            x_t = mean + torch.exp(0.5 * log_variance) * draw_noise(step)
        callback(step, x_t, prediction.x_0)
    return x_t


def ddim(
    process: GaussianDiffusion,
    denoise: Callable[[Tensor, Tensor, Tensor], Prediction],
    x_t: Float[Tensor, "b c h w"],
    timesteps: Int64[Tensor, " num_steps"],
    draw_noise: DrawNoise,
    callback: Callback,
    eta: float,
) -> Float[Tensor, "b c h w"]:
    """Song et al. 2021, eq. 12: deterministic at `eta=0`, as random as ancestral sampling at `eta=1` (eq. 16)."""
    for step, t, previous in _strides(timesteps, x_t):
        x_0, noise, _ = denoise(x_t, t, previous)
        now, then = process.alpha_bar(t), process.alpha_bar(previous)
        sigma = eta * ((1 - then) / (1 - now)).sqrt() * (1 - now / then).sqrt()
        x_t = then.sqrt().float() * x_0 + (1 - then - sigma**2).clamp(min=0).sqrt().float() * noise
        if eta > 0 and not _is_last(step, timesteps):
            x_t = x_t + sigma.float() * draw_noise(step)
        callback(step, x_t, x_0)
    return x_t


SAMPLERS = {"ddpm": ddpm, "ddim": ddim}


def randn_like(like: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    """Unit normal noise on `like`'s device, drawn on the generator's; with a list, sample `i` from the i-th."""
    if isinstance(generator, Sequence):
        drawn = [torch.randn(like.shape[1:], generator=own, device=own.device) for own in generator]
        return torch.stack(drawn).to(like.device)
    source = generator.device if generator is not None else like.device
    return torch.randn(like.shape, generator=generator, device=source).to(like.device)


def _strides(timesteps: Tensor, x_t: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(step, time, time it goes to), descending; -1 stands for the data."""
    descending = [*reversed(timesteps.tolist()), -1]
    batch = torch.ones(len(x_t), dtype=torch.int64, device=x_t.device)
    for step, (t, previous) in enumerate(zip(descending[:-1], descending[1:], strict=True)):
        yield step, t * batch, previous * batch


def _is_last(step: int, timesteps: Tensor) -> bool:
    return step == len(timesteps) - 1


def _ignore(step: int, x_t: Tensor, x_0: Tensor) -> None:
    """No callback."""
