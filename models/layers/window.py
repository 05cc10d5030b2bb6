"""Windows over a grid of tokens: partitioning, attention inside windows, and the skips of XSwin's decoder."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models.layers import Cond, Grid
from models.layers.attention import CrossAttention, attend, check_heads, make_qk_norms
from models.layers.kernel_launches import KeepFloat32, autocast_dtype, fuses_launches, without_autocast
from models.layers.modulation import ConditioningLayers
from models.layers.style import BlockStyle

TILE = 8  # side, in tokens, of the tiles in which windows are batched where launches count


def tile_side(window_size: int, x: Tensor) -> int:
    """Return the side of a tile for windows of this size: one window, or as many as fit into `TILE`."""
    return max(1, TILE // window_size) * window_size if fuses_launches(x) else window_size


class Windows:
    """A partition of an `h x w` grid into windows, shifted by `shift` along each axis that has more than one window.

    Attention runs in tiles of one window each or, with a larger `tile` (a side, in tokens), of several windows. The
    mask keeps tokens from attending to other windows and to padding. A grid no larger than a tile is one tile, without
    padding; larger ones are padded at the bottom and right to a multiple of the tile.
    """

    def __init__(self, height: int, width: int, window_size: int, shift: int = 0, tile: int | None = None) -> None:
        self.height, self.width, self.size = height, width, window_size
        sides, tile = (height, width), tile or window_size
        self.tile = tuple(min(side, tile) for side in sides)
        self.padded = tuple(math.ceil(side / part) * part for side, part in zip(sides, self.tile, strict=True))
        self.shifts = tuple(shift if side > window_size else 0 for side in sides)
        self.rolls = tuple(shift if side > tile else 0 for side in sides)

    def partition(self, x: Grid) -> Float[Tensor, "b tiles n d"]:
        """Split each image into tiles in row-major order, each a sequence of tokens."""
        if self.padded != (self.height, self.width):
            x = F.pad(x, (0, 0, 0, self.padded[1] - self.width, 0, self.padded[0] - self.height))
        if any(self.rolls):
            x = x.roll((-self.rolls[0], -self.rolls[1]), dims=(1, 2))
        p, q = self.tile
        return rearrange(x, "b (nh p) (nw q) d -> b (nh nw) (p q) d", p=p, q=q)

    def merge(self, x: Float[Tensor, "b tiles n d"]) -> Grid:
        """Invert `partition`, removing the padding."""
        p, q = self.tile
        x = rearrange(x, "b (nh nw) (p q) d -> b (nh p) (nw q) d", nh=self.padded[0] // p, p=p, q=q)
        if any(self.rolls):
            x = x.roll(self.rolls, dims=(1, 2))
        return x[:, : self.height, : self.width]

    def mask(self, device: torch.device) -> Float[Tensor, "tiles n n"] | None:
        """Return the mask to add to the logits: 0 inside a window, -inf elsewhere; None if no pair is masked."""
        if max(self.tile) <= self.size and not any(self.rolls) and self.padded == (self.height, self.width):
            return None
        return _mask(self.size, (self.height, self.width), self.padded, self.tile, self.shifts, self.rolls, device)

    def offsets(self, device: torch.device) -> Int64[Tensor, "n n"]:
        """Return for each pair of tokens in a tile the index of their relative offset.

        Inside a window there are `(2 size - 1)^2` offsets, numbered in row-major order. Larger ones, between windows of
        a tile, are clamped; the mask excludes these pairs.
        """
        return _offsets(self.size, self.tile, device)


class Neighbourhoods(Windows):
    """The neighbourhood of each token: the `size x size` tokens around it, moved inwards at the edges of the grid (NAT,
    Hassani et al. 2023).

    The grid is one tile: attention is computed between all of its tokens and masked. That suits grids of up to some
    16 x 16 tokens; larger ones want a kernel of their own.
    """

    def __init__(self, height: int, width: int, size: int) -> None:
        super().__init__(height, width, size, tile=max(height, width))

    def mask(self, device: torch.device) -> Float[Tensor, "1 n n"] | None:
        if max(self.height, self.width) <= self.size:
            return None
        return _neighbourhood_mask(self.size, (self.height, self.width), device)


Pair = tuple[int, ...]  # rows and columns


def constant(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorator of functions whose results depend on their arguments alone: cache them, and have torch.compile take
    them as constants. It would trace into a function that `lru_cache` itself decorates."""
    cached = lru_cache(maxsize=64)(function)

    @torch.compiler.assume_constant_result
    @wraps(cached)
    def look_up(*args: Any) -> Tensor:
        return cached(*args)

    return look_up


