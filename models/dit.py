"""DiT: diffusion transformers with adaLN-zero conditioning (Peebles and Xie 2023)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.backbone import Backbone
from models.layers import Cond, Images, Labels, Output, Times, Tokens
from models.layers.attention import SelfAttention, initialise_linears_, zero_
from models.layers.embedding import Conditioning, TimeEmbedding, sincos_2d
from models.layers.mlp import Mlp
from models.layers.modulation import modulate
from models.layers.patch import check_input_size, patchify, unpatchify


class DiTBlock(nn.Module):
    """Attention and MLP with adaLN-zero: conditioning sets shift, scale and gate of each; all start at zero."""

    def __init__(self, dim: int, num_heads: int, *, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attention = SelfAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), nn.GELU("tanh"))
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, x: Tokens, cond: Cond) -> Tokens:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond).chunk(6, dim=-1)
        x = x + gate1[:, None] * self.attention(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Norm, modulation and a linear to the pixels of each patch."""

    def __init__(self, dim: int, patch_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.linear = nn.Linear(dim, patch_dim)

    def forward(self, x: Tokens, cond: Cond) -> Float[Tensor, "b n patch"]:
        shift, scale = self.modulation(cond).chunk(2, dim=-1)
        return self.linear(modulate(self.norm(x), shift, scale))


class DiT(Backbone):
    """A plain transformer over patches of `patch_size` pixels a side. `long_skips` join the input of each block of the
    second half with its mirror's output (Bao et al. 2023): the paper's UViT."""

    def __init__(
        self,
        *,
        input_size: int | tuple[int, int],
        in_channels: int,
        out_channels: int,
        num_classes: int,
        dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        patch_size: int = 2,
        mlp_ratio: float = 4.0,
        long_skips: bool = False,
    ) -> None:
        super().__init__()
        self.input_size = check_input_size(input_size, patch_size)
        self.in_channels, self.out_channels, self.num_classes = in_channels, out_channels, num_classes
        self.patch_size = patch_size
        self.grid = self.input_size[0] // patch_size, self.input_size[1] // patch_size

        self.cond = Conditioning(num_classes, dim)
        self.patch = nn.Linear(in_channels * patch_size**2, dim)
        self.register_buffer("positions", sincos_2d(dim, *self.grid), persistent=False)
        self.blocks = nn.ModuleList(DiTBlock(dim, num_heads, mlp_ratio=mlp_ratio) for _ in range(depth))
        num_skips = (depth - 1) // 2 if long_skips else 0
        self.joins = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in range(num_skips))
        self.final = FinalLayer(dim, out_channels * patch_size**2)
        self._initialise()

    def block_types(self) -> tuple[type[nn.Module], ...]:
        return (DiTBlock,)

    def _initialise(self) -> None:
        time = [module for module in self.modules() if isinstance(module, TimeEmbedding)]
        initialise_linears_(self, nn.init.xavier_uniform_, but={layer for module in time for layer in module.modules()})
        for module in self.modules():
            if isinstance(module, DiTBlock | FinalLayer):
                zero_(module.modulation)
        zero_(self.final.linear)

    def forward(self, x_t: Images, t: Times, y: Labels) -> Output:
        cond = self.cond(t, y)
        x = self.patch(patchify(x_t, self.patch_size)) + self.positions

        # The first blocks leave skips, the last ones take them back in reverse.
        skips, num_skips = [], len(self.joins)
        for number, block in enumerate(self.blocks):
            taker = number - (len(self.blocks) - num_skips)
            if taker >= 0:
                x = self.joins[taker](torch.cat([x, skips.pop()], dim=-1))
            x = block(x, cond)
            if number < num_skips:
                skips.append(x)

        return unpatchify(self.final(x, cond), self.grid, self.patch_size)


SIZES = {
    "S": {"dim": 384, "depth": 12, "num_heads": 6},
    "B": {"dim": 768, "depth": 12, "num_heads": 12},
    "L": {"dim": 1024, "depth": 24, "num_heads": 16},
    "XL": {"dim": 1152, "depth": 28, "num_heads": 16},
}
MODELS = {
    f"{family}-{size}/{patch_size}": (DiT, {**row, **skips, "patch_size": patch_size})
    for family, skips in {"DiT": {}, "UViT": {"long_skips": True}}.items()
    for size, row in SIZES.items()
    for patch_size in (2, 4, 8)
}
