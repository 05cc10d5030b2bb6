"""Windows over a grid of tokens: partition, shift, padding, attention inside them, and what skips say to them."""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from models.layers import Cond, Grid
from models.layers.attention import CrossAttention, attend, check_heads, make_qk_norms
from models.layers.modulation import Injection
from models.layers.style import BlockStyle


class Windows:
    """The windows of an `h x w` grid, shifted by `shift` along each axis that holds more than one. Far edges are
    padded. Tokens attend to those of their window that were neighbours before the shift; nothing attends to padding."""

    def __init__(self, height: int, width: int, window_size: int, shift: int = 0) -> None:
        self.height, self.width, self.size = height, width, window_size
        self.padded = tuple(math.ceil(side / window_size) * window_size for side in (height, width))
        self.shifts = tuple(shift if side > window_size else 0 for side in self.padded)

    def partition(self, x: Grid) -> Float[Tensor, "b windows n d"]:
        """The windows of each image, row by row, each a sequence of tokens."""
        x = F.pad(x, (0, 0, 0, self.padded[1] - self.width, 0, self.padded[0] - self.height))
        if any(self.shifts):
            x = x.roll((-self.shifts[0], -self.shifts[1]), dims=(1, 2))
        return rearrange(x, "b (nh p) (nw q) d -> b (nh nw) (p q) d", p=self.size, q=self.size)

    def merge(self, x: Float[Tensor, "b windows n d"]) -> Grid:
        """The inverse of `partition`, padding cut off."""
        nh, nw = (side // self.size for side in self.padded)
        x = rearrange(x, "b (nh nw) (p q) d -> b (nh p) (nw q) d", nh=nh, nw=nw, p=self.size)
        if any(self.shifts):
            x = x.roll(self.shifts, dims=(1, 2))
        return x[:, : self.height, : self.width]

    def mask(self, device: torch.device) -> Bool[Tensor, "windows n n"] | None:
        """Which tokens of a window may attend to which; None where all may."""
        if not any(self.shifts) and self.padded == (self.height, self.width):
            return None
        return _mask(self.height, self.width, self.size, self.padded, self.shifts, device)


@torch.compiler.assume_constant_result
@lru_cache(maxsize=64)
def _mask(
    height: int, width: int, size: int, padded: tuple[int, int], shifts: tuple[int, int], device: torch.device
) -> Bool[Tensor, "windows n n"]:
    with torch.inference_mode(False):  # kept for training, even when first needed while sampling
        regions = []
        for side, full, shift in zip((height, width), padded, shifts, strict=True):
            position = (torch.arange(full) + shift) % full
            wrapped = torch.arange(full) >= full - shift
            regions.append(torch.where(position >= side, 2, wrapped.long()))
        region = 3 * regions[0][:, None] + regions[1]
        region = rearrange(region, "(nh p) (nw q) -> (nh nw) (p q)", p=size, q=size)
        return (region[:, :, None] == region[:, None, :]).to(device)


class ContinuousPositionBias(nn.Module):
    """Log-spaced continuous position bias of Swin V2 (Liu et al. 2022, section 3.3): `16 sigmoid(mlp(offset))`."""

    def __init__(self, window_size: int, num_heads: int, hidden_dim: int = 512) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, num_heads, bias=False))
        w = window_size
        offsets = torch.arange(1 - w, w, dtype=torch.float32) * 8 / max(1, w - 1)
        offsets = offsets.sign() * torch.log2(offsets.abs() + 1) / 3  # log2(8) = 3
        row, column = torch.arange(w).repeat_interleave(w), torch.arange(w).repeat(w)
        index = (row[:, None] - row + w - 1) * (2 * w - 1) + (column[:, None] - column + w - 1)
        self.register_buffer("table", torch.cartesian_prod(offsets, offsets), persistent=False)
        self.register_buffer("index", index, persistent=False)

    def forward(self) -> Float[Tensor, "k n n"]:
        bias = 16 * self.mlp(self.table).float().sigmoid()  # [offsets k]
        return rearrange(bias[self.index], "n m k -> k n m")


class GivenBias(nn.Linear):
    """A linear layer whose bias is given to it at each call."""

    def forward(self, x: Float[Tensor, "*axes d"], bias: Float[Tensor, " e"]) -> Float[Tensor, "*axes e"]:
        return F.linear(x, self.weight, bias)


