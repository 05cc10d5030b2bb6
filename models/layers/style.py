"""Norms, MLPs and stochastic depth of transformer blocks; layers are named as in timm."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.layers import check_choice


class RMSNorm(nn.RMSNorm):
    """RMS norm (Zhang and Sennrich 2019) whose scale is cast to the input's dtype; under autocast, `nn.RMSNorm` would
    warn and not use its fused kernel."""

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


NORMS: dict[str, type[nn.LayerNorm | nn.RMSNorm]] = {"layer": nn.LayerNorm, "rms": RMSNorm}


class Mlp(nn.Sequential):
    """Two linear layers with an activation between them."""

    def __init__(self, dim: int, hidden_dim: int, act: nn.Module | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = act or nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)


class SiluGate(nn.Module):
    """Returns `silu(gate) * value`, where gate and value are the two halves of the channels."""

    def forward(self, x: Float[Tensor, "... two_d"]) -> Float[Tensor, "... d"]:
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value


class SwiGlu(nn.Sequential):
    """A gated MLP (SwiGLU, Shazeer 2020) with 2/3 of `hidden_dim`, so with as many parameters as `Mlp`."""

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
    """Stochastic depth (Huang et al. 2016): in training, drops a sample's residual branch with `drop_prob`."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Float[Tensor, "b ..."], branch: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        if not self.training or self.drop_prob == 0:
            return x + branch
        mask = torch.empty(len(x), *[1] * (x.dim() - 1), dtype=x.dtype, device=x.device).bernoulli_(1 - self.drop_prob)
        return torch.addcmul(x, branch, mask, value=1 / (1 - self.drop_prob))


def rising_drop_rates(drop_path: float, depth: int) -> list[float]:
    """Rates of stochastic depth that rise linearly over the blocks from 0 to `drop_path`, which must lie in [0, 1)."""
    if not 0 <= drop_path < 1:
        raise ValueError(f"drop_path={drop_path} must lie in [0, 1)")
    return torch.linspace(0, drop_path, depth, device="cpu").tolist()


@dataclass(frozen=True)
class BlockStyle:
    """The choice of norm, MLP and attention variant in a backbone's blocks; the defaults are the published ones.

    Args:
        qk_norm: attention normalises queries and keys (Dehghani et al. 2023, Esser et al. 2024)
        norm: `layer`, or `rms` (Zhang and Sennrich 2019)
        mlp: `gelu`, or `swiglu` (Shazeer 2020) with as many parameters
        rotary: position embedding applied to queries and keys; the identity by default
    """

    qk_norm: bool = False
    norm: str = "layer"
    mlp: str = "gelu"
    rotary: nn.Module = field(default_factory=nn.Identity)

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, NORMS)
        check_choice("mlp", self.mlp, MLPS)

    def make_norm(self, dim: int, *, eps: float = 1e-5, affine: bool = True) -> nn.Module:
        """Make a norm over the channels. Pass `affine=False` where a modulation follows, which has scale and shift."""
        return NORMS[self.norm](dim, eps=eps, elementwise_affine=affine)

    def make_mlp(self, dim: int, hidden_dim: int, act: nn.Module | None = None) -> nn.Module:
        """Make an MLP with the parameter count of hidden width `hidden_dim`; gated MLPs ignore `act`."""
        return MLPS[self.mlp](dim, hidden_dim, act)
