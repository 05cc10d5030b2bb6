"""Geometric augmentation that does not leak into samples: a training image is changed, the model is told how, and is
told of no change when it is sampled (Karras et al. 2022, appendix F.2; the changes: Karras et al. 2020, appendix B)."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

NUM_CHANGES = 11
"""Numbers that say all of a change, in the order in which it is made, all 0 where there is none: mirrored; upside down;
whole pixels to the right and down, over an eighth of the side; log2 of the size, over `SPREAD`; the angle, cos - 1 and
sin; log2 of the stretch along an axis, over `SPREAD`, times cos and sin of twice the axis' angle, which is the same for
the two ways to say it; any way to the right and down, over an eighth of the side."""

Changes = Float[Tensor, "b 11"]
Pixels = UInt8[Tensor, "b c h w"]
SPREAD = 0.2  # standard deviation of log2 of size and stretch
REACH = 1 / 8  # of the sides: the farthest in whole pixels, and the standard deviation of any way


def draw_changes(
    probability: float, mirrored: Int64[Tensor, " b"], size: tuple[int, int], generator: torch.Generator
) -> Changes:
    """Changes of images of this height and width, which are mirrored already, each by this probability and of its own;
    upside down is half of those. The generator lies where `mirrored` does."""
    num, where = len(mirrored), {"generator": generator, "device": mirrored.device}
    chosen = torch.rand(6, num, **where) < probability
    uniform, normal = 2 * torch.rand(5, num, **where) - 1, torch.randn(4, num, **where)
    steps = REACH * torch.tensor([size[1], size[0]], device=mirrored.device)[:, None]
    turned, axis = math.pi * uniform[3], math.pi * uniform[4]
    rows = [
        mirrored[None].float(),
        chosen[:1] * (uniform[:1] < 0).float(),
        chosen[1] * (uniform[1:3] * steps).round() / steps,
        chosen[2] * normal[:1],
        chosen[3] * torch.stack([turned.cos() - 1, turned.sin()]),
        chosen[4] * normal[1] * torch.stack([axis.cos(), axis.sin()]),
        chosen[5] * normal[2:],
    ]
    return torch.cat(rows).T.contiguous()


def change(images: Pixels, changes: Changes) -> Pixels:
    """The images, mirrored already, changed so; what lies beyond their edges is their reflection. Pixels move as they
    are where they all can, else they are drawn anew: by cubic interpolation at twice the resolution, averaged with a
    cubic filter."""
    _, upside_down, right, down, size, cos, sin, along, across, on_right, on_down = changes.T
    upright = torch.diag_embed(torch.stack([torch.ones_like(size), 1 - 2 * upside_down], dim=1))
    moved = _warp(images.float(), upright, torch.stack([right, down], dim=1), 1, "nearest")

    stretch, axis = math.log(2) * SPREAD * torch.hypot(along, across), torch.atan2(across, along)
    even, cosine, sine = stretch.cosh(), stretch.sinh() * axis.cos(), stretch.sinh() * axis.sin()
    unstretch = torch.stack([even - cosine, -sine, -sine, even + cosine], dim=1).view(-1, 2, 2)
    unturn = torch.stack([1 + cos, sin, -sin, 1 + cos], dim=1).view(-1, 2, 2)
    inverse = torch.exp2(-SPREAD * size)[:, None, None] * unturn @ unstretch
    drawn = _warp(moved, inverse, torch.stack([on_right, on_down], dim=1), 2, "bicubic")
    drawn = F.interpolate(drawn, images.shape[-2:], mode="bicubic", antialias=True)
    is_drawn = (changes[:, 4:] != 0).any(dim=1)[:, None, None, None]
    return torch.where(is_drawn, drawn.round().clamp(0, 255), moved).to(torch.uint8)


def _warp(
    images: Tensor, inverse: Float[Tensor, "b 2 2"], shift: Float[Tensor, "b 2"], factor: int, mode: str
) -> Tensor:
    """At `factor` times the resolution: images that went through a matrix, whose inverse is given, of x and y in pixels
    from the middle, and then were shifted by `REACH` of the sides times `shift`."""
    count, channels, height, width = images.shape
    inverse = inverse * inverse.new_tensor([[1, height / width], [width / height, 1]])  # of x and y from -1 to 1
    come_from = torch.cat([inverse, -inverse @ (2 * REACH * shift)[:, :, None]], dim=2)
    grid = F.affine_grid(come_from, [count, channels, factor * height, factor * width], align_corners=False)
    return F.grid_sample(images, grid, mode, padding_mode="reflection", align_corners=False)
