"""What the blocks of a transformer are made of, where the field has more than one answer; named as timm's."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.layers import check_choice


class RMSNorm(nn.RMSNorm):
    """Divides by the root of the mean square (Zhang and Sennrich 2019). Under autocast the scale follows the features'
    type: torch's own leaves its fused kernel, with a warning."""

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


NORMS: dict[str, type[nn.LayerNorm | nn.RMSNorm]] = {"layer": nn.LayerNorm, "rms": RMSNorm}


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
    """Adds a residual branch, while training for all but a share `drop_prob` of the samples (Huang et al. 2016)."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Float[Tensor, "b ..."], branch: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        if not self.training or self.drop_prob == 0:
            return x + branch
        kept = torch.empty(len(x), *[1] * (x.dim() - 1), dtype=x.dtype, device=x.device).bernoulli_(1 - self.drop_prob)
        return torch.addcmul(x, branch, kept, value=1 / (1 - self.drop_prob))


@dataclass(frozen=True)
class BlockStyle:
    """Makes the bricks of a backbone's blocks; by default those of the published ones.

    Args:
        qk_norm: attention normalises queries and keys (Dehghani et al. 2023, Esser et al. 2024)
        norm: `layer`, or `rms` (Zhang and Sennrich 2019)
        mlp: `gelu`, or `swiglu` (Shazeer 2020), of as many parameters
        rotary: what turns queries and keys by their place in the image
    """

    qk_norm: bool = False
    norm: str = "layer"
    mlp: str = "gelu"
    rotary: nn.Module = field(default_factory=nn.Identity)

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, NORMS)
        check_choice("mlp", self.mlp, MLPS)

    def make_norm(self, dim: int, *, eps: float = 1e-5, affine: bool = True) -> nn.Module:
        """A norm over the width; where a modulation follows, that has scale and shift."""
        return NORMS[self.norm](dim, eps=eps, elementwise_affine=affine)

    def make_mlp(self, dim: int, hidden_dim: int, act: nn.Module | None = None) -> nn.Module:
        """An MLP with the parameters of one of this hidden width; `act` is for those that are not gated."""
        return MLPS[self.mlp](dim, hidden_dim, act)
