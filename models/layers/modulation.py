"""How conditioning enters a layer: adaptive modulation (adaLN, Peebles and Xie 2023), gates, or tokens."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models.layers import Cond
from models.layers.initialisation import zero_
from models.layers.launches import Uncast, at_once

Features = Float[Tensor, "b *axes d"]


def modulate(x: Features, shift: Float[Tensor, "b d"], scale: Float[Tensor, "b d"]) -> Features:
    """`x * (1 + scale) + shift`, the same for all positions."""
    return x * (1 + _spread(scale, x)) + _spread(shift, x)


def _spread(values: Float[Tensor, "b d"], x: Features) -> Tensor:
    return values.view(x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1])  # not len(x): that is a number to torch.export


class Told(nn.Linear, Uncast):
    """What a layer is told of the conditioning: a linear of it, added to what it is `at_rest`, told by weights of zero.
    Where `Injection` has told all layers at once, it is cut out there."""

    at_rest: Float[Tensor, " e"]
    place: slice  # among the features that all layers are told

    def __init__(self, cond_dim: int, *at_rest: Float[Tensor, " d"]) -> None:
        super().__init__(cond_dim, sum(map(len, at_rest)))
        self.register_buffer("at_rest", torch.cat(at_rest), persistent=False)

    def forward(self, cond: Cond) -> Float[Tensor, "b e"]:
        return super().forward(cond) + self.at_rest if cond.shape[-1] == self.in_features else cond[:, self.place]


class Modulator(nn.Module):
    """Shift and scale by a zero-initialised linear of the conditioning: the identity at first."""

    def __init__(self, cond_dim: int, dim: int) -> None:
        super().__init__()
        self.linear = zero_(Told(cond_dim, torch.zeros(dim), torch.ones(dim)))

    def forward(self, x: Features, cond: Cond) -> Features:
        shift, scale = self.linear(cond).to(x.dtype).chunk(2, dim=-1)
        return torch.addcmul(_spread(shift, x), x, _spread(scale, x))


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
        self.linear = zero_(Told(cond_dim, torch.zeros(dim)))

    def forward(self, x: Features, cond: Cond) -> Features:
        return x * _spread(self.linear(cond), x)


class CondToken(nn.Module):
    """The conditioning as one more token to attend to (in-context conditioning)."""

    def __init__(self, cond_dim: int, dim: int) -> None:
        super().__init__()
        self.linear = Told(cond_dim, torch.zeros(dim))

    def forward(self, cond: Cond) -> Float[Tensor, "b 1 d"]:
        return self.linear(cond)[:, None]


class AsItIs(nn.Identity):
    """A place that the conditioning does not enter, or a step that is not taken."""

    def forward(self, x: Tensor, *others: object) -> Tensor:
        return x


class NoToken(nn.Identity):
    """Nothing to attend to beside the image."""

    def forward(self, cond: Tensor) -> None:
        return None


class Injection(nn.Module):
    """Makes what conditioning enters by: `modulator(dim)` before a layer and `gate(dim)` after a residual branch, both
    `(x, cond) -> x`; `token(dim)` for an attention, `cond -> [b 1 d]` or None.

    Called with the conditioning, it tells all of them at once by one product, where that pays (`launches`). Adapters
    stand before their linears and FSDP has the weights of a block only inside it: then each asks by itself.
    """

    def __init__(self, kind: str, cond_dim: int) -> None:
        super().__init__()
        self.cond_dim, self.makers = cond_dim, INJECTIONS[kind]
        self.parts: list[Modulator | Gate | CondToken] = []  # of the network, and none of this
        self.width = 0

    def modulator(self, dim: int) -> nn.Module:
        return self._placed(self.makers[0](self.cond_dim, dim))

    def gate(self, dim: int) -> nn.Module:
        return self._placed(self.makers[1](self.cond_dim, dim))

    def token(self, dim: int) -> nn.Module:
        return self._placed(self.makers[2](self.cond_dim, dim))

    def _placed(self, part: nn.Module) -> nn.Module:
        if isinstance(part, Modulator | Gate | CondToken):
            start, self.width = self.width, self.width + part.linear.out_features
            part.linear.place = slice(start, self.width)
            self.parts.append(part)
        return part

    def forward(self, cond: Cond) -> Float[Tensor, "b told"]:
        linears = [part.linear for part in self.parts]
        if not at_once(cond) or not linears or not all(isinstance(linear, Told) for linear in linears):
            return cond
        if any(isinstance(linear.weight, DTensor) for linear in linears):
            self.parts = []  # for good: FSDP may leave weights whole for a while, and would not hear of gradients
            return cond
        weight, bias, at_rest = (
            torch.cat([getattr(linear, name) for linear in linears]) for name in ("weight", "bias", "at_rest")
        )
        return F.linear(cond, weight, bias) + at_rest


INJECTIONS = {
    "adaln": (Modulator, AsItIs, NoToken),
    "adaln_zero": (Modulator, Gate, NoToken),
    "tokens": (AsItIs, AsItIs, CondToken),
    "none": (AsItIs, AsItIs, NoToken),
}
