"""Guidance: dropping labels in training, and pushing samples away from a worse prediction.

The worse prediction is the model's own without a label (classifier-free, Ho and Salimans 2022) or that of a smaller or
less trained model (autoguidance, Karras et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from diffusion.diffusion import Denoiser, Diffusion

Mix = Callable[[Tensor, Tensor, float, Tensor, Tensor], Tensor]
"""Of (good output, worse output, scale, x_t, t): the guided output."""


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
    """The model pushed away from a worse prediction: by default `null + scale * (conditional - null)`.

    `scale` is 1 + w in the paper's letters: 1 is the conditional model, returned as it is; 0 the
    unconditional one. Both halves run as one batch. All `latent_channels` are guided; a learned variance, in
    the channels above them, stays the conditional one. `legacy_cfg_channels=3` guides the first three only,
    as published DiT samplers do. A `guide_model`, given the same label, takes the place of the unlabelled half.

    Raises:
        ValueError: for a scale other than 1 on a model without labels and no `guide_model`, or more legacy channels
            than there are.
    """
    if scale == 1.0:
        return model
    if num_classes == 0 and guide_model is None:
        raise ValueError(
            f"--guidance_scale {scale}: the model is unconditional, it has no labels to be guided by; use 1"
        )
    guided_channels = latent_channels if legacy_cfg_channels is None else legacy_cfg_channels
    if not 1 <= guided_channels <= latent_channels:
        raise ValueError(f"--legacy_cfg_channels {guided_channels} must lie in 1..{latent_channels}")

    def both(x_t: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if guide_model is not None:
            return model(x_t, t, y).float(), guide_model(x_t, t, y).float()
        null_label = torch.full_like(y, num_classes)
        output = model(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([y, null_label])).float()
        conditional, null = output.chunk(2)
        return conditional, null

    def guided(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        good, worse = both(x_t, t, y)
        part = slice(guided_channels)
        return torch.cat([mix(good[:, part], worse[:, part], scale, x_t[:, part], t), good[:, guided_channels:]], dim=1)

    return guided


# How strong guidance is on the way: the share of `scale - 1` that applies once `progress` of the way from noise (0) to
# data (1) is done. Each has a mean of 1 (Wang et al. 2024, section 4).
SCALE_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 2 * progress,
    "cosine": lambda progress: 1 - math.cos(math.pi * progress),
}


@dataclass(frozen=True)
class Guidance:
    """How guidance of a given scale is applied; by default evenly and as it is.

    Args:
        interval: of noise levels sigma / alpha outside which nothing is guided (Kynkäänniemi et al. 2024).
        schedule: of the scale over the way, by name in `SCALE_SCHEDULES`.
        rescale: share, 0 to 1, by which the guided output's standard deviation is brought back to the unguided one's
            (Lin et al. 2023, eq. 15 and 16).
        parallel: share of the push along the prediction of `x_0` that is kept; that part saturates images. 1 keeps
            it, 0 leaves it out (adaptive projected guidance, Sadat et al. 2024).
        radius: largest norm of a sample's push in `x_0`, before the scale (the same).
        momentum: of the push over the steps; the same recommend it negative, such as -0.5.

    Raises:
        ValueError: for a number out of its range, naming the flag.
    """

    interval: tuple[float, float] = (0.0, math.inf)
    schedule: str = "constant"
    rescale: float = 0.0
    parallel: float = 1.0
    radius: float | None = None
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.interval[0] < self.interval[1]:
            raise ValueError(
                f"--guidance_interval {list(self.interval)}: give the least and the largest noise level sigma / alpha"
            )
        if self.schedule not in SCALE_SCHEDULES:
            raise ValueError(f"--guidance_schedule {self.schedule}: unknown, choose from {', '.join(SCALE_SCHEDULES)}")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"--guidance_rescale {self.rescale} must lie in [0, 1]")
        if self.radius is not None and not self.radius > 0:
            raise ValueError(f"--guidance_radius {self.radius} must be above 0; null sets no limit")
        if not -1 < self.momentum < 1:
            raise ValueError(f"--guidance_momentum {self.momentum} must lie in (-1, 1)")

    def scale_at(self, scale: float, progress: float, ratio: float) -> float:
        """The scale at this share of the way and noise level sigma / alpha; 1 outside the interval."""
        if not self.interval[0] <= ratio <= self.interval[1]:
            return 1.0
        return 1 + (scale - 1) * SCALE_SCHEDULES[self.schedule](progress)

    def mix(self, diffusion: Diffusion) -> Mix:
        """The rule for one chain of samples; momentum remembers."""
        plain = (self.parallel, self.radius, self.momentum) == (1.0, None, 0.0)
        rule = linear if plain else projected(diffusion, self.parallel, self.radius, self.momentum)
        return rescaled(rule, self.rescale) if self.rescale else rule


def rescaled(rule: Mix, share: float) -> Mix:
    """The rule, its output's standard deviation brought back towards the good one's."""

    def mix(good: Tensor, worse: Tensor, scale: float, x_t: Tensor, t: Tensor) -> Tensor:
        mixed = rule(good, worse, scale, x_t, t)
        spread = mixed.std(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)  # an untrained model puts out zeros
        ratio = good.std(dim=(1, 2, 3), keepdim=True) / spread
        return mixed * (share * ratio + (1 - share))

    return mix


def projected(diffusion: Diffusion, parallel: float, radius: float | None, momentum: float) -> Mix:
    """Adaptive projection (Sadat et al. 2024, algorithm 1): the push, in `x_0`, is remembered, limited, projected."""
    before: Tensor | float = 0.0

    def mix(good: Tensor, worse: Tensor, scale: float, x_t: Tensor, t: Tensor) -> Tensor:
        nonlocal before
        at = diffusion.levels(t)
        x_0, worse_x_0 = diffusion.read(good, x_t, at)[0], diffusion.read(worse, x_t, at)[0]
        push = before = x_0 - worse_x_0 + momentum * before
        if radius is not None:
            push = push * (radius / norm(push)).clamp(max=1)
        direction = x_0 / norm(x_0)
        along = (push * direction).sum(dim=(1, 2, 3), keepdim=True) * direction
        x_0 = x_0 + (scale - 1) * (push - (1 - parallel) * along)
        return diffusion.target(x_0, (x_t - at.alpha * x_0) / at.sigma, t)

    return mix


def norm(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 1 1"]:
    """Of each sample; never quite 0, to divide by."""
    return torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
