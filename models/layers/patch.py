"""Between resolutions: pixels and patches, patch merging and its mirror."""

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from models.layers.modulation import Injection


def patchify(x: Float[Tensor, "b c h w"], patch_size: int) -> Float[Tensor, "b n patch"]:
    """Patches, row by row, as vectors of channels, rows and columns."""
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=patch_size, q=patch_size)


def unpatchify(x: Float[Tensor, "b n patch"], grid: tuple[int, int], patch_size: int) -> Float[Tensor, "b c h w"]:
    """Vectors of rows, columns and channels back to an image."""
    p = patch_size
    return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], w=grid[1], p=p, q=p)


def check_input_size(input_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Height and width; fails in words when the patch does not divide them."""
    height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
    if height % patch_size or width % patch_size:
        raise ValueError(f"patch_size={patch_size} must divide the {height}x{width} input")
    return height, width


class PatchMerging(nn.Module):
    """Half the side, twice the width: four neighbours joined, a linear, a norm (Swin V2). Odd sides are padded."""

    def __init__(self, dim: int, injection: Injection) -> None:
        super().__init__()
        self.modulator = injection.modulator(dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Float[Tensor, "b h w d"], cond: Tensor) -> Float[Tensor, "b h2 w2 d2"]:
        x = self.modulator(x, cond)
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = rearrange(x, "b (h p) (w q) d -> b h w (q p d)", p=2, q=2)
        return self.norm(self.reduction(x))


class PatchExpanding(nn.Module):
    """Twice the side, half the width: a linear, a norm, a pixel shuffle; cut to the grid that was merged."""

    def __init__(self, dim: int, injection: Injection) -> None:
        super().__init__()
        self.modulator = injection.modulator(dim)
        self.expansion = nn.Linear(dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Float[Tensor, "b h w d"], cond: Tensor, size: tuple[int, int]) -> Float[Tensor, "b h2 w2 d2"]:
        x = self.norm(self.expansion(self.modulator(x, cond)))
        x = rearrange(x, "b h w (p q d) -> b (h p) (w q) d", p=2, q=2)
        return x[:, : size[0], : size[1]]
