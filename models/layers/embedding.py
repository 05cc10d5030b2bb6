"""Embeddings of times, labels, augmentations and positions."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.layers import AugmentLabels, GuidanceScales, Labels, Times, check_choice
from models.layers.initialisation import zero_

NUM_FREQUENCIES = 256
SMALL = 0.02  # standard deviation of initial weights in transformers (Peebles and Xie 2023)
POSITIONS = ("absolute", "rotary", "both")


def sinusoids(t: Times, dim: int, max_period: float = 10_000) -> Float[Tensor, "b dim"]:
    """Embed times as cosines, then sines, of geometrically spaced frequencies (Vaswani et al. 2017, section 3.5). The
    result is float64 for times in float64, otherwise float32."""
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    steps = torch.arange(dim // 2, dtype=t.dtype, device=t.device)
    angles = t[:, None] * torch.exp(-math.log(max_period) * steps / (dim // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """A two-layer MLP on the sinusoids of the time; `std` of its initial weights, None keeps torch's."""

    def __init__(self, dim: int, std: float | None = SMALL) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(NUM_FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))
        if std is not None:
            for layer in (self.mlp[0], self.mlp[2]):
                nn.init.normal_(layer.weight, std=std)  # pyright: ignore[reportArgumentType]

    def forward(self, t: Times) -> Float[Tensor, "b d"]:
        return self.mlp(sinusoids(t, NUM_FREQUENCIES))


class AddedEmbedding(TimeEmbedding):
    """An embedding of one more number, to be added to that of the time. Its last layer starts at zero, so a model
    trained without this number can be fine-tuned with it."""

    def __init__(self, dim: int, std: float | None = SMALL) -> None:
        super().__init__(dim, std)
        self.reset()

    def reset(self) -> None:
        """Zero the last layer again, after a backbone has initialised all its linears."""
        zero_(self.mlp[2])  # pyright: ignore[reportArgumentType]


class IntervalEmbedding(AddedEmbedding):
    """Adds an embedding of the interval `t - r` to the embedding of `t`; `r` is `t` by default (Geng et al. 2025)."""

    def forward(self, embedded: Float[Tensor, "b d"], t: Times, r: Times | None) -> Float[Tensor, "b d"]:
        return embedded + super().forward(t - t if r is None else t - r)


class GuidanceEmbedding(AddedEmbedding):
    """Adds an embedding of the guidance scale `g` to that of the time (Meng et al. 2023); `g` is 1 by default. It is an
    embedding of `100 log g`, which lies in the range of the times."""

    def forward(self, embedded: Float[Tensor, "b d"], g: GuidanceScales) -> Float[Tensor, "b d"]:
        g = embedded.new_ones(len(embedded)) if g is None else g
        return embedded + super().forward(100 * g.log())


class AugmentEmbedding(nn.Module):
    """Adds a linear map of the augmentation vector to the embedding of the time (Karras et al. 2022, appendix F.2). The
    map has no bias and starts at zero, so it adds nothing for an image without augmentation."""

    def __init__(self, augment_dim: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(augment_dim, dim))  # backbones would re-initialise an nn.Linear

    def forward(self, embedded: Float[Tensor, "b d"], augment: AugmentLabels) -> Float[Tensor, "b d"]:
        if augment is None:
            augment = self.weight.new_zeros(embedded.shape[0], len(self.weight))
        return embedded + augment @ self.weight


class UnusedInput(nn.Module):
    """Stands for one of these embeddings in a backbone without it: adds nothing, and refuses a value."""

    def __init__(self, problem: str) -> None:
        super().__init__()
        self.problem = problem

    def forward(self, embedded: Float[Tensor, "b d"], *values: Tensor | None) -> Float[Tensor, "b d"]:
        if values[-1] is not None:
            raise ValueError(self.problem)
        return embedded


