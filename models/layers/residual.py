"""Bricks of U-Nets: the residual block, attention over an image, and the steps between resolutions."""

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from models.layers import Cond, Images, Output, Tokens
from models.layers.attention import SelfAttention, attend
from models.layers.initialisation import zero_

NUM_GROUPS = 8  # of every group norm


def group_norm(channels: int) -> nn.GroupNorm:
    """Norm over groups of channels (Wu and He 2018): unlike a batch norm, the same for one image and for many."""
    if channels % NUM_GROUPS:
        raise ValueError(f"{channels} channels: every width of a U-Net must be a multiple of {NUM_GROUPS}")
    return nn.GroupNorm(NUM_GROUPS, channels)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each after norm and SiLU; the conditioning is added between them (Ho et al. 2020). The
    second one starts at zero: at first the block is its shortcut."""

    def __init__(self, in_channels: int, out_channels: int, cond_dim: int, *, dropout: float) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.cond = nn.Linear(cond_dim, out_channels)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Images, cond: Cond) -> Output:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = hidden + rearrange(self.cond(cond), "b c -> b c 1 1")
        hidden = self.conv2(self.dropout(F.silu(self.norm2(hidden))))
        return self.shortcut(x) + hidden


class ChannelAttention(nn.Module):
    """Self-attention whose tokens are the channels and whose width is the pixels: maps of `d x d`.

    Queries, keys and values are pointwise in the pixels, so the parameters are those of `SelfAttention`, and images may
    have any size. Heads take bands of pixels, the last one filled up with zeros, which change no product.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tokens) -> Tokens:
        num_pixels = x.shape[1]
        qkv = F.pad(self.qkv(x), (0, 0, 0, -num_pixels % self.num_heads))
        q, k, v = rearrange(qkv, "b (k e) (three d) -> three b k d e", three=3, k=self.num_heads)
        x = rearrange(attend(q, k, v), "b k d e -> b (k e) d")
        return self.proj(x[:, :num_pixels])


ATTENTIONS = {"pixels": SelfAttention, "channels": ChannelAttention}


class ImageAttention(nn.Module):
    """Norm, self-attention along an axis of `ATTENTIONS`, residual; starts as the identity."""

    def __init__(self, channels: int, num_heads: int, axis: str) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.attention = ATTENTIONS[axis](channels, num_heads)
        zero_(self.attention.proj)

    def forward(self, x: Images) -> Images:
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        return x + rearrange(self.attention(tokens), "b (h w) c -> b c h w", h=x.shape[2])


class Downsample(nn.Conv2d):
    """Half the side, rounded up: a 3x3 convolution of stride two."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2, padding=1)


class TransposedUpsample(nn.Module):
    """Twice the side by a transposed convolution, cut to the size that was halved."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)

    def forward(self, x: Images, size: tuple[int, int]) -> Float[Tensor, "b c h2 w2"]:
        return self.conv(x)[:, :, : size[0], : size[1]]


class NearestUpsample(nn.Module):
    """The nearest pixel, then a 3x3 convolution: no chequerboards (Odena et al. 2016)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Images, size: tuple[int, int]) -> Float[Tensor, "b c h2 w2"]:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


UPSAMPLERS = {"transposed": TransposedUpsample, "nearest": NearestUpsample}
