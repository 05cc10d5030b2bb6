"""Norms of transformers over the width of each token."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """Divides by the root of the mean square (Zhang and Sennrich 2019). Under autocast the scale follows the features'
    type: torch's own leaves its fused kernel, with a warning."""

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


NORMS: dict[str, type[nn.LayerNorm | nn.RMSNorm]] = {"layer": nn.LayerNorm, "rms": RMSNorm}
