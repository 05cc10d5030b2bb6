"""How conditioning enters a layer: adaptive modulation (adaLN, Peebles and Xie 2023), gates, or tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.layers.attention import zero_


def modulate(
    x: Float[Tensor, "b *axes d"], shift: Float[Tensor, "b d"], scale: Float[Tensor, "b d"]
) -> Float[Tensor, "b *axes d"]:
    """`x * (1 + scale) + shift`, the same for all positions."""
    return x * (1 + _spread(scale, x)) + _spread(shift, x)


def _spread(values: Float[Tensor, "b d"], x: Float[Tensor, "b *axes d"]) -> Tensor:
    return values.view(x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1])  # not len(x): that is a number to torch.export


class Modulator(nn.Module):
    """Shift and scale by a zero-initialised linear of the conditioning: the identity at first."""

    def __init__(self, cond_dim: int, dim: int) -> None:
        super().__init__()
        self.linear = zero_(nn.Linear(cond_dim, 2 * dim))

    def forward(self, x: Float[Tensor, "b *axes d"], cond: Float[Tensor, "b cond"]) -> Float[Tensor, "b *axes d"]:
        shift, scale = self.linear(cond).chunk(2, dim=-1)
        return modulate(x, shift, scale)


class Gate(nn.Module):
    """Scale by a zero-initialised linear of the conditioning: a residual branch adds nothing at first (adaLN-zero)."""

    def __init__(self, cond_dim: int, dim: int) -> None:
        super().__init__()
        self.linear = zero_(nn.Linear(cond_dim, dim))

    def forward(self, x: Float[Tensor, "b *axes d"], cond: Float[Tensor, "b cond"]) -> Float[Tensor, "b *axes d"]:
        return x * _spread(self.linear(cond), x)


class CondToken(nn.Module):
    """The conditioning as one more token to attend to (in-context conditioning)."""

    def __init__(self, cond_dim: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(cond_dim, dim)

    def forward(self, cond: Float[Tensor, "b cond"]) -> Float[Tensor, "b 1 d"]:
        return self.linear(cond)[:, None]


class AsItIs(nn.Module):
    """A place that the conditioning does not enter."""

    def __init__(self, cond_dim: int, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        return x


class NoToken(nn.Module):
    """Nothing to attend to beside the image."""

    def __init__(self, cond_dim: int, dim: int) -> None:
        super().__init__()

    def forward(self, cond: Tensor) -> None:
        return None


class NoConditioning(nn.Module):
    """In place of the embeddings of time and label: vectors of width 0."""

    def forward(self, t: Tensor, y: Tensor) -> Float[Tensor, "b 0"]:
        return torch.zeros(len(t), 0, device=t.device)


@dataclass(frozen=True)
class Injection:
    """The places where conditioning may enter, each made by its kind for a layer of some width."""

    cond_dim: int
    modulators: Callable[[int, int], nn.Module] = AsItIs
    gates: Callable[[int, int], nn.Module] = AsItIs
    tokens: Callable[[int, int], nn.Module] = NoToken

    def modulator(self, dim: int) -> nn.Module:
        """Before a layer: `(x, cond) -> x`."""
        return self.modulators(self.cond_dim, dim)

    def gate(self, dim: int) -> nn.Module:
        """After a residual branch: `(x, cond) -> x`."""
        return self.gates(self.cond_dim, dim)

    def token(self, dim: int) -> nn.Module:
        """For an attention: `cond -> [b 1 d]`, or None."""
        return self.tokens(self.cond_dim, dim)


INJECTIONS: dict[str, dict[str, Callable[[int, int], nn.Module]]] = {
    "adaln": {"modulators": Modulator},
    "adaln_zero": {"modulators": Modulator, "gates": Gate},
    "tokens": {"tokens": CondToken},
    "none": {},
}
