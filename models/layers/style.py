"""What the blocks of a transformer are made of, where the field has more than one answer."""

from dataclasses import dataclass, field

from torch import nn

from models.layers.attention import check_choice
from models.layers.mlp import MLPS
from models.layers.norm import NORMS


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
