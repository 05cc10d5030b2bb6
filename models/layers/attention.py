"""Scaled dot-product attention, and the choice of its kernel."""

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad

from models.layers import Tokens
from models.layers.style import RMSNorm

# Up to so many keys, explicit matrix products are faster on CPUs than the fused kernel with its backward pass.
FEW_TOKENS = {torch.bfloat16: 256}
FEW_TOKENS_DEFAULT = 64


def attend(
    q: Float[Tensor, "... n e"],
    k: Float[Tensor, "... m e"],
    v: Float[Tensor, "... m f"],
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Float[Tensor, "... n f"]:
    """Compute `softmax(scale * q k^T + bias) v` (Vaswani et al. 2017, eq. 1); the scale is `1 / sqrt(e)` by default.
    `bias` broadcasts to [... n m]; it is added to the logits or, if boolean, True where a query may attend to a key."""
    few_tokens = q.device.type == "cpu" and k.shape[-2] <= FEW_TOKENS.get(q.dtype, FEW_TOKENS_DEFAULT)
    # The fused kernels have no rule for forward-mode differentiation.
    if few_tokens or any(forward_ad.unpack_dual(x).tangent is not None for x in (q, k, v)):
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        logits = (q if factor == 1 else q * factor) @ k.transpose(-2, -1)
        if bias is not None:
            logits = logits.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else logits + bias
        return logits.softmax(dim=-1).to(v.dtype) @ v
    mask = bias if bias is None or bias.dtype == torch.bool else bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def make_qk_norms(qk_norm: bool, head_dim: int) -> tuple[nn.Module, nn.Module]:
    """Make the norms of queries and keys, with a learned scale for each channel; identities if not `qk_norm`.

    They bound the logits, which otherwise grow at high learning rates until attention is one-hot (Dehghani et al. 2023,
    section 2; Esser et al. 2024, section 5.3.2).
    """
    make = partial(RMSNorm, head_dim, eps=1e-6) if qk_norm else nn.Identity
    return make(), make()


class SelfAttention(nn.Module):
    """Global multi-head self-attention with `rotary`; an extra `token` adds a key and a value, but no query."""

    def __init__(
        self, dim: int, num_heads: int, *, qkv_bias: bool = True, qk_norm: bool = False, rotary: nn.Module | None = None
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm, self.k_norm = make_qk_norms(qk_norm, dim // num_heads)
        self.rotary = rotary or nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tokens, token: Float[Tensor, "b 1 d"] | None = None) -> Tokens:
        num_queries = x.shape[1]
        x = x if token is None else torch.cat([x, token], dim=1)
        q, k, v = rearrange(self.qkv(x), "b n (three k e) -> three b k n e", three=3, k=self.num_heads)
        q, k = self.rotary(self.q_norm(q)), self.rotary(self.k_norm(k))
        return self.proj(rearrange(attend(q[..., :num_queries, :], k, v), "b k n e -> b n (k e)"))


class CrossAttention(nn.Module):
    """Multi-head attention with queries from `x`, keys and values from `context`. With an axis of tiles, tokens attend
    within their tile. `mask` is added to the logits; it has an entry for each tile or one for all."""

    def __init__(self, dim: int, num_heads: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.q_norm, self.k_norm = make_qk_norms(qk_norm, dim // num_heads)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Float[Tensor, "b *t n d"],
        context: Float[Tensor, "b *t m d"],
        mask: Float[Tensor, "tiles n m"] | None = None,
    ) -> Float[Tensor, "b *t n d"]:
        # Tiles and heads share an axis, as the fused kernels want four axes.
        q = rearrange(self.q(x), "b ... n (k e) -> b (... k) n e", k=self.num_heads)
        k, v = rearrange(self.kv(context), "b ... m (two k e) -> two b (... k) m e", two=2, k=self.num_heads)
        q, k = self.q_norm(q), self.k_norm(k)
        mask = mask if mask is None or len(mask) == 1 else mask.repeat_interleave(self.num_heads, dim=0)
        heads = attend(q, k, v, bias=mask)
        return self.proj(rearrange(heads, "b (t k) n e -> b t n (k e)", k=self.num_heads).view(x.shape))


def check_heads(dim: int, num_heads: int) -> None:
    if dim % num_heads:
        raise ValueError(f"num_heads={num_heads} must divide the width {dim}")
