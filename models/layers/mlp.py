"""The MLP and the stochastic depth of transformer blocks, named as timm's: whose import takes as long as torch's."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Mlp(nn.Sequential):
    """Two linear layers, an activation between."""

    def __init__(self, dim: int, hidden_dim: int, act: nn.Module | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = act or nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)


class SiluGate(nn.Module):
    """`silu(gate) * value`, of the two halves of the width."""

    def forward(self, x: Float[Tensor, "... two_d"]) -> Float[Tensor, "... d"]:
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value


class SwiGlu(nn.Sequential):
    """An MLP whose activation is gated by a linear of its own (SwiGLU, Shazeer 2020). Two thirds of the hidden width
    leave it the parameters of an MLP of the whole."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        width = 2 * hidden_dim // 3
        self.fc1 = nn.Linear(dim, 2 * width)
        self.act = SiluGate()
        self.fc2 = nn.Linear(width, dim)


MLPS: dict[str, Callable[[int, int, nn.Module | None], nn.Module]] = {
    "gelu": Mlp,
    "swiglu": lambda dim, hidden_dim, _: SwiGlu(dim, hidden_dim),
}


class DropPath(nn.Module):
    """Leaves a residual branch out for a share `drop_prob` of the samples while training (Huang et al. 2016)."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        if not self.training or self.drop_prob == 0:
            return x
        kept = torch.empty(len(x), *[1] * (x.dim() - 1), dtype=x.dtype, device=x.device).bernoulli_(1 - self.drop_prob)
        return x * kept.div_(1 - self.drop_prob)
