"""What the decoder of a hourglass takes from its encoder."""

from jaxtyping import Float
from torch import Tensor, nn

from models.layers.modulation import Injection
from models.layers.window import WindowCrossAttention


class CrossAttentionSkip(nn.Module):
    """What the encoder's skip says to each window of the decoder: cross attention, normalised."""

    def __init__(self, dim: int, num_heads: int, injection: Injection, window_size: int | None) -> None:
        super().__init__()
        self.dim = dim
        self.modulator_x = injection.modulator(dim)
        self.modulator_skip = injection.modulator(dim)
        self.attention = WindowCrossAttention(dim, num_heads, window_size)
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, x: Float[Tensor, "b h w d"], skip: Float[Tensor, "b h w d"], cond: Tensor
    ) -> Float[Tensor, "b h w d"]:
        return self.norm(self.attention(self.modulator_x(x, cond), self.modulator_skip(skip, cond)))


class ConcatSkip(nn.Module):
    """The encoder's skip as it is (Ronneberger et al. 2015)."""

    def __init__(self, dim: int, num_heads: int, injection: Injection, window_size: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(
        self, x: Float[Tensor, "b h w d"], skip: Float[Tensor, "b h w d"], cond: Tensor
    ) -> Float[Tensor, "b h w d"]:
        return skip


class NoSkip(nn.Module):
    """Nothing of the encoder's: an hourglass."""

    def __init__(self, dim: int, num_heads: int, injection: Injection, window_size: int) -> None:
        super().__init__()
        self.dim = 0

    def forward(
        self, x: Float[Tensor, "b h w d"], skip: Float[Tensor, "b h w d"], cond: Tensor
    ) -> Float[Tensor, "b h w 0"]:
        return skip[..., :0]


def global_cross_attention_skip(dim: int, num_heads: int, injection: Injection, window_size: int) -> nn.Module:
    """Cross attention of every token of the decoder to every token of the skip: one window, the whole grid."""
    return CrossAttentionSkip(dim, num_heads, injection, None)


SKIPS = {
    "cross_attention": CrossAttentionSkip,
    "global_cross_attention": global_cross_attention_skip,
    "concat": ConcatSkip,
    "none": NoSkip,
}
