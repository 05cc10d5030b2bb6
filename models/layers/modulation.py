"""Adaptive modulation (adaLN, Peebles and Xie 2023): conditioning sets the shift and scale of a layer's input."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from models.layers.attention import zero_


def modulate(
    x: Float[Tensor, "b *axes d"], shift: Float[Tensor, "b d"], scale: Float[Tensor, "b d"]
) -> Float[Tensor, "b *axes d"]:
    """`x * (1 + scale) + shift`, the same for all positions."""
    spread = (x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1])  # not len(x): that is a number to torch.export
    return x * (1 + scale.view(spread)) + shift.view(spread)


class Modulator(nn.Module):
    """Shift and scale by a zero-initialised linear of the conditioning: the identity at first."""

    def __init__(self, cond_dim: int, dim: int) -> None:
        super().__init__()
        self.linear = zero_(nn.Linear(cond_dim, 2 * dim))

    def forward(self, x: Float[Tensor, "b *axes d"], cond: Float[Tensor, "b cond"]) -> Float[Tensor, "b *axes d"]:
        shift, scale = self.linear(cond).chunk(2, dim=-1)
        return modulate(x, shift, scale)
