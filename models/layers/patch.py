"""Conversions between images and tokens: patches, patch merging and expanding, and convolutional stems."""

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from models.layers import Cond, Grid, Images
from models.layers.modulation import ConditioningLayers, PassThrough
from models.layers.style import BlockStyle


def patchify(x: Images, patch_size: int) -> Float[Tensor, "b n patch"]:
    """Flatten each patch to a vector in the order (channel, row, column); patches are in row-major order."""
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=patch_size, q=patch_size)


def unpatchify(x: Float[Tensor, "b n patch"], grid: tuple[int, int], patch_size: int) -> Images:
    """Assemble an image from patches, each a vector in the order (row, column, channel), unlike in `patchify`."""
    p = patch_size
    return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], w=grid[1], p=p, q=p)


def check_input_size(input_size: int | tuple[int, int], patch_size: int, name: str = "patch_size") -> tuple[int, int]:
    """Return height and width; raise `ValueError` unless `patch_size` divides both."""
    height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
    if height % patch_size or width % patch_size:
        raise ValueError(f"{name}={patch_size} must divide the {height}x{width} input")
    return height, width


class PatchMerging(nn.Module):
    """Halves the grid and doubles the width: concatenates 2x2 neighbours, then a linear layer and a norm (Swin V2). Odd
    sides are padded."""

    def __init__(self, dim: int, cond_layers: ConditioningLayers, style: BlockStyle) -> None:
        super().__init__()
        self.modulator = cond_layers.modulator(dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = style.make_norm(2 * dim)

    def forward(self, x: Grid, cond: Cond) -> Float[Tensor, "b h2 w2 d2"]:
        x = self.modulator(x, cond)
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = rearrange(x, "b (h p) (w q) d -> b h w (q p d)", p=2, q=2)
        return self.norm(self.reduction(x))


class PatchExpanding(nn.Module):
    """Doubles the grid and halves the width: a linear layer, a norm and a pixel shuffle, cropped to `size`."""

    def __init__(self, dim: int, cond_layers: ConditioningLayers, style: BlockStyle) -> None:
        super().__init__()
        self.modulator = cond_layers.modulator(dim)
        self.expansion = nn.Linear(dim, 2 * dim, bias=False)
        self.norm = style.make_norm(2 * dim)

    def forward(self, x: Grid, cond: Cond, size: tuple[int, int]) -> Float[Tensor, "b h2 w2 d2"]:
        x = self.norm(self.expansion(self.modulator(x, cond)))
        x = rearrange(x, "b h w (p q d) -> b (h p) (w q) d", p=2, q=2)
        return x[:, : size[0], : size[1]]


class ConvStem(nn.Module):
    """Three modulated 3x3 convolutions, each followed by a norm and a leaky ReLU."""

    def __init__(self, in_channels: int, dim: int, cond_layers: ConditioningLayers, norm: str) -> None:
        super().__init__()
        self.out_channels = dim
        widths = [in_channels, dim, dim]
        self.modulators = nn.ModuleList(map(cond_layers.modulator, widths))
        self.convs = nn.ModuleList(nn.Conv2d(width, dim, 3, padding=1) for width in widths)
        self.norms = nn.ModuleList(CONV_NORMS[norm](dim) for _ in widths)
        self.activation = nn.LeakyReLU()

    def forward(self, x: Images, cond: Cond) -> Float[Tensor, "b d h w"]:
        for modulator, conv, norm in zip(self.modulators, self.convs, self.norms, strict=True):
            x = self.activation(norm(conv(modulate_image(modulator, x, cond))))
        return x


class NoStem(PassThrough):
    """Returns the image unchanged, in the place of a stem."""

    def __init__(self, in_channels: int, *_: object) -> None:
        super().__init__()
        self.out_channels = in_channels


STEMS = {"convolutions": ConvStem, "none": NoStem}
CONV_NORMS = {"batch": nn.BatchNorm2d, "group": lambda dim: nn.GroupNorm(min(32, dim // 4), dim)}


def modulate_image(modulator: nn.Module, x: Images, cond: Cond) -> Images:
    """Apply a modulator, which expects channels last, to an image."""
    return rearrange(modulator(rearrange(x, "b c h w -> b h w c"), cond), "b h w c -> b c h w")