def make_inputs(
    dim: int,
    std: float | None = SMALL,
    *,
    second_time: bool = False,
    augment_dim: int = 0,
    guidance_input: bool = False,
) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Make the embeddings of the inputs that a backbone may take beside the time: `r`, `augment` and `g`."""
    no_interval = UnusedInput("r: this backbone takes no second time; build it with second_time=True")
    no_augment = UnusedInput("augment: this backbone takes no augmentation labels; build it with augment_dim")
    no_guidance = UnusedInput("g: this backbone takes no guidance scale; build it with guidance_input=True")
    interval = IntervalEmbedding(dim, std) if second_time else no_interval
    augment = AugmentEmbedding(augment_dim, dim) if augment_dim else no_augment
    return interval, augment, GuidanceEmbedding(dim, std) if guidance_input else no_guidance


class Conditioning(nn.Module):
    """The conditioning vector `silu(time + label)`; modulators need no SiLU of their own.

    Label `num_classes` is the null label. `std` is the standard deviation of the initial weights. None keeps torch's
    initialisation, for backbones that add the conditioning to features rather than modulate them. `inputs` are those
    of `make_inputs`.
    """

    def __init__(self, num_classes: int, dim: int, std: float | None = SMALL, **inputs: Any) -> None:
        super().__init__()
        self.time = TimeEmbedding(dim, std)
        self.interval, self.augment, self.guidance = make_inputs(dim, std, **inputs)
        self.label = nn.Embedding(num_classes + 1, dim) if num_classes else None
        if self.label is not None and std is not None:
            nn.init.normal_(self.label.weight, std=std)

    def forward(
        self, t: Times, y: Labels, r: Times | None = None, augment: AugmentLabels = None, g: GuidanceScales = None
    ) -> Float[Tensor, "b d"]:
        cond = self.interval(self.time(t), t, r)
        cond = self.guidance(self.augment(cond, augment), g)
        if self.label is not None:
            cond = cond + self.label(y)
        return nn.functional.silu(cond)


class NoConditioning(nn.Module):
    """Stands for `Conditioning` in unconditional models: returns vectors of width 0."""

    def forward(
        self, t: Times, y: Labels, r: Times | None = None, augment: AugmentLabels = None, g: GuidanceScales = None
    ) -> Float[Tensor, "b 0"]:
        return torch.zeros(len(t), 0, device=t.device)


class Rotary2d(nn.Module):
    """Rotary position embedding of an `h x w` grid in row-major order, applied to queries and keys (Su et al. 2021).

    Pairs of channels are rotated by angles proportional to the token's position, so logits depend on the distance of
    two tokens. Half the pairs rotate by the row, half by the column (Lu et al. 2024, FiT), with the frequencies of
    `sincos_2d`. Channel i is paired with channel i + e / 2. The first `num_others` tokens, such as that of the time,
    are not rotated.
    """

    cos: Float[Tensor, "n e"]
    sin: Float[Tensor, "n e"]

    def __init__(self, head_dim: int, height: int, width: int, num_others: int = 0) -> None:
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"a head's width of {head_dim} must be a multiple of 4 for 2-D rotary positions")
        omega = 10_000 ** -(torch.arange(head_dim // 4, dtype=torch.float64) / (head_dim // 4))
        rows, columns = torch.cartesian_prod(torch.arange(height), torch.arange(width)).unbind(dim=-1)
        angles = torch.cat([rows[:, None] * omega, columns[:, None] * omega], dim=-1)
        angles = F.pad(angles, (0, 0, num_others, 0))  # [n e/2]
        self.register_buffer("cos", torch.cat([angles.cos(), angles.cos()], dim=-1).float(), persistent=False)
        self.register_buffer("sin", torch.cat([-angles.sin(), angles.sin()], dim=-1).float(), persistent=False)

    def forward(self, x: Float[Tensor, "... n e"]) -> Float[Tensor, "... n e"]:
        rotated = x * self.cos + x.roll(x.shape[-1] // 2, dims=-1) * self.sin  # in float32
        return rotated.to(x.dtype)


def make_rotary(positions: str, head_dim: int, grid: tuple[int, int], num_others: int = 0) -> nn.Module:
    """Make the rotary embedding of queries and keys; an identity if `positions` is `absolute`."""
    check_choice("positions", positions, POSITIONS)
    return nn.Identity() if positions == "absolute" else Rotary2d(head_dim, *grid, num_others)


def sincos_2d(dim: int, height: int, width: int) -> Float[Tensor, "n dim"]:
    """Return fixed sin-cos embeddings of a grid in row-major order, half the channels for the column."""
    if dim % 4:
        raise ValueError(f"dim={dim} must be a multiple of 4 for 2-D sin-cos positions")
    omega = 10_000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows = torch.arange(height, dtype=torch.float64).repeat_interleave(width)
    columns = torch.arange(width, dtype=torch.float64).repeat(height)
    halves = []
    for coordinate in (columns, rows):
        angles = coordinate[:, None] * omega
        halves += [angles.sin(), angles.cos()]
    return torch.cat(halves, dim=-1).float()
