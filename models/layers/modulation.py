"""How conditioning enters a layer: adaptive modulation (adaLN, Peebles and Xie 2023), gates, or tokens."""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.layers import Cond
from models.layers.attention import zero_

Features = Float[Tensor, "b *axes d"]


def modulate(x: Features, shift: Float[Tensor, "b d"], scale: Float[Tensor, "b d"]) -> Features:
    """`x * (1 + scale) + shift`, the same for all positions."""
    return x * (1 + _spread(scale, x)) + _spread(shift, x)


def _spread(values: Float[Tensor, "b d"], x: Features) -> Tensor:
    return values.view(x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1])  # not len(x): that is a number to torch.export


class Modulator(nn.Module):
    """Shift and scale by a zero-initialised linear of the conditioning: the identity at first."""

    def __init__(self, cond_dim: int, dim: int) -> None:
        super().__init__()
        self.linear = zero_(nn.Linear(cond_dim, 2 * dim))

    def forward(self, x: Features, cond: Cond) -> Features:
        shift, scale = self.linear(cond).chunk(2, dim=-1)
        return modulate(x, shift, scale)


class Offset(nn.Module):
    """What a block adds to a modulation that all blocks share (adaLN-single, Chen et al. 2023)."""

    def __init__(self, cond_dim: int, dim: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(dim))

    def forward(self, shared: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        return shared + self.offset


class Gate(nn.Module):
    """Scale by a zero-initialised linear of the conditioning: a residual branch adds nothing at first (adaLN-zero)."""

    def __init__(self, cond_dim: int, dim: int) -> None:
        super().__init__()
        self.linear = zero_(nn.Linear(cond_dim, dim))

    def forward(self, x: Features, cond: Cond) -> Features:
        return x * _spread(self.linear(cond), x)


class CondToken(nn.Module):
    """The conditioning as one more token to attend to (in-context conditioning)."""

    def __init__(self, cond_dim: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(cond_dim, dim)

    def forward(self, cond: Cond) -> Float[Tensor, "b 1 d"]:
        return self.linear(cond)[:, None]


class AsItIs(nn.Identity):
    """A place that the conditioning does not enter."""

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        return x


class NoToken(nn.Identity):
    """Nothing to attend to beside the image."""

    def forward(self, cond: Tensor) -> None:
        return None


class Injection:
    """Makes what conditioning enters by: `modulator(dim)` before a layer and `gate(dim)` after a residual branch, both
    `(x, cond) -> x`; `token(dim)` for an attention, `cond -> [b 1 d]` or None."""

    def __init__(self, kind: str, cond_dim: int) -> None:
        modulator, gate, token = INJECTIONS[kind]
        self.modulator: Callable[[int], nn.Module] = partial(modulator, cond_dim)
        self.gate: Callable[[int], nn.Module] = partial(gate, cond_dim)
        self.token: Callable[[int], nn.Module] = partial(token, cond_dim)


INJECTIONS = {
    "adaln": (Modulator, AsItIs, NoToken),
    "adaln_zero": (Modulator, Gate, NoToken),
    "tokens": (AsItIs, AsItIs, CondToken),
    "none": (AsItIs, AsItIs, NoToken),
}
