"""The MLP and the stochastic depth of transformer blocks, named as timm's: whose import takes as long as torch's."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Mlp(nn.Sequential):
    """Two linear layers, an activation between."""

    def __init__(self, dim: int, hidden_dim: int, act: nn.Module | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = act or nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)


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
