"""Guidance: dropping labels in training, and pushing samples away from a worse prediction.

The worse prediction is the model's own without a label (classifier-free, Ho and Salimans 2022) or that of a smaller or
less trained model (autoguidance, Karras et al. 2024).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion.diffusion import Denoiser, Diffusion
from diffusion.options import SamplingOptions
from diffusion.transition import Images, Labels

Mix = Callable[[Tensor, Tensor, float, Tensor, Tensor], Tensor]
"""Of (good output, worse output, scale, x_t, t): the guided output."""


def drop_labels(
    y: Labels,
    probability: float,
    num_classes: int,
    *,
    generator: torch.Generator | None = None,
    uniform: Float[Tensor, " b"] | None = None,
) -> Labels:
    """Labels, of which those whose draw in [0, 1) is below `probability` become the null label `num_classes` (algorithm
    1). The draws are `uniform`, or made by `generator` on `y`'s device."""
    if uniform is None:
        uniform = torch.rand(y.shape, generator=generator, device=y.device)
    return torch.where(uniform < probability, num_classes, y)


def linear(good: Tensor, worse: Tensor, scale: float, x_t: Tensor, t: Tensor) -> Tensor:
    """`worse + scale * (good - worse)` (Ho and Salimans 2022, eq. 6)."""
    return torch.lerp(worse, good, scale)


def guide(
    model: Denoiser,
    num_classes: int,
    scale: float,
    *,
    latent_channels: int,
    legacy_cfg_channels: int | None = None,
    guide_model: Denoiser | None = None,
    mix: Mix = linear,
) -> Denoiser:
    """The model pushed away from a worse prediction: by default `null + scale * (conditional - null)`, as one batch.

    `scale` is 1 + w in the paper's letters: 1 is the conditional model, returned as it is. A learned variance stays the
    conditional one; `legacy_cfg_channels=3` guides the first three channels only, as published DiT samplers do. A
    `guide_model`, given the same label, takes the place of the unlabelled half.
    """
    if scale == 1.0:
        return model
    if num_classes == 0 and guide_model is None:
        raise ValueError(f"--sampling.guidance_scale {scale}: the model is unconditional, it has no labels; use 1")
    guided_channels = latent_channels if legacy_cfg_channels is None else legacy_cfg_channels
    if not 1 <= guided_channels <= latent_channels:
        raise ValueError(f"--sampling.legacy_cfg_channels {guided_channels} must lie in 1..{latent_channels}")

    def both(x_t: Tensor, t: Tensor, y: Tensor, extras: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        if guide_model is not None:
            return model(x_t, t, y, **extras).float(), guide_model(x_t, t, y, **extras).float()
        null_label = torch.full_like(y, num_classes)
        twice = {key: torch.cat([one, one]) if isinstance(one, Tensor) else one for key, one in extras.items()}
        output = model(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([y, null_label]), **twice).float()
        conditional, unconditional = output.chunk(2)
        return conditional, unconditional

    def guided(x_t: Tensor, t: Tensor, y: Tensor, **extras: Any) -> Tensor:
        good, worse = both(x_t, t, y, extras)
        part = slice(guided_channels)
        return torch.cat([mix(good[:, part], worse[:, part], scale, x_t[:, part], t), good[:, guided_channels:]], dim=1)

    return guided


def scale_at(options: SamplingOptions, ratio: float) -> float:
    """The scale at this noise level sigma / alpha; 1 outside the interval (Kynkäänniemi et al. 2024)."""
    low, high = options.guidance_interval or (0.0, math.inf)
    return options.guidance_scale if low <= ratio <= high else 1.0


def mix_of(options: SamplingOptions, diffusion: Diffusion) -> Mix:
    projection = options.guidance_parallel, options.guidance_radius
    rule = linear if projection == (1.0, None) else projected(diffusion, *projection)
    return rescaled(rule, options.guidance_rescale) if options.guidance_rescale else rule


def rescaled(rule: Mix, share: float) -> Mix:
    """The rule, its output's deviation brought back to the good one's by a share (Lin et al. 2023, eq. 15, 16)."""

    def mix(good: Tensor, worse: Tensor, scale: float, x_t: Tensor, t: Tensor) -> Tensor:
        mixed = rule(good, worse, scale, x_t, t)
        spread = mixed.std(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)  # an untrained model puts out zeros
        ratio = good.std(dim=(1, 2, 3), keepdim=True) / spread
        return mixed * (share * ratio + (1 - share))

    return mix


def projected(diffusion: Diffusion, parallel: float, radius: float | None) -> Mix:
    """Adaptive projection (Sadat et al. 2024, algorithm 1): the push, in `x_0`, is limited in its norm to `radius`, and
    of its part along the prediction, which saturates images, the share `parallel` is kept."""

    def mix(good: Tensor, worse: Tensor, scale: float, x_t: Tensor, t: Tensor) -> Tensor:
        at = diffusion.path.levels(t)
        x_0, worse_x_0 = diffusion.read(good, x_t, at)[0], diffusion.read(worse, x_t, at)[0]
        push = x_0 - worse_x_0
        if radius is not None:
            push = push * (radius / norm(push)).clamp(max=1)
        direction = x_0 / norm(x_0)
        along = (push * direction).sum(dim=(1, 2, 3), keepdim=True) * direction
        x_0 = x_0 + (scale - 1) * (push - (1 - parallel) * along)
        return diffusion.target(x_0, (x_t - at.alpha * x_0) / at.sigma, t)

    return mix


def norm(x: Images) -> Float[Tensor, "b 1 1 1"]:
    """Of each sample; never quite 0, to divide by."""
    return torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
