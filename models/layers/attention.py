"""Scaled dot-product attention: the one place that chooses a kernel."""

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad

from models.layers import Tokens
from models.layers.style import RMSNorm

FEW_TOKENS = {torch.bfloat16: 256}  # on CPUs, up to here plain products beat the fused kernel's backward; others, 64


def attend(
    q: Float[Tensor, "... n e"],
    k: Float[Tensor, "... m e"],
    v: Float[Tensor, "... m f"],
    *,
    bias: Tensor | None = None,  # to add, or where it is boolean, which may attend to which; broadcasts to [... n m]
    scale: float | None = None,
) -> Float[Tensor, "... n f"]:
    """`softmax(scale * q k^T + bias) v`; `scale` is `1 / sqrt(e)` unless given (Vaswani et al. 2017, eq. 1)."""
    is_few = q.device.type == "cpu" and k.shape[-2] <= FEW_TOKENS.get(q.dtype, 64)
    if is_few or any(forward_ad.unpack_dual(x).tangent is not None for x in (q, k, v)):  # fused ones have no such rule
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        logits = (q if factor == 1 else q * factor) @ k.transpose(-2, -1)
        if bias is not None:
            logits = logits.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else logits + bias
        return logits.softmax(dim=-1).to(v.dtype) @ v
    mask = bias if bias is None or bias.dtype == torch.bool else bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def make_qk_norms(wanted: bool, head_dim: int) -> tuple[nn.Module, nn.Module]:
    """Norms of queries and keys, a learned scale a channel (Dehghani et al. 2023, section 2; Esser et al. 2024, section
    5.3.2): logits stay bounded at rates where they would make attention one-hot. Else identities."""
    make = partial(RMSNorm, head_dim, eps=1e-6) if wanted else nn.Identity
    return make(), make()


class SelfAttention(nn.Module):
    """Global multi-head self-attention, of queries and keys turned by `rotary`; all may also attend to a `token`."""

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
    """Multi-head attention whose queries come from `x`, keys and values from `context`: within each tile, if there are
    such. A mask of each, or one for all, is added."""

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
        q = rearrange(self.q(x), "b ... n (k e) -> b (... k) n e", k=self.num_heads)  # four axes: fused kernels' own
        k, v = rearrange(self.kv(context), "b ... m (two k e) -> two b (... k) m e", two=2, k=self.num_heads)
        q, k = self.q_norm(q), self.k_norm(k)
        mask = mask if mask is None or len(mask) == 1 else mask.repeat_interleave(self.num_heads, dim=0)
        heads = attend(q, k, v, bias=mask)
        return self.proj(rearrange(heads, "b (t k) n e -> b t n (k e)", k=self.num_heads).view(x.shape))


def check_heads(dim: int, num_heads: int) -> None:
    if dim % num_heads:
        raise ValueError(f"num_heads={num_heads} must divide the width {dim}")