@constant
def _mask(
    size: int, sides: Pair, padded: Pair, tile: Pair, shifts: Pair, rolls: Pair, device: torch.device
) -> Float[Tensor, "tiles n n"]:
    with torch.inference_mode(False):  # the cached tensor may first be made in sampling and later used in training
        windows = []  # the window index of each position along an axis; padding has an index of its own
        for side, length, shift, roll in zip(sides, padded, shifts, rolls, strict=True):
            position = (torch.arange(length, device=device) + roll) % length
            windows.append(torch.where(position < side, (position - shift) // size, length))
        rows, columns = windows
        window = rows[:, None] * 2 * len(columns) + columns
        window = rearrange(window, "(nh p) (nw q) -> (nh nw) (p q)", p=tile[0], q=tile[1])
        if sides == padded and not any(rolls):
            window = window[:1]  # all tiles have the same mask
        same_window = window[:, :, None] == window[:, None, :]
        return torch.zeros(same_window.shape, device=device).masked_fill(~same_window, -torch.inf)


@constant
def _neighbourhood_mask(size: int, sides: Pair, device: torch.device) -> Float[Tensor, "1 n n"]:
    with torch.inference_mode(False):
        neighbours = []  # along each axis, whether the second position is in the neighbourhood of the first
        for side in sides:
            position = torch.arange(side, device=device)
            start = (position - size // 2).clamp(0, max(0, side - size))[:, None]
            neighbours.append((start <= position) & (position < start + size))
        rows, columns = neighbours
        pairs = rows[:, None, :, None] & columns[None, :, None, :]
        pairs = rearrange(pairs, "row column row2 column2 -> 1 (row column) (row2 column2)")
        return torch.zeros(pairs.shape, device=device).masked_fill(~pairs, -torch.inf)


@constant
def _offsets(size: int, tile: Pair, device: torch.device) -> Int64[Tensor, "n n"]:
    with torch.inference_mode(False):
        row, column = torch.cartesian_prod(*(torch.arange(side, device=device) for side in tile)).T
        row, column = ((axis[:, None] - axis).clamp(1 - size, size - 1) + size - 1 for axis in (row, column))
        return row * (2 * size - 1) + column


class ContinuousPositionBias(nn.Module, KeepFloat32):
    """Log-spaced continuous position bias of Swin V2, `16 sigmoid(mlp(offset))` (Liu et al. 2022, section 3.3), of each
    offset that `Windows.offsets` numbers."""

    table: Float[Tensor, "offsets 2"]

    def __init__(self, window_size: int, num_heads: int, hidden_dim: int = 512) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, num_heads, bias=False))
        steps = torch.arange(1 - window_size, window_size, dtype=torch.float32) * 8 / max(1, window_size - 1)
        steps = steps.sign() * torch.log2(steps.abs() + 1) / 3  # log2(8) = 3
        self.register_buffer("table", torch.cartesian_prod(steps, steps), persistent=False)

    def forward(self) -> Float[Tensor, "k offsets"]:
        with without_autocast(self.table):  # the table is small: a cast would cost a GPU as much as the product
            return 16 * self.mlp(self.table).sigmoid().T


class LinearWithBias(nn.Linear):
    """A linear layer whose bias is an argument of `forward`."""

    def forward(self, x: Float[Tensor, "*axes d"], bias: Float[Tensor, " e"]) -> Float[Tensor, "*axes e"]:
        return F.linear(x, self.weight, bias)


class Precomputed(NamedTuple):
    """What a window attention computes from its weights alone."""

    position_bias: Float[Tensor, "k offsets"]
    temperature: Float[Tensor, "k 1 1"]
    qkv_bias: Float[Tensor, " three_d"]


class WindowAttention(nn.Module):
    """Cosine self-attention inside (shifted) windows, with continuous position bias (Swin V2, Liu et al. 2022).

    As published, the keys' projection has no bias. An extra `token` is a key and value in every window. With
    `neighbourhood`, each token attends to the `window_size x window_size` tokens around it instead.

    Cosine attention already normalises queries and keys and learns a temperature for each head; `qk_norm` adds a
    learned scale for each channel.
    """

    k_bias: Tensor  # zeros

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        *,
        shifted: bool,
        neighbourhood: bool = False,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads, self.window_size, self.neighbourhood = num_heads, window_size, neighbourhood
        self.shift = window_size // 2 if shifted else 0
        self.qkv = LinearWithBias(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("k_bias", torch.zeros(dim), persistent=False)
        self.q_norm, self.k_norm = make_qk_norms(qk_norm, dim // num_heads)
        self.proj = nn.Linear(dim, dim)
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10)))
        self.position_bias = ContinuousPositionBias(window_size, num_heads)

    def forward(
        self, x: Grid, token: Float[Tensor, "b 1 d"] | None = None, precomputed: Precomputed | None = None
    ) -> Grid:
        position_bias, temperature, qkv_bias = precomputed or self.precompute()
        windows = self._windows(x)
        x = windows.partition(x)  # [b tiles n d]
        num_tiles, num_queries = x.shape[1:3]
        if token is not None:
            x = torch.cat([x, token[:, None].expand(-1, num_tiles, -1, -1)], dim=2)
        q, k, v = rearrange(self.qkv(x, qkv_bias), "b t n (three k e) -> three b (t k) n e", three=3, k=self.num_heads)
        temperature = temperature.expand(num_tiles, -1, -1, -1).flatten(0, 1)
        q, k, scale = cosine(self.q_norm(q), self.k_norm(k), temperature)
        bias, mask = position_bias[:, windows.offsets(x.device)], windows.mask(x.device)
        bias = (bias[None] if mask is None else bias + mask[:, None]).expand(num_tiles, -1, -1, -1)
        bias = bias if token is None else F.pad(bias, (0, 1))
        x = attend(q[..., :num_queries, :], k, v, bias=rearrange(bias, "t k n m -> (t k) n m"), scale=scale)
        return windows.merge(self.proj(rearrange(x, "b (t k) n e -> b t n (k e)", k=self.num_heads)))

    def precompute(self) -> Precomputed:
        qkv_bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
        return Precomputed(self.position_bias(), temperature_of(self.logit_scale), qkv_bias)

    def _windows(self, x: Grid) -> Windows:
        height, width = x.shape[1:3]
        if self.neighbourhood:
            return Neighbourhoods(height, width, self.window_size)
        return Windows(height, width, self.window_size, self.shift, tile_side(self.window_size, x))


