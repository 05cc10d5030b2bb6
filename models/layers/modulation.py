"""How conditioning enters a layer: adaptive modulation (adaLN, Peebles and Xie 2023), gates, or tokens."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models.layers import Cond, FusedOutputs
from models.layers.initialisation import zero_
from models.layers.kernel_launches import KeepFloat32, fuses_launches

Features = Float[Tensor, "b *axes d"]


def modulate(x: Features, shift: Float[Tensor, "b d"], scale: Float[Tensor, "b d"]) -> Features:
    """Return `x * (1 + scale) + shift`, with one shift and scale for all positions of a sample."""
    return x * (1 + _broadcast(scale, x)) + _broadcast(shift, x)


def _broadcast(values: Float[Tensor, "b d"], x: Features) -> Tensor:
    return values.view(x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1])  # torch.export would take len(x) for a constant


class CondLinear(nn.Linear, KeepFloat32):
    """A linear layer of the conditioning, plus a constant `base` that is its output while its weights are zero. Where
    `ConditioningLayers` has computed these layers for the whole network, it only takes its slice."""

    base: Float[Tensor, " e"]
    output_slice: slice  # of `FusedOutputs`

    def __init__(self, cond_dim: int, *base: Float[Tensor, " d"]) -> None:
        super().__init__(cond_dim, sum(map(len, base)))
        self.register_buffer("base", torch.cat(base), persistent=False)

    def forward(self, cond: Cond) -> Float[Tensor, "b e"]:
        if isinstance(cond, FusedOutputs):
            return cond.outputs[:, self.output_slice]
        return super().forward(cond) + self.base


class Modulator(nn.Module):
    """Shift and scale by a linear layer of the conditioning (adaLN); zero-initialised, so the identity at first."""

    def __init__(self, cond_dim: int, dim: int) -> None:
        super().__init__()
        self.linear = zero_(CondLinear(cond_dim, torch.zeros(dim), torch.ones(dim)))

    def forward(self, x: Features, cond: Cond) -> Features:
        shift, scale = self.linear(cond).to(x.dtype).chunk(2, dim=-1)
        return torch.addcmul(_broadcast(shift, x), x, _broadcast(scale, x))


class Offset(nn.Module):
    """A learned offset that a block adds to a modulation shared by all blocks (adaLN-single, Chen et al. 2023)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(dim))

    def forward(self, shared: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        return shared + self.offset


class Gate(nn.Module):
    """Scales a residual branch by a linear layer of the conditioning, which is zero at first (adaLN-zero)."""

    def __init__(self, cond_dim: int, dim: int) -> None:
        super().__init__()
        self.linear = zero_(CondLinear(cond_dim, torch.zeros(dim)))

    def forward(self, x: Features, cond: Cond) -> Features:
        return x * _broadcast(self.linear(cond), x)


class CondToken(nn.Module):
    """The conditioning as one more token to attend to (in-context conditioning)."""

    def __init__(self, cond_dim: int, dim: int) -> None:
        super().__init__()
        self.linear = CondLinear(cond_dim, torch.zeros(dim))

    def forward(self, cond: Cond) -> Float[Tensor, "b 1 d"]:
        return self.linear(cond)[:, None]


class PassThrough(nn.Identity):
    """An identity that ignores further arguments, in the place of a module that takes the conditioning."""

    def forward(self, x: Tensor, *args: object) -> Tensor:
        return x


class NoToken(nn.Identity):
    """Returns None in the place of a conditioning token."""

    def forward(self, cond: Cond) -> None:
        return None


class ConditioningLayers(nn.Module):
    """Makes the modules by which the conditioning enters a network.

    `modulator(dim)` goes before a layer and `gate(dim)` after a residual branch, both `(x, cond) -> x`; `token(dim)` is
    for attention, `cond -> [b 1 d]` or None.

    Called with the conditioning, it computes the linear layers of all these modules by one matrix product, where that
    saves launches (see `kernel_launches`); otherwise it returns the conditioning, and each module computes its own. The
    latter holds under LoRA, which wraps the linear layers, and under FSDP, which gathers weights block by block.
    """

    def __init__(self, kind: str, cond_dim: int) -> None:
        super().__init__()
        self.cond_dim = cond_dim
        self.make_modulator, self.make_gate, self.make_token = CONDITIONINGS[kind]
        self.parts: list[Modulator | Gate | CondToken] = []  # a list, since they are submodules of the network
        self.width = 0

    def modulator(self, dim: int) -> nn.Module:
        return self._register(self.make_modulator(self.cond_dim, dim))

    def gate(self, dim: int) -> nn.Module:
        return self._register(self.make_gate(self.cond_dim, dim))

    def token(self, dim: int) -> nn.Module:
        return self._register(self.make_token(self.cond_dim, dim))

    def _register(self, part: nn.Module) -> nn.Module:
        if isinstance(part, Modulator | Gate | CondToken):
            start, self.width = self.width, self.width + part.linear.out_features
            part.linear.output_slice = slice(start, self.width)
            self.parts.append(part)
        return part

    def forward(self, cond: Float[Tensor, "b cond"]) -> Cond:
        linears = [part.linear for part in self.parts]
        if not fuses_launches(cond) or not linears or not all(isinstance(linear, CondLinear) for linear in linears):
            return cond
        if any(isinstance(linear.weight, DTensor) for linear in linears):
            # From now on each module computes its own: FSDP may leave weights unsharded for a while, but does not
            # reduce the gradients of weights that are used outside their block.
            self.parts = []
            return cond
        weight, bias, base = (
            torch.cat([getattr(linear, name) for linear in linears]) for name in ("weight", "bias", "base")
        )
        return FusedOutputs(F.linear(cond, weight, bias) + base)


CONDITIONINGS = {  # modulator, gate and token
    "adaln": (Modulator, PassThrough, NoToken),
    "adaln_zero": (Modulator, Gate, NoToken),
    "tokens": (PassThrough, PassThrough, CondToken),
    "none": (PassThrough, PassThrough, NoToken),
}
