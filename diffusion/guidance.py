"""Classifier-free guidance (Ho and Salimans 2022), both halves: dropping labels and using their absence."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from diffusion.process import Denoiser


def drop_labels(
    y: Int64[Tensor, " b"],
    probability: float,
    num_classes: int,
    *,
    generator: torch.Generator | None = None,
    uniform: Float[Tensor, " b"] | None = None,
) -> Int64[Tensor, " b"]:
    """Labels with each replaced, with `probability`, by the null label `num_classes` (algorithm 1).

    A label falls where its draw in [0, 1) is below `probability`: the given `uniform` (a trainer's share of a
    draw for the whole batch) or one from `generator`, which lies on `y`'s device.
    """
    if uniform is None:
        uniform = torch.rand(y.shape, generator=generator, device=y.device)
    return torch.where(uniform < probability, num_classes, y)


def guide(
    model: Denoiser,
    num_classes: int,
    scale: float,
    *,
    latent_channels: int,
    legacy_cfg_channels: int | None = None,
) -> Denoiser:
    """The model pushed away from its unlabelled self: `null + scale * (conditional - null)` (eq. 6).

    `scale` is 1 + w in the paper's letters: 1 is the conditional model, returned as it is; 0 the
    unconditional one. Both halves run as one batch. All `latent_channels` are guided; a learned variance, in
    the channels above them, stays the conditional one. `legacy_cfg_channels=3` guides the first three only,
    as published DiT samplers do.

    Raises:
        ValueError: for a scale other than 1 on a model without labels, or more legacy channels than there
            are.
    """
    if scale == 1.0:
        return model
    if num_classes == 0:
        raise ValueError(
            f"--guidance_scale {scale}: the model is unconditional, it has no labels to be guided by; use 1"
        )
    guided_channels = latent_channels if legacy_cfg_channels is None else legacy_cfg_channels
    if not 1 <= guided_channels <= latent_channels:
        raise ValueError(f"--legacy_cfg_channels {guided_channels} must lie in 1..{latent_channels}")

    def guided(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        null_label = torch.full_like(y, num_classes)
        output = model(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([y, null_label])).float()
        conditional, null = output.chunk(2)
        mixed = torch.lerp(null[:, :guided_channels], conditional[:, :guided_channels], scale)
        return torch.cat([mixed, conditional[:, guided_channels:]], dim=1)

    return guided