class WindowAttention(nn.Module):
    """Cosine self-attention inside (shifted) windows, with continuous position bias (Swin V2, Liu et al. 2022); keys
    have no bias. A `token` that is not part of the image may be attended to from every window.

    Lengths of queries and keys are one at any rate, and a temperature for each head is learned: what `qk_norm` adds is
    a scale a channel.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int, *, shifted: bool, qk_norm: bool = False) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads, self.window_size = num_heads, window_size
        self.shift = window_size // 2 if shifted else 0
        self.qkv = GivenBias(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.q_norm, self.k_norm = make_qk_norms(qk_norm, dim // num_heads)
        self.proj = nn.Linear(dim, dim)
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10)))
        self.position_bias = ContinuousPositionBias(window_size, num_heads)

    def forward(self, x: Grid, token: Float[Tensor, "b 1 d"] | None = None) -> Grid:
        windows = Windows(x.shape[1], x.shape[2], self.window_size, self.shift)
        x = windows.partition(x)  # [b windows n d]
        num_queries = x.shape[2]
        if token is not None:
            x = torch.cat([x, token[:, None].expand(-1, x.shape[1], -1, -1)], dim=2)
        qkv = self.qkv(x, torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]))
        q, k, v = rearrange(qkv, "b w n (three k e) -> three b (w k) n e", three=3, k=self.num_heads)
        scale = self.logit_scale.clamp(max=math.log(100)).exp()
        q, k = self.q_norm(q), self.k_norm(k)
        q, k = to_length(q, scale.repeat(x.shape[1], 1, 1)), to_length(k)
        bias = self.position_bias().expand(x.shape[1], -1, -1, -1)  # [windows k n n]
        mask = windows.mask(x.device)
        bias = bias if mask is None else bias.masked_fill(~mask[:, None], -torch.inf)
        bias = bias if token is None else F.pad(bias, (0, 1))
        x = attend(q[..., :num_queries, :], k, v, bias=rearrange(bias, "w k n m -> (w k) n m"), scale=1.0)
        return windows.merge(self.proj(rearrange(x, "b (w k) n e -> b w n (k e)", k=self.num_heads)))


def to_length(x: Float[Tensor, "b k n e"], length: Float[Tensor, "k 1 1"] | float = 1.0) -> Float[Tensor, "b k n e"]:
    """Vectors of a given length: as `F.normalize` and a product, in little more than half of the time."""
    return x * (length / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-12))


class WindowCrossAttention(nn.Module):
    """Queries from `x`, keys and values from the same window of `context`; without a window size, of the whole grid."""

    def __init__(self, dim: int, num_heads: int, window_size: int | None, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.window_size = window_size
        self.attention = CrossAttention(dim, num_heads, qk_norm=qk_norm)

    def forward(self, x: Grid, context: Grid) -> Grid:
        windows = Windows(x.shape[1], x.shape[2], self.window_size or max(x.shape[1:3]))
        x, context = windows.partition(x), windows.partition(context)
        mask = windows.mask(x.device)
        return windows.merge(self.attention(x, context, None if mask is None else mask[:, None]))


class CrossAttentionSkip(nn.Module):
    """What the encoder's skip says to each window of the decoder: cross attention, normalised."""

    def __init__(
        self, dim: int, num_heads: int, injection: Injection, style: BlockStyle, window_size: int | None
    ) -> None:
        super().__init__()
        self.dim = dim
        self.modulator_x = injection.modulator(dim)
        self.modulator_skip = injection.modulator(dim)
        self.attention = WindowCrossAttention(dim, num_heads, window_size, qk_norm=style.qk_norm)
        self.norm = style.make_norm(dim)

    def forward(self, x: Grid, skip: Grid, cond: Cond) -> Grid:
        return self.norm(self.attention(self.modulator_x(x, cond), self.modulator_skip(skip, cond)))


class ConcatSkip(nn.Module):
    """The encoder's skip as it is (Ronneberger et al. 2015)."""

    def __init__(self, dim: int, num_heads: int, injection: Injection, style: BlockStyle, window_size: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Grid, skip: Grid, cond: Cond) -> Grid:
        return skip


class NoSkip(ConcatSkip):
    """Nothing of the encoder's: an hourglass."""

    def __init__(self, dim: int, num_heads: int, injection: Injection, style: BlockStyle, window_size: int) -> None:
        super().__init__(0, num_heads, injection, style, window_size)

    def forward(self, x: Grid, skip: Grid, cond: Cond) -> Float[Tensor, "b h w 0"]:
        return skip[..., :0]


SKIPS: dict[str, Callable[[int, int, Injection, BlockStyle, int], nn.Module]] = {
    "cross_attention": CrossAttentionSkip,
    "global_cross_attention": lambda dim, heads, injection, style, _: CrossAttentionSkip(
        dim, heads, injection, style, window_size=None
    ),
    "concat": ConcatSkip,
    "none": NoSkip,
}