def temperature_of(logit_scale: Float[Tensor, "k 1 1"]) -> Float[Tensor, "k 1 1"]:
    return logit_scale.clamp(max=math.log(100)).exp()


class Precomputation(nn.Module):
    """Computes what the window attentions of a network need of their weights, for all of them at once where that saves
    launches (see `kernel_launches`). The attentions have one window size.

    Called with the network's input, it returns a `Precomputed` for each attention. Elsewhere, under LoRA and under FSDP
    (see `modulation.ConditioningLayers`) it returns none, and each attention computes its own.
    """

    owners: Float[Tensor, "k attentions"]  # 1 where a head, numbered through all attentions, belongs to an attention

    def __init__(self, attentions: Sequence[WindowAttention]) -> None:
        super().__init__()
        self.attentions = list(attentions)  # a list, since they are submodules of the network
        owners = [torch.ones(attention.num_heads, 1) for attention in attentions]
        self.register_buffer("owners", torch.block_diag(*owners), persistent=False)

    def forward(self, x: Tensor) -> dict[Any, Precomputed]:
        if any(isinstance(attention.logit_scale, DTensor) for attention in self.attentions):
            self.attentions = []
        firsts: list[Any] = [attention.position_bias.mlp[0] for attention in self.attentions]
        lasts: list[Any] = [attention.position_bias.mlp[2] for attention in self.attentions]
        if not fuses_launches(x) or not firsts or not all(isinstance(layer, nn.Linear) for layer in (*firsts, *lasts)):
            return {}
        heads = [attention.num_heads for attention in self.attentions]
        with without_autocast(x):
            weight, bias = (torch.cat([getattr(layer, name) for layer in firsts]) for name in ("weight", "bias"))
            hidden = F.linear(self.attentions[0].position_bias.table, weight, bias).relu()  # [offsets, attentions * d]
            weight = torch.cat([layer.weight for layer in lasts])
            weight = (self.owners[:, :, None] * weight[:, None]).flatten(1)  # zero for other attentions' hidden units
            position_biases = 16 * F.linear(weight, hidden).sigmoid()
        temperatures = temperature_of(torch.cat([attention.logit_scale for attention in self.attentions]))
        biases = [(attention.q_bias, attention.k_bias, attention.v_bias) for attention in self.attentions]
        qkv_biases = torch.cat([bias for own in biases for bias in own])
        qkv_biases = qkv_biases.to(autocast_dtype(x) or qkv_biases.dtype)
        widths = [3 * len(attention.q_bias) for attention in self.attentions]
        parts = position_biases.split(heads), temperatures.split(heads), qkv_biases.split(widths)
        return dict(zip(self.attentions, map(Precomputed, *parts), strict=True))


