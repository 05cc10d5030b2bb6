"""Time and label to vectors."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

NUM_FREQUENCIES = 256


def sinusoids(t: Shaped[Tensor, " b"], dim: int, max_period: float = 10_000) -> Float[Tensor, "b dim"]:
    """Cosines, then sines, of geometrically spaced frequencies (Vaswani et al. 2017, section 3.5), in float32."""
    steps = torch.arange(dim // 2, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(max_period) * steps / (dim // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Sinusoids of the time through a two-layer perceptron."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(NUM_FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, t: Shaped[Tensor, " b"]) -> Float[Tensor, "b d"]:
        return self.mlp(sinusoids(t, NUM_FREQUENCIES))


class Conditioning(nn.Module):
    """`silu(time + label)`: the SiLU that opens every modulator, applied once for all of them.

    Label `num_classes` is the null label; without classes, labels are ignored.
    """

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.time = TimeEmbedding(dim)
        self.label = nn.Embedding(num_classes + 1, dim) if num_classes else None
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.02)

    def forward(self, t: Shaped[Tensor, " b"], y: Int64[Tensor, " b"]) -> Float[Tensor, "b d"]:
        cond = self.time(t)
        if self.label is not None:
            cond = cond + self.label(y)
        return nn.functional.silu(cond)
