"""Non-leaking geometric augmentation: the model is conditioned on how each training image was transformed, and on no
transformation when it is sampled (Karras et al. 2022, appendix F.2; transformations: Karras et al. 2020, appendix
B)."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

NUM_CHANGES = 11
"""Length of the vector that describes a change; it is 0 for an unchanged image. In the order of application:

- 0, 1: horizontal and vertical flip, 0 or 1 each
- 2, 3: integer translation to the right and down, in units of `REACH` times the side
- 4: isotropic scaling, log2 of the factor in units of `SPREAD`
- 5, 6: rotation, cos(angle) - 1 and sin(angle)
- 7, 8: anisotropic scaling, log2 of the factor in units of `SPREAD`, times cos and sin of twice the angle of its axis,
  so that stretching along an axis and shrinking across it have the same description
- 9, 10: fractional translation to the right and down, in units of `REACH` times the side
"""

Changes = Float[Tensor, "b 11"]
Pixels = UInt8[Tensor, "b c h w"]
SPREAD = 0.2  # standard deviation of log2 of the scaling factors
REACH = 1 / 8  # of the side: the largest integer translation, and the standard deviation of fractional ones


def sample_augmentation(
    probability: float, mirrored: Int64[Tensor, " b"], size: tuple[int, int], generator: torch.Generator
) -> Changes:
    """Sample the changes of a batch of images of a size (height, width). Each kind of change is applied with this
    `probability`, a vertical flip with half of it; `mirrored` is 1 for images that were already flipped horizontally.
    """
    num, options = len(mirrored), {"generator": generator, "device": mirrored.device}
    applied = torch.rand(6, num, **options) < probability
    uniform, normal = 2 * torch.rand(5, num, **options) - 1, torch.randn(4, num, **options)
    max_shift = REACH * torch.tensor([size[1], size[0]], device=mirrored.device)[:, None]
    angle, axis = math.pi * uniform[3], math.pi * uniform[4]
    rows = [
        mirrored[None].float(),
        applied[:1] * (uniform[:1] < 0).float(),
        applied[1] * (uniform[1:3] * max_shift).round() / max_shift,
        applied[2] * normal[:1],
        applied[3] * torch.stack([angle.cos() - 1, angle.sin()]),
        applied[4] * normal[1] * torch.stack([axis.cos(), axis.sin()]),
        applied[5] * normal[2:],
    ]
    return torch.cat(rows).T.contiguous()


def apply_augmentation(images: Pixels, changes: Changes) -> Pixels:
    """Apply changes to images that are already flipped horizontally where the change says so; pad by reflection.

    Vertical flips and integer translations move pixels without interpolation. The other changes resample the image:
    bicubic interpolation at twice the resolution, followed by antialiased bicubic downsampling.
    """
    _, flip, shift_x, shift_y, scale, cos, sin, stretch_cos, stretch_sin, fraction_x, fraction_y = changes.T
    unflip = torch.diag_embed(torch.stack([torch.ones_like(scale), 1 - 2 * flip], dim=1))
    moved = _warp(images.float(), unflip, torch.stack([shift_x, shift_y], dim=1), 1, "nearest")

    log_stretch = math.log(2) * SPREAD * torch.hypot(stretch_cos, stretch_sin)
    axis = torch.atan2(stretch_sin, stretch_cos)
    even, cosine, sine = log_stretch.cosh(), log_stretch.sinh() * axis.cos(), log_stretch.sinh() * axis.sin()
    unstretch = torch.stack([even - cosine, -sine, -sine, even + cosine], dim=1).view(-1, 2, 2)
    unrotate = torch.stack([1 + cos, sin, -sin, 1 + cos], dim=1).view(-1, 2, 2)
    inverse = torch.exp2(-SPREAD * scale)[:, None, None] * unrotate @ unstretch
    resampled = _warp(moved, inverse, torch.stack([fraction_x, fraction_y], dim=1), 2, "bicubic")
    resampled = F.interpolate(resampled, images.shape[-2:], mode="bicubic", antialias=True)
    is_resampled = (changes[:, 4:] != 0).any(dim=1)[:, None, None, None]
    return torch.where(is_resampled, resampled.round().clamp(0, 255), moved).to(torch.uint8)


def _warp(
    images: Tensor, inverse: Float[Tensor, "b 2 2"], shift: Float[Tensor, "b 2"], factor: int, mode: str
) -> Tensor:
    """Apply a linear map and then a translation to images, and sample the result at `factor` times the resolution.
    `inverse` is that of the map, which acts on (x, y) in pixels from the centre; `shift` is in units of `REACH` times
    the sides."""
    num, channels, height, width = images.shape
    inverse = inverse * inverse.new_tensor([[1, height / width], [width / height, 1]])  # now of x and y in [-1, 1]
    theta = torch.cat([inverse, -inverse @ (2 * REACH * shift)[:, :, None]], dim=2)
    grid = F.affine_grid(theta, [num, channels, factor * height, factor * width], align_corners=False)
    return F.grid_sample(images, grid, mode, padding_mode="reflection", align_corners=False)
