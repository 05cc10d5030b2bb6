"""Layers of U-Nets: residual block, attention over an image, downsampling and upsampling."""

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from models.layers import Cond, Images, Output, Tokens
from models.layers.attention import SelfAttention, attend
from models.layers.initialisation import zero_

NUM_GROUPS = 8


def group_norm(channels: int) -> nn.GroupNorm:
    """Make a group norm (Wu and He 2018), which unlike a batch norm does not depend on the other images of a batch."""
    if channels % NUM_GROUPS:
        raise ValueError(f"{channels} channels: every width of a U-Net must be a multiple of {NUM_GROUPS}")
    return nn.GroupNorm(NUM_GROUPS, channels)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each after a norm and SiLU; the conditioning is added between them (Ho et al. 2020). The
    second convolution is zero-initialised, so the block starts as its shortcut."""

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
    """Self-attention among channels, with attention maps of `d x d`.

    Queries, keys and values are computed pixel by pixel, so the parameters are those of `SelfAttention` and images may
    have any size. Each head takes a band of pixels; the last band is padded with zeros, which change no product.
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
    """A residual branch of a norm and self-attention over pixels or channels; starts as the identity."""

    def __init__(self, channels: int, num_heads: int, axis: str) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.attention = ATTENTIONS[axis](channels, num_heads)
        zero_(self.attention.proj)

    def forward(self, x: Images) -> Images:
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        return x + rearrange(self.attention(tokens), "b (h w) c -> b c h w", h=x.shape[2])


class Downsample(nn.Conv2d):
    """A 3x3 convolution of stride two: halves each side, rounding up."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2, padding=1)


class TransposedUpsample(nn.Module):
    """A transposed convolution that doubles each side, cropped to `size`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)

    def forward(self, x: Images, size: tuple[int, int]) -> Float[Tensor, "b c h2 w2"]:
        return self.conv(x)[:, :, : size[0], : size[1]]


class NearestUpsample(nn.Module):
    """Nearest-neighbour upsampling and a 3x3 convolution, without checkerboard artefacts (Odena et al. 2016)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Images, size: tuple[int, int]) -> Float[Tensor, "b c h2 w2"]:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


UPSAMPLERS = {"transposed": TransposedUpsample, "nearest": NearestUpsample}
