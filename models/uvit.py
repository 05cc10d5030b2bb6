"""U-ViT as published: time and label enter as tokens beside the patches (Bao et al. 2023)."""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.backbone import Backbone
from models.layers import AugmentLabels, GuidanceScales, Images, Labels, Output, Times, Tokens
from models.layers.attention import SelfAttention
from models.layers.embedding import make_inputs, make_rotary, sinusoids
from models.layers.initialisation import initialise_linears_
from models.layers.patch import check_input_size, patchify, unpatchify
from models.layers.style import BlockStyle


class Block(nn.Module):
    """A pre-norm block of attention and an MLP."""

    def __init__(self, dim: int, num_heads: int, style: BlockStyle, *, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = style.make_norm(dim)
        self.attention = SelfAttention(dim, num_heads, qkv_bias=False, qk_norm=style.qk_norm, rotary=style.rotary)
        self.norm2 = style.make_norm(dim)
        self.mlp = style.make_mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tokens) -> Tokens:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViTTokens(Backbone):
    """A transformer over a label token, a time token and the patches, with long skips and a final convolution.

    `positions` are `absolute` (published; learned), `rotary` (patches only) or `both`. `qk_norm`, `norm` and `mlp` are
    those of `BlockStyle`. The embeddings of a second time `r`, of `augment` and of a guidance scale `g` (see
    `Backbone`) are added to the time token.
    """

    def __init__(
        self,
        *,
        input_size: int | tuple[int, int],
        in_channels: int,
        out_channels: int,
        num_classes: int,
        dim: int = 384,
        depth: int = 13,
        num_heads: int = 6,
        patch_size: int = 2,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        norm: str = "layer",
        mlp: str = "gelu",
        positions: str = "absolute",
        second_time: bool = False,
        augment_dim: int = 0,
        guidance_input: bool = False,
    ) -> None:
        super().__init__()
        if depth % 2 == 0:
            raise ValueError(f"depth={depth} must be odd: as many blocks before the middle one as after it")
        self.input_size = check_input_size(input_size, patch_size)
        self.in_channels, self.out_channels, self.num_classes = in_channels, out_channels, num_classes
        self.patch_size, self.dim = patch_size, dim
        self.grid = self.input_size[0] // patch_size, self.input_size[1] // patch_size
        self.num_tokens = 2 if num_classes else 1  # label and time

        rotary = make_rotary(positions, dim // num_heads, self.grid, num_others=self.num_tokens)
        style = BlockStyle(qk_norm=qk_norm, norm=norm, mlp=mlp, rotary=rotary)
        half, make_block = depth // 2, partial(Block, dim, num_heads, style, mlp_ratio=mlp_ratio)
        self.label = nn.Embedding(num_classes + 1, dim) if num_classes else None
        self.patch = nn.Linear(in_channels * patch_size**2, dim)
        absolute = nn.Parameter(torch.zeros(self.num_tokens + self.grid[0] * self.grid[1], dim))
        self.positions = absolute if positions != "rotary" else None
        self.encoder = nn.ModuleList(make_block() for _ in range(half))
        self.middle = make_block()
        self.decoder = nn.ModuleList(make_block() for _ in range(half))
        self.joins = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in range(half))
        self.norm = style.make_norm(dim)
        self.head = nn.Linear(dim, out_channels * patch_size**2)
        self.smooth = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        nn.init.trunc_normal_(absolute, std=0.02)
        initialise_linears_(self, partial(nn.init.trunc_normal_, std=0.02))
        self.interval, self.augment, self.guidance = make_inputs(
            dim, second_time=second_time, augment_dim=augment_dim, guidance_input=guidance_input
        )

    def block_types(self) -> tuple[type[nn.Module], ...]:
        return (Block,)

    def as_tokens(self, state: Float[Tensor, "b _ d"]) -> Tokens:
        """Return the patch tokens, without those of time and label."""
        return state[:, self.num_tokens :]

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
        # Tokens: label, time, patches.
        time = self.interval(sinusoids(t, self.dim), t, r)
        time = self.guidance(self.augment(time, augment), g)
        tokens = [time[:, None], self.patch(patchify(x_t, self.patch_size))]
        if self.label is not None:
            tokens.insert(0, self.label(y)[:, None])
        x = torch.cat(tokens, dim=1)
        x = x if self.positions is None else x + self.positions

        # Transformer blocks with long skips from the first half to the second.
        skips = []
        for block in self.encoder:
            x = block(x)
            skips.append(x)
        x = self.middle(x)
        for join, block in zip(self.joins, self.decoder, strict=True):
            x = block(join(torch.cat([x, skips.pop()], dim=-1)))

        x = self.head(self.norm(x))[:, self.num_tokens :]
        return self.smooth(unpatchify(x, self.grid, self.patch_size))
