"""Classifier-free guidance (Ho and Salimans 2022), both halves: dropping labels and using their absence."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from diffusion.process import Denoiser


def drop_labels(
    y: Int64[Tensor, " b"], probability: float, num_classes: int, *, uniform: Float[Tensor, " b"]
) -> Int64[Tensor, " b"]:
    """The null label `num_classes` in place of those whose `uniform` draw in [0, 1) falls below `probability`."""
    return torch.where(uniform < probability, num_classes, y)


def guide(
    model: Denoiser, num_classes: int, scale: float, *, channels: int, legacy_cfg_channels: int | None = None
) -> Denoiser:
    """`null + scale * (conditional - null)` on the first `channels` of the output; the others stay conditional.

    Both halves run as one batch. At scale 1 the model itself is returned. `legacy_cfg_channels=3` guides the first
    three channels only, as the published DiT and XSwin samplers do.

    Raises:
        ValueError: when a model without labels is asked for guidance.
    """
    if scale == 1.0:
        return model
    if num_classes == 0:
        raise ValueError(f"--guidance_scale {scale}: the model is unconditional and cannot be guided; use 1")
    guided_channels = legacy_cfg_channels or channels

    def guided(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        null = torch.full_like(y, num_classes)
        output = model(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([y, null]))
        conditional, unconditional = output.chunk(2)
        k = guided_channels
        mixed = torch.lerp(unconditional[:, :k].float(), conditional[:, :k].float(), scale)
        return torch.cat([mixed, conditional[:, k:].float()], dim=1)

    return guided