Heads = Float[Tensor, "b k n e"]


def cosine(q: Heads, k: Heads, temperature: Float[Tensor, "k 1 1"]) -> tuple[Heads, Heads, float]:
    """Prepare queries and keys for cosine attention: return `q`, `k` and `scale` such that `scale * q k^T` is their
    cosine similarity times `temperature`.

    On GPUs it uses RMS norm, which is a single kernel; the variant for CPUs takes little more than half the time of
    `F.normalize`.
    """
    if fuses_launches(q):
        with without_autocast(q):  # autocast would run the norm in float32
            q, k = (F.rms_norm(x, x.shape[-1:], eps=1e-24) for x in (q, k))
        return q * temperature, k, 1 / q.shape[-1]
    lengths = (torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-12) for x in (q, k))
    return q * (temperature / next(lengths)), k * (1 / next(lengths)), 1.0


class WindowCrossAttention(nn.Module):
    """Cross-attention from `x` to the same window of `context`; with `window_size=None`, to the whole grid."""

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
    """XSwin's skip: cross-attention from the decoder's tokens to the encoder's, followed by a norm."""

    def __init__(
        self, dim: int, num_heads: int, cond_layers: ConditioningLayers, style: BlockStyle, window_size: int | None
    ) -> None:
        super().__init__()
        self.dim = dim
        self.modulator_x = cond_layers.modulator(dim)
        self.modulator_skip = cond_layers.modulator(dim)
        self.attention = WindowCrossAttention(dim, num_heads, window_size, qk_norm=style.qk_norm)
        self.norm = style.make_norm(dim)

    def forward(self, x: Grid, skip: Grid, cond: Cond) -> Grid:
        return self.norm(self.attention(self.modulator_x(x, cond), self.modulator_skip(skip, cond)))


class ConcatSkip(nn.Module):
    """Returns `dim` channels of the encoder's output, to be concatenated: all (Ronneberger et al. 2015), or none."""

    def __init__(self, dim: int, *_: object) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Grid, skip: Grid, cond: Cond) -> Float[Tensor, "b h w channels"]:
        return skip[..., : self.dim]


SKIPS: dict[str, Callable[[int, int, ConditioningLayers, BlockStyle, int], nn.Module]] = {
    "cross_attention": CrossAttentionSkip,
    "global_cross_attention": lambda dim, heads, cond_layers, style, _: CrossAttentionSkip(
        dim, heads, cond_layers, style, window_size=None
    ),
    "concat": ConcatSkip,
    "none": lambda *_: ConcatSkip(0),
}
