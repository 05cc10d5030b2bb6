"""Self-attention over an image: among its pixels, or among its channels."""

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from models.layers.attention import SelfAttention, attend, zero_
from models.layers.residual import group_norm


class ChannelAttention(nn.Module):
    """Self-attention whose tokens are the channels and whose width is the pixels: maps of `d x d`.

    Queries, keys and values are pointwise in the pixels, so the parameters are those of `SelfAttention`, by name and by
    shape, and images may have any size; linears over the pixels would tie a model to one size and hold `(h w)^2`
    weights each (17 million at 64x64). Heads take bands of pixels, the last one filled up with zeros, which change no
    product.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
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

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        return x + rearrange(self.attention(tokens), "b (h w) c -> b c h w", h=x.shape[2])
