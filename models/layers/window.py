"""Windows over a grid of tokens: partition, shift, padding, attention inside them, and what skips say to them."""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor, nn

from models.layers import Cond, Grid
from models.layers.attention import CrossAttention, attend, check_heads, make_qk_norms
from models.layers.launches import Uncast, at_once, without_autocast
from models.layers.modulation import Injection
from models.layers.style import BlockStyle

TILE = 8  # the side, in tokens, of what attends in one go on devices where launches count


def tile_side(window_size: int, x: Tensor) -> int:
    """Side of the tiles of windows of this size: a window, or as many as fit."""
    return max(1, TILE // window_size) * window_size if at_once(x) else window_size


class Windows:
    """The windows of an `h x w` grid, shifted by `shift` along each axis that holds more than one. Tokens attend to
    those of their window; nothing attends to what is beyond the grid.

    They are dealt out in tiles of one window each, or of as many as fit into `tile` tokens along an axis. A grid that
    fits is a tile as it is; of others far edges are padded.
    """

    def __init__(self, height: int, width: int, window_size: int, shift: int = 0, tile: int | None = None) -> None:
        self.height, self.width, self.size = height, width, window_size
        sides, tile = (height, width), tile or window_size
        self.tile = tuple(min(side, tile) for side in sides)
        self.padded = tuple(math.ceil(side / part) * part for side, part in zip(sides, self.tile, strict=True))
        self.shifts = tuple(shift if side > window_size else 0 for side in sides)
        self.rolls = tuple(shift if side > tile else 0 for side in sides)

    def partition(self, x: Grid) -> Float[Tensor, "b tiles n d"]:
        """The tiles of each image, row by row, each a sequence of tokens."""
        if self.padded != (self.height, self.width):
            x = F.pad(x, (0, 0, 0, self.padded[1] - self.width, 0, self.padded[0] - self.height))
        if any(self.rolls):
            x = x.roll((-self.rolls[0], -self.rolls[1]), dims=(1, 2))
        p, q = self.tile
        return rearrange(x, "b (nh p) (nw q) d -> b (nh nw) (p q) d", p=p, q=q)

    def merge(self, x: Float[Tensor, "b tiles n d"]) -> Grid:
        """The inverse of `partition`, padding cut off."""
        p, q = self.tile
        x = rearrange(x, "b (nh nw) (p q) d -> b (nh p) (nw q) d", nh=self.padded[0] // p, p=p, q=q)
        if any(self.rolls):
            x = x.roll(self.rolls, dims=(1, 2))
        return x[:, : self.height, : self.width]

    def mask(self, device: torch.device) -> Float[Tensor, "tiles n n"] | None:
        """To be added to logits: 0 where a token of a tile may attend to another, else -inf; None where all may."""
        if max(self.tile) <= self.size and not any(self.rolls) and self.padded == (self.height, self.width):
            return None
        return _mask(self.size, (self.height, self.width), self.padded, self.tile, self.shifts, self.rolls, device)

    def offsets(self, device: torch.device) -> Int64[Tensor, "n n"]:
        """How far each token of a tile lies from each other one, as a number; of a window's tokens, that of the offset
        among the `(2 size - 1)^2` that there are, row by row."""
        return _offsets(self.size, self.tile, device)


Pair = tuple[int, ...]  # of rows and columns


@torch.compiler.assume_constant_result
@lru_cache(maxsize=64)
def _mask(
    size: int, sides: Pair, padded: Pair, tile: Pair, shifts: Pair, rolls: Pair, device: torch.device
) -> Float[Tensor, "tiles n n"]:
    with torch.inference_mode(False):  # kept for training, even when first needed while sampling
        windows = []  # of each place along an axis; what lies beyond the grid is in one of its own
        for side, length, shift, roll in zip(sides, padded, shifts, rolls, strict=True):
            position = (torch.arange(length, device=device) + roll) % length
            windows.append(torch.where(position < side, (position - shift) // size, length))
        rows, columns = windows
        window = rows[:, None] * 2 * len(columns) + columns
        window = rearrange(window, "(nh p) (nw q) -> (nh nw) (p q)", p=tile[0], q=tile[1])
        if sides == padded and not any(rolls):
            window = window[:1]  # all tiles are alike
        together = window[:, :, None] == window[:, None, :]
        return torch.zeros(together.shape, device=device).masked_fill(~together, -torch.inf)


@torch.compiler.assume_constant_result
@lru_cache(maxsize=64)
def _offsets(size: int, tile: Pair, device: torch.device) -> Int64[Tensor, "n n"]:
    with torch.inference_mode(False):
        row, column = torch.cartesian_prod(*(torch.arange(side, device=device) for side in tile)).T
        row, column = ((axis[:, None] - axis).clamp(1 - size, size - 1) + size - 1 for axis in (row, column))
        return row * (2 * size - 1) + column


class ContinuousPositionBias(nn.Module, Uncast):
    """Log-spaced continuous position bias of Swin V2 (Liu et al. 2022, section 3.3): `16 sigmoid(mlp(offset))`, of the
    `offsets` between tokens as `Windows` numbers them, and a mask that is added."""

    table: Float[Tensor, "offsets 2"]

    def __init__(self, window_size: int, num_heads: int, hidden_dim: int = 512) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, num_heads, bias=False))
        steps = torch.arange(1 - window_size, window_size, dtype=torch.float32) * 8 / max(1, window_size - 1)
        steps = steps.sign() * torch.log2(steps.abs() + 1) / 3  # log2(8) = 3
        self.register_buffer("table", torch.cartesian_prod(steps, steps), persistent=False)

    def forward(
        self, offsets: Int64[Tensor, "n n"], mask: Float[Tensor, "tiles n n"] | None = None
    ) -> Float[Tensor, "tiles k n n"]:
        with without_autocast(self.table):  # of few numbers, each cast costs a GPU as much
            shares = self.mlp(self.table).sigmoid().T[:, offsets]  # [k n n]
        return 16 * shares[None] if mask is None else torch.add(mask[:, None], shares, alpha=16)


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

    k_bias: Tensor  # zeros

    def __init__(self, dim: int, num_heads: int, window_size: int, *, shifted: bool, qk_norm: bool = False) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads, self.window_size = num_heads, window_size
        self.shift = window_size // 2 if shifted else 0
        self.qkv = GivenBias(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("k_bias", torch.zeros(dim), persistent=False)
        self.q_norm, self.k_norm = make_qk_norms(qk_norm, dim // num_heads)
        self.proj = nn.Linear(dim, dim)
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10)))
        self.position_bias = ContinuousPositionBias(window_size, num_heads)

    def forward(self, x: Grid, token: Float[Tensor, "b 1 d"] | None = None) -> Grid:
        windows = Windows(x.shape[1], x.shape[2], self.window_size, self.shift, tile_side(self.window_size, x))
        x = windows.partition(x)  # [b tiles n d]
        num_tiles, num_queries = x.shape[1:3]
        if token is not None:
            x = torch.cat([x, token[:, None].expand(-1, num_tiles, -1, -1)], dim=2)
        qkv = self.qkv(x, torch.cat([self.q_bias, self.k_bias, self.v_bias]))
        q, k, v = rearrange(qkv, "b t n (three k e) -> three b (t k) n e", three=3, k=self.num_heads)
        temperature = self.logit_scale.clamp(max=math.log(100)).exp().expand(num_tiles, -1, -1, -1).flatten(0, 1)
        q, k, scale = cosine(self.q_norm(q), self.k_norm(k), temperature)
        bias = self.position_bias(windows.offsets(x.device), windows.mask(x.device)).expand(num_tiles, -1, -1, -1)
        bias = bias if token is None else F.pad(bias, (0, 1))
        x = attend(q[..., :num_queries, :], k, v, bias=rearrange(bias, "t k n m -> (t k) n m"), scale=scale)
        return windows.merge(self.proj(rearrange(x, "b (t k) n e -> b t n (k e)", k=self.num_heads)))


Heads = Float[Tensor, "b k n e"]


def cosine(q: Heads, k: Heads, temperature: Float[Tensor, "k 1 1"]) -> tuple[Heads, Heads, float]:
    """Queries and keys whose products, times a scale that is given too, are the cosines of their angles, times a
    temperature. On GPUs by a norm that is one kernel; on CPUs in little more than half of what `F.normalize` takes."""
    if at_once(q):
        with without_autocast(q):  # which would have it compute in float32, and cast
            q, k = (F.rms_norm(x, x.shape[-1:], eps=1e-24) for x in (q, k))
        return q * temperature, k, 1 / q.shape[-1]
    lengths = (torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-12) for x in (q, k))
    return q * (temperature / next(lengths)), k * (1 / next(lengths)), 1.0


class WindowCrossAttention(nn.Module):
    """Queries from `x`, keys and values from the same window of `context`; without a window size, of the whole grid."""

    def __init__(self, dim: int, num_heads: int, window_size: int | None, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.window_size = window_size
        self.attention = CrossAttention(dim, num_heads, qk_norm=qk_norm)

    def forward(self, x: Grid, context: Grid) -> Grid:
        window_size = self.window_size or max(x.shape[1:3])
        windows = Windows(x.shape[1], x.shape[2], window_size, tile=tile_side(window_size, x))
        mask = windows.mask(x.device)
        return windows.merge(self.attention(windows.partition(x), windows.partition(context), mask))


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
