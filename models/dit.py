"""DiT: diffusion transformers with adaLN-zero conditioning (Peebles and Xie 2023)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.backbone import Backbone
from models.layers import AugmentLabels, Cond, GuidanceScales, Images, Labels, Output, Times, Tokens, check_choice
from models.layers.attention import SelfAttention
from models.layers.embedding import Conditioning, TimeEmbedding, make_rotary, sincos_2d
from models.layers.initialisation import initialise_linears_, zero_
from models.layers.modulation import Offset, modulate
from models.layers.patch import check_input_size, patchify, unpatchify
from models.layers.style import BlockStyle, DropPath, rising_drop_rates


class DiTBlock(nn.Module):
    """Attention and MLP with adaLN-zero: the conditioning sets shift, scale and gate of each, all zero at first."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        style: BlockStyle,
        *,
        mlp_ratio: float = 4.0,
        modulation: str = "block",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = style.make_norm(dim, eps=1e-6, affine=False)
        self.attention = SelfAttention(dim, num_heads, qk_norm=style.qk_norm, rotary=style.rotary)
        self.norm2 = style.make_norm(dim, eps=1e-6, affine=False)
        self.mlp = style.make_mlp(dim, int(dim * mlp_ratio), nn.GELU("tanh"))
        self.modulation = Offset(6 * dim) if modulation == "shared" else nn.Linear(dim, 6 * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tokens, cond: Cond) -> Tokens:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond).chunk(6, dim=-1)
        x = self.drop_path(x, gate1[:, None] * self.attention(modulate(self.norm1(x), shift1, scale1)))
        return self.drop_path(x, gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2)))


class FinalLayer(nn.Module):
    """Norm, modulation and a linear layer that maps each token to the pixels of its patch."""

    def __init__(self, dim: int, patch_dim: int, style: BlockStyle) -> None:
        super().__init__()
        self.norm = style.make_norm(dim, eps=1e-6, affine=False)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.linear = nn.Linear(dim, patch_dim)

    def forward(self, x: Tokens, cond: Cond) -> Float[Tensor, "b n patch"]:
        shift, scale = self.modulation(cond).chunk(2, dim=-1)
        return self.linear(modulate(self.norm(x), shift, scale))


class DiT(Backbone):
    """A plain transformer over patches of `patch_size` pixels a side. `qk_norm`, `norm` and `mlp` are those of
    `BlockStyle`; `second_time`, `augment_dim` and `guidance_input` those of `Backbone`.

    Args:
        long_skips: concatenate the input of each block in the second half with the output of its mirror in the first
            (Bao et al. 2023); this makes the XSwin paper's UViT.
        positions: `absolute` (published: fixed sin-cos embeddings added to the patches), `rotary` (applied to queries
            and keys), or `both`.
        modulation: `block` (published: a linear layer in each block) or `shared` (one linear layer for all blocks and
            an offset in each, which saves a third of the parameters: adaLN-single, Chen et al. 2023).
        drop_path: stochastic depth rate of the last block; rates rise linearly from 0 (published: none).
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
        drop_path: float = 0.0,
        second_time: bool = False,
        augment_dim: int = 0,
        guidance_input: bool = False,
    ) -> None:
        super().__init__()
        check_choice("modulation", modulation, ("block", "shared"))
        self.input_size = check_input_size(input_size, patch_size)
        self.in_channels, self.out_channels, self.num_classes = in_channels, out_channels, num_classes
        self.patch_size = patch_size
        self.grid = self.input_size[0] // patch_size, self.input_size[1] // patch_size

        self.cond = Conditioning(
            num_classes, dim, second_time=second_time, augment_dim=augment_dim, guidance_input=guidance_input
        )
        self.patch = nn.Linear(in_channels * patch_size**2, dim)
        absolute = sincos_2d(dim, *self.grid) if positions != "rotary" else torch.zeros(1, dim)
        self.register_buffer("positions", absolute, persistent=False)
        rotary = make_rotary(positions, dim // num_heads, self.grid)
        style = BlockStyle(qk_norm=qk_norm, norm=norm, mlp=mlp, rotary=rotary)
        self.modulation = nn.Linear(dim, 6 * dim) if modulation == "shared" else nn.Identity()
        self.blocks = nn.ModuleList(
            DiTBlock(dim, num_heads, style, mlp_ratio=mlp_ratio, modulation=modulation, drop_path=rate)
            for rate in rising_drop_rates(drop_path, depth)
        )
        num_skips = (depth - 1) // 2 if long_skips else 0
        self.joins = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in range(num_skips))
        self.final = FinalLayer(dim, out_channels * patch_size**2, style)
        self._initialise()

    def block_types(self) -> tuple[type[nn.Module], ...]:
        return (DiTBlock,)

    def _initialise(self) -> None:
        embeddings = [module for module in self.modules() if isinstance(module, TimeEmbedding)]
        exclude = {layer for embedding in embeddings for layer in embedding.modules()}
        initialise_linears_(self, nn.init.xavier_uniform_, exclude=exclude)
        for name, module in self.named_modules():
            if name.endswith("modulation") and isinstance(module, nn.Linear):
                zero_(module)
        zero_(self.final.linear)

    def forward(
        self,
        x_t: Images,
        t: Times,
        y: Labels,
        *,
        r: Times | None = None,
        augment: AugmentLabels = None,
        g: GuidanceScales = None,
    ) -> Output:
        cond = self.cond(t, y, r, augment, g)
        modulation = self.modulation(cond)  # shared by all blocks
        x = self.patch(patchify(x_t, self.patch_size)) + self.positions

        # Blocks of the first half push skips, mirrored blocks of the second half pop them (none without long skips).
        blocks, skips, num_skips = list(self.blocks), [], len(self.joins)
        for block in blocks[:num_skips]:
            x = block(x, modulation)
            skips.append(x)
        for block in blocks[num_skips : len(blocks) - num_skips]:
            x = block(x, modulation)
        for join, block in zip(self.joins, blocks[len(blocks) - num_skips :], strict=True):
            x = block(join(torch.cat([x, skips.pop()], dim=-1)), modulation)

        return unpatchify(self.final(x, cond), self.grid, self.patch_size)
