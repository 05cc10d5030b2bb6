"""DiT: diffusion transformers with adaLN-zero conditioning (Peebles and Xie 2023)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.backbone import Backbone
from models.layers import Changes, Cond, Images, Labels, Output, Times, Tokens, check_choice
from models.layers.attention import SelfAttention
from models.layers.embedding import Conditioning, TimeEmbedding, make_rotary, sincos_2d
from models.layers.initialisation import initialise_linears_, zero_
from models.layers.modulation import Offset, modulate
from models.layers.patch import check_input_size, patchify, unpatchify
from models.layers.style import BlockStyle

# What makes six vectors of the conditioning, once for all blocks and then in each: a linear a block (adaLN-zero), or
# one linear and an offset a block (adaLN-single, Chen et al. 2023).
MODULATIONS = {"block": (nn.Identity, nn.Linear), "shared": (nn.Linear, Offset)}


class DiTBlock(nn.Module):
    """Attention and MLP with adaLN-zero: conditioning sets shift, scale and gate of each; all start at zero."""

    def __init__(
        self, dim: int, num_heads: int, style: BlockStyle, *, mlp_ratio: float = 4.0, modulation: str = "block"
    ) -> None:
        super().__init__()
        self.norm1 = style.make_norm(dim, eps=1e-6, affine=False)
        self.attention = SelfAttention(dim, num_heads, qk_norm=style.qk_norm, rotary=style.rotary)
        self.norm2 = style.make_norm(dim, eps=1e-6, affine=False)
        self.mlp = style.make_mlp(dim, int(dim * mlp_ratio), nn.GELU("tanh"))
        self.modulation = MODULATIONS[modulation][1](dim, 6 * dim)

    def forward(self, x: Tokens, cond: Cond) -> Tokens:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond).chunk(6, dim=-1)
        x = x + gate1[:, None] * self.attention(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Norm, modulation and a linear to the pixels of each patch."""

    def __init__(self, dim: int, patch_dim: int, style: BlockStyle) -> None:
        super().__init__()
        self.norm = style.make_norm(dim, eps=1e-6, affine=False)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.linear = nn.Linear(dim, patch_dim)

    def forward(self, x: Tokens, cond: Cond) -> Float[Tensor, "b n patch"]:
        shift, scale = self.modulation(cond).chunk(2, dim=-1)
        return self.linear(modulate(self.norm(x), shift, scale))


class DiT(Backbone):
    """A plain transformer over patches of `patch_size` pixels a side.

    Args:
        long_skips: join the input of each block of the second half with its mirror's output (Bao et al. 2023): the
            paper's UViT.
        qk_norm: norms of queries and keys, as `BlockStyle` says.
        norm: `layer` (published) or `rms`.
        mlp: `gelu` (published) or `swiglu`.
        positions: `absolute` (published: sines and cosines, added to the patches), `rotary` (queries and keys turn), or
            `both`.
        modulation: `block` (published: each block has a modulator) or `shared` (one for all and an offset a block: a
            third of the parameters less).
        second_time: be told of one, `r`: see `Backbone`.
        augment_dim: be told of changes of images by so many numbers, `augment`: see `Backbone`.
    """

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
        qk_norm: bool = False,
        norm: str = "layer",
        mlp: str = "gelu",
        positions: str = "absolute",
        modulation: str = "block",
        second_time: bool = False,
        augment_dim: int = 0,
    ) -> None:
        super().__init__()
        check_choice("modulation", modulation, MODULATIONS)
        self.input_size = check_input_size(input_size, patch_size)
        self.in_channels, self.out_channels, self.num_classes = in_channels, out_channels, num_classes
        self.patch_size = patch_size
        self.grid = self.input_size[0] // patch_size, self.input_size[1] // patch_size

        self.cond = Conditioning(num_classes, dim, second_time=second_time, augment_dim=augment_dim)
        self.patch = nn.Linear(in_channels * patch_size**2, dim)
        absolute = sincos_2d(dim, *self.grid) if positions != "rotary" else torch.zeros(1, dim)
        self.register_buffer("positions", absolute, persistent=False)
        rotary = make_rotary(positions, dim // num_heads, self.grid)
        style = BlockStyle(qk_norm=qk_norm, norm=norm, mlp=mlp, rotary=rotary)
        self.modulation = MODULATIONS[modulation][0](dim, 6 * dim)
        self.blocks = nn.ModuleList(
            DiTBlock(dim, num_heads, style, mlp_ratio=mlp_ratio, modulation=modulation) for _ in range(depth)
        )
        num_skips = (depth - 1) // 2 if long_skips else 0
        self.joins = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in range(num_skips))
        self.final = FinalLayer(dim, out_channels * patch_size**2, style)
        self._initialise()

    def block_types(self) -> tuple[type[nn.Module], ...]:
        return (DiTBlock,)

    def _initialise(self) -> None:
        time = [module for module in self.modules() if isinstance(module, TimeEmbedding)]
        initialise_linears_(self, nn.init.xavier_uniform_, but={layer for module in time for layer in module.modules()})
        for name, module in self.named_modules():
            if name.endswith("modulation") and isinstance(module, nn.Linear):
                zero_(module)
        zero_(self.final.linear)

    def forward(self, x_t: Images, t: Times, y: Labels, *, r: Times | None = None, augment: Changes = None) -> Output:
        cond = self.cond(t, y, r, augment)
        modulation = self.modulation(cond)  # what all blocks share of it
        x = self.patch(patchify(x_t, self.patch_size)) + self.positions

        # The first blocks leave skips, the last ones take them back in reverse.
        blocks, skips, num_skips = list(self.blocks), [], len(self.joins)
        for block in blocks[:num_skips]:
            x = block(x, modulation)
            skips.append(x)
        for block in blocks[num_skips : len(blocks) - num_skips]:
            x = block(x, modulation)
        for join, block in zip(self.joins, blocks[len(blocks) - num_skips :], strict=True):
            x = block(join(torch.cat([x, skips.pop()], dim=-1)), modulation)

        return unpatchify(self.final(x, cond), self.grid, self.patch_size)


SIZES = {
    "S": {"dim": 384, "depth": 12, "num_heads": 6},
    "B": {"dim": 768, "depth": 12, "num_heads": 12},
    "L": {"dim": 1024, "depth": 24, "num_heads": 16},
    "XL": {"dim": 1152, "depth": 28, "num_heads": 16},
}
FAMILIES = {  # what they differ in from the rows above, and sides of a patch
    "DiT": ({}, (2, 4, 8)),
    "UViT": ({"long_skips": True}, (2, 4, 8)),
    "LightningDiT": ({"norm": "rms", "mlp": "swiglu", "positions": "both"}, (1, 2)),  # Yao et al. 2025
}
MODELS = {
    f"{family}-{size}/{patch_size}": (DiT, {**row, **others, "patch_size": patch_size})
    for family, (others, patch_sizes) in FAMILIES.items()
    for size, row in SIZES.items()
    for patch_size in patch_sizes
}
