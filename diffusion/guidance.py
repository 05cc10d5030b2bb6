"""Guidance: label dropout in training, and extrapolation away from a worse prediction in sampling.

The worse prediction is the model's own without a label (classifier-free, Ho and Salimans 2022) or that of a smaller or
less trained model (autoguidance, Karras et al. 2024).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion.calls import with_and_without_label
from diffusion.diffusion import Denoiser, Diffusion
from diffusion.options import SamplingOptions
from diffusion.transition import Images, Labels

Mix = Callable[[Tensor, Tensor, float, Tensor, Tensor], Tensor]
"""`(good output, worse output, scale, x_t, t) -> guided output`."""


def drop_labels(
    y: Labels,
    probability: float,
    num_classes: int,
    *,
    generator: torch.Generator | None = None,
    uniform: Float[Tensor, " b"] | None = None,
) -> Labels:
    """Replace labels by the null label `num_classes` with a probability (Ho and Salimans 2022, algorithm 1).

    A label is dropped if its number in `uniform` [0, 1) is below `probability`; by default `generator`, on the device
    of `y`, draws these numbers.
    """
    if uniform is None:
        uniform = torch.rand(y.shape, generator=generator, device=y.device)
    return torch.where(uniform < probability, num_classes, y)


def linear_guidance(good: Tensor, worse: Tensor, scale: float, x_t: Tensor, t: Tensor) -> Tensor:
    """Return `worse + scale * (good - worse)` (Ho and Salimans 2022, eq. 6)."""
    return torch.lerp(worse, good, scale)


def guide(
    model: Denoiser,
    num_classes: int,
    scale: float,
    *,
    latent_channels: int,
    legacy_cfg_channels: int | None = None,
    guide_model: Denoiser | None = None,
    mix: Mix = linear_guidance,
) -> Denoiser:
    """Wrap a model with guidance: by default `null + scale * (conditional - null)`, both computed in one batch.

    Args:
        scale: 1 + w in the notation of Ho and Salimans 2022; with 1 the model is returned unchanged.
        latent_channels: number of output channels to guide; a learned variance stays the conditional one.
        legacy_cfg_channels: guide only so many channels; published DiT samplers guide 3.
        guide_model: a worse model, called with the same labels, in place of the null label (autoguidance).
        mix: computes the guided from the good and the worse output.
    """
    if scale == 1.0:
        return model
    if num_classes == 0 and guide_model is None:
        raise ValueError(f"--sampling.guidance_scale {scale}: the model is unconditional, it has no labels; use 1")
    guided_channels = latent_channels if legacy_cfg_channels is None else legacy_cfg_channels
    if not 1 <= guided_channels <= latent_channels:
        raise ValueError(f"--sampling.legacy_cfg_channels {guided_channels} must lie in 1..{latent_channels}")

    def predict_both(x_t: Tensor, t: Tensor, y: Tensor, extras: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        if guide_model is not None:
            return model(x_t, t, y, **extras).float(), guide_model(x_t, t, y, **extras).float()
        conditional, unconditional = with_and_without_label(model, num_classes, x_t, t, y, **extras)
        return conditional.float(), unconditional.float()

    def guided(x_t: Tensor, t: Tensor, y: Tensor, **extras: Any) -> Tensor:
        good, worse = predict_both(x_t, t, y, extras)
        part = slice(guided_channels)
        return torch.cat([mix(good[:, part], worse[:, part], scale, x_t[:, part], t), good[:, guided_channels:]], dim=1)

    return guided


OF_TWO_OUTPUTS = ("guidance_interval", "guidance_rescale", "guidance_parallel", "guidance_radius")
OF_TWO_OUTPUTS += ("legacy_cfg_channels",)


def check_guidance_input(options: SamplingOptions, largest: float, *, has_guide: bool) -> None:
    """Raise `ValueError`, naming the flag, for guidance that a model which is told its scale does not have."""
    if not 1 <= options.guidance_scale <= largest:
        raise ValueError(
            f"--sampling.guidance_scale {options.guidance_scale:g}: the model has learned scales from 1 to "
            f"{largest:g}; give one of these"
        )
    names = [name for name in OF_TWO_OUTPUTS if getattr(options, name) != getattr(SamplingOptions(), name)]
    for name in [*names, *(["guidance_checkpoint"] if has_guide else [])]:
        raise ValueError(
            f"--sampling.{name}: the model is told its guidance scale and called once, so there are no two outputs to "
            "combine; leave it out"
        )


def scale_at(options: SamplingOptions, ratio: float) -> float:
    """Return the guidance scale at a noise level sigma / alpha: 1 outside the interval (Kynkäänniemi et al. 2024)."""
    low, high = options.guidance_interval or (0.0, math.inf)
    return options.guidance_scale if low <= ratio <= high else 1.0


def guidance_rule(options: SamplingOptions, diffusion: Diffusion) -> Mix:
    """Return the rule by which `options` combine the good and the worse output."""
    projection = options.guidance_parallel, options.guidance_radius
    rule = linear_guidance if projection == (1.0, None) else projected_guidance(diffusion, *projection)
    return rescaled_guidance(rule, options.guidance_rescale) if options.guidance_rescale else rule


def rescaled_guidance(rule: Mix, strength: float) -> Mix:
    """Rescale the rule's output towards the standard deviation of the good output (Lin et al. 2023, eq. 15 and 16).
    `strength` is 0 for the rule itself, 1 for the full correction."""

    def mix(good: Tensor, worse: Tensor, scale: float, x_t: Tensor, t: Tensor) -> Tensor:
        guided = rule(good, worse, scale, x_t, t)
        std = guided.std(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)  # an untrained model may output zeros
        ratio = good.std(dim=(1, 2, 3), keepdim=True) / std
        return guided * (strength * ratio + (1 - strength))

    return mix


def projected_guidance(diffusion: Diffusion, parallel: float, radius: float | None) -> Mix:
    """Adaptive projected guidance (Sadat et al. 2024, algorithm 1).

    The push, the difference of the two predictions of `x_0`, is clipped to the norm `radius`. Its component along the
    prediction, which saturates images, is scaled by `parallel`.
    """

    def mix(good: Tensor, worse: Tensor, scale: float, x_t: Tensor, t: Tensor) -> Tensor:
        at = diffusion.path.levels(t)
        x_0, worse_x_0 = diffusion.invert_target(good, x_t, at)[0], diffusion.invert_target(worse, x_t, at)[0]
        push = x_0 - worse_x_0
        if radius is not None:
            push = push * (radius / norm(push)).clamp(max=1)
        direction = x_0 / norm(x_0)
        along = (push * direction).sum(dim=(1, 2, 3), keepdim=True) * direction
        x_0 = x_0 + (scale - 1) * (push - (1 - parallel) * along)
        return diffusion.target(x_0, (x_t - at.alpha * x_0) / at.sigma, t)

    return mix


def norm(x: Images) -> Float[Tensor, "b 1 1 1"]:
    """Return the norm of each sample, at least 1e-12, so that it can be divided by."""
    return torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
