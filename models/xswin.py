"""XSwin and USwin: hierarchical U-Nets of Swin V2 blocks, with localized cross-attention or concatenated skips."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from models.backbone import Backbone
from models.layers import AugmentLabels, Cond, Grid, GuidanceScales, Images, Labels, Output, Times, Tokens, check_choice
from models.layers.attention import SelfAttention
from models.layers.embedding import AddedEmbedding, Conditioning, NoConditioning, sincos_2d
from models.layers.initialisation import initialise_linears_, zero_
from models.layers.modulation import CONDITIONINGS, ConditioningLayers, Gate, Modulator, PassThrough
from models.layers.patch import CONV_NORMS, STEMS, PatchExpanding, PatchMerging, check_input_size, modulate_image
from models.layers.style import BlockStyle, DropPath, rising_drop_rates
from models.layers.window import SKIPS, Precomputation, Precomputed, WindowAttention


class SwinBlock(nn.Module):
    """Swin V2 block: window attention and MLP, each with modulation before and a norm after it (res-post-norm)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        cond_layers: ConditioningLayers,
        style: BlockStyle,
        window_size: int,
        shifted: bool,
        neighbourhood: int | None = None,
        mlp_ratio: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.token = cond_layers.token(dim)
        self.modulator1 = cond_layers.modulator(dim)
        self.attention = WindowAttention(
            dim,
            num_heads,
            neighbourhood or window_size,
            shifted=shifted,
            neighbourhood=neighbourhood is not None,
            qk_norm=style.qk_norm,
        )
        self.norm1 = style.make_norm(dim)
        self.gate1 = cond_layers.gate(dim)
        self.modulator2 = cond_layers.modulator(dim)
        self.mlp = style.make_mlp(dim, int(dim * mlp_ratio))
        self.norm2 = style.make_norm(dim)
        self.gate2 = cond_layers.gate(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Grid, cond: Cond, precomputed: Precomputed | None = None) -> Grid:
        branch = self.norm1(self.attention(self.modulator1(x, cond), self.token(cond), precomputed))
        x = self.drop_path(x, self.gate1(branch, cond))
        branch = self.norm2(self.mlp(self.modulator2(x, cond)))
        return self.drop_path(x, self.gate2(branch, cond))


class GlobalBlock(nn.Module):
    """ViT block: global attention and MLP, each with modulation and a norm before it (pre-norm)."""

    def __init__(
        self, dim: int, num_heads: int, *, cond_layers: ConditioningLayers, style: BlockStyle, mlp_ratio: float
    ) -> None:
        super().__init__()
        self.token = cond_layers.token(dim)
        self.modulator1 = cond_layers.modulator(dim)
        self.norm1 = style.make_norm(dim, eps=1e-6)
        self.attention = SelfAttention(dim, num_heads, qk_norm=style.qk_norm)
        self.gate1 = cond_layers.gate(dim)
        self.modulator2 = cond_layers.modulator(dim)
        self.norm2 = style.make_norm(dim, eps=1e-6)
        self.mlp = style.make_mlp(dim, int(dim * mlp_ratio))
        self.gate2 = cond_layers.gate(dim)

    def forward(self, x: Tokens, cond: Cond) -> Tokens:
        branch = self.attention(self.norm1(self.modulator1(x, cond)), self.token(cond))
        x = x + self.gate1(branch, cond)
        branch = self.mlp(self.norm2(self.modulator2(x, cond)))
        return x + self.gate2(branch, cond)


class EncoderStage(nn.Module):
    """Swin blocks at one resolution."""

    def __init__(self, blocks: Sequence[SwinBlock]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Grid, cond: Cond, precomputed: Mapping[Any, Precomputed]) -> Grid:
        for block in self.blocks:
            x = block(x, cond, precomputed.get(block.attention))
        return x


class DecoderStage(nn.Module):
    """Concatenates input and skip, then applies an optional Swin block at the joint width, a linear projection back to
    the stage's width, and the other Swin blocks."""

    def __init__(
        self,
        skip: nn.Module,
        wide: SwinBlock | None,
        blocks: Sequence[SwinBlock],
        *,
        joint_width: int,
        width: int,
        cond_layers: ConditioningLayers,
    ) -> None:
        super().__init__()
        self.skip, self.wide = skip, wide
        self.modulator = cond_layers.modulator(joint_width)
        self.halve = nn.Linear(joint_width, width)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Grid, skip: Grid, cond: Cond, precomputed: Mapping[Any, Precomputed]) -> Grid:
        x = torch.cat([x, self.skip(x, skip, cond)], dim=-1)
        if self.wide is not None:
            x = self.wide(x, cond, precomputed.get(self.wide.attention))
        x = self.halve(self.modulator(x, cond))
        for block in self.blocks:
            x = block(x, cond, precomputed.get(block.attention))
        return x


class XSwin(Backbone):
    """A hierarchical U-Net of Swin V2 blocks with cross-attention skips.

    The input passes a convolutional stem and is split into patches. Encoder stages of Swin V2 blocks alternate with
    patch merging; global ViT blocks form the bottleneck; decoder stages alternate with patch expanding and receive the
    encoder's skips. A second stem, which also sees the output of the first, turns patches back into pixels. `qk_norm`,
    `norm` and `mlp` are those of `BlockStyle`; `second_time`, `augment_dim` and `guidance_input` those of `Backbone`.

    Args:
        dim: width of the first stage and of the conditioning; each further stage doubles the width.
        depths: number of Swin blocks in each stage, the same in encoder and decoder.
        num_heads: attention heads of each stage.
        window_size: side of the attention windows, in tokens.
        neighbourhood: side of the neighbourhood, an odd number of tokens, that self-attention sees instead of shifted
            windows (as in HDiT, Crowson et al. 2024); None: windows. Skips attend inside windows either way.
        patch_size: side of a patch, in latent pixels; must divide the input.
        num_global_blocks: number of ViT blocks at the bottleneck.
        skip: `cross_attention` (XSwin, inside windows), `global_cross_attention`, `concat` (USwin) or `none`.
        wide_decoder: run the first block of each decoder stage at the joint width of input and skip (published). False
            runs all blocks at the stage's width, with 30% fewer FLOPs at one block a stage.
        final_downsample: apply patch merging after the last stage too.
        stem: `convolutions` before patching and after unpatching (published), or `none`.
        conv_norm: norm of the convolutions, `batch` (published) or `group`, which is independent of the batch.
        conditioning: how time and label enter: `adaln` (published: shift and scale before every layer), `adaln_zero`
            (also a gate on every residual branch), `tokens` (one more token in every attention), or `none`, for dense
            prediction.
        drop_path: stochastic depth rate of the last block; rates rise linearly from 0 through encoder and decoder.
    """

    def __init__(
        self,
        *,
        input_size: int | tuple[int, int],
        in_channels: int,
        out_channels: int,
        num_classes: int,
        dim: int = 192,
        depths: Sequence[int] = (3, 3),
        num_heads: Sequence[int] = (6, 12),
        window_size: int = 2,
        neighbourhood: int | None = None,
        patch_size: int = 1,
        num_global_blocks: int = 3,
        mlp_ratio: float = 4.0,
        skip: str = "cross_attention",
        wide_decoder: bool = True,
        final_downsample: bool = False,
        stem: str = "convolutions",
        conv_norm: str = "batch",
        conditioning: str = "adaln",
        drop_path: float = 0.1,
        qk_norm: bool = False,
        norm: str = "layer",
        mlp: str = "gelu",
        second_time: bool = False,
        augment_dim: int = 0,
        guidance_input: bool = False,
    ) -> None:
        super().__init__()
        self.input_size = check_input_size(input_size, patch_size)
        if len(depths) != len(num_heads) or not depths:
            raise ValueError(f"depths={list(depths)} and num_heads={list(num_heads)} must be of one length")
        if neighbourhood is not None and neighbourhood % 2 == 0:
            raise ValueError(f"neighbourhood={neighbourhood} must be an odd number of tokens; None is shifted windows")
        check_choice("skip", skip, SKIPS)
        check_choice("stem", stem, STEMS)
        check_choice("conv_norm", conv_norm, CONV_NORMS)
        check_choice("conditioning", conditioning, CONDITIONINGS)
        inputs = {"second_time": second_time, "augment_dim": augment_dim, "guidance_input": guidance_input}
        if conditioning == "none":
            check_unconditional(num_classes, **inputs)
        self.in_channels, self.out_channels, self.num_classes = in_channels, out_channels, num_classes

        self.cond_layers = cond_layers = ConditioningLayers(conditioning, dim)
        style = BlockStyle(qk_norm=qk_norm, norm=norm, mlp=mlp)
        shared = {"cond_layers": cond_layers, "style": style, "mlp_ratio": mlp_ratio}
        swin_block = partial(SwinBlock, window_size=window_size, neighbourhood=neighbourhood, **shared)

        def make_blocks(width: int, heads: int, rates: Sequence[float], first: int = 0) -> list[SwinBlock]:
            """Blocks of a stage, one for each rate, from the `first` on; every second one shifts its windows."""
            numbers = range(first, len(rates))
            return [swin_block(width, heads, shifted=n % 2 == 1, drop_path=rates[n]) for n in numbers]

        num_stages, rates = len(depths), iter(rising_drop_rates(drop_path, 2 * sum(depths)))
        rates_of_stages = [[*islice(rates, depth)] for depth in (*depths, *reversed(depths))]
        widths = [dim * 2**level for level in range(num_stages)]
        merged = [True] * (num_stages - 1) + [final_downsample]  # whether patch merging follows a stage

        # Conditioning, stem, patch embedding.
        if conditioning == "none":
            self.cond = NoConditioning()
        else:
            self.cond = Conditioning(num_classes, dim, **inputs)
        self.stem_in = STEMS[stem](in_channels, dim, cond_layers, conv_norm)
        self.patch_modulator = cond_layers.modulator(self.stem_in.out_channels)
        self.patch = nn.Conv2d(self.stem_in.out_channels, dim, patch_size, stride=patch_size)
        self.patch_norm = style.make_norm(dim)

        # Encoder.
        self.encoder, self.merges = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            self.encoder.append(EncoderStage(make_blocks(width, num_heads[level], rates_of_stages[level])))
            self.merges.append(PatchMerging(width, cond_layers, style) if merged[level] else PassThrough())

        # Bottleneck.
        factor, middle_dim = patch_size * 2 ** sum(merged), widths[-1] * (2 if final_downsample else 1)
        grid = [-(-side // factor) for side in self.input_size]
        self.register_buffer("positions", sincos_2d(middle_dim, *grid), persistent=False)
        blocks = [GlobalBlock(middle_dim, num_heads[-1], **shared) for _ in range(num_global_blocks)]
        self.middle = nn.ModuleList(blocks)

        # Decoder.
        self.expands, self.decoder = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(num_stages)):
            width, heads, stage_rates = widths[level], num_heads[level], rates_of_stages[-1 - level]
            self.expands.append(PatchExpanding(2 * width, cond_layers, style) if merged[level] else PassThrough())
            skip_layer = SKIPS[skip](width, heads, cond_layers, style, window_size)
            joint_width = width + skip_layer.dim
            wide = make_blocks(joint_width, heads * joint_width // width, stage_rates[:1])[0] if wide_decoder else None
            blocks = make_blocks(width, heads, stage_rates, first=int(wide_decoder))
            stage = DecoderStage(
                skip_layer, wide, blocks, joint_width=joint_width, width=width, cond_layers=cond_layers
            )
            self.decoder.append(stage)

        # Patches to pixels, stem, head.
        self.unpatch_modulator = cond_layers.modulator(dim)
        self.unpatch = nn.ConvTranspose2d(dim, dim, patch_size, stride=patch_size)
        self.unpatch_norm = CONV_NORMS[conv_norm](dim)
        self.stem_out = STEMS[stem](dim + self.stem_in.out_channels, dim, cond_layers, conv_norm)
        self.head_modulator = cond_layers.modulator(self.stem_out.out_channels)
        self.head = nn.Conv2d(self.stem_out.out_channels, out_channels, 1)
        self.precompute = Precomputation([m.attention for m in self.modules() if isinstance(m, SwinBlock)])
        self._initialise()

    def _initialise(self) -> None:
        initialise_linears_(self, partial(nn.init.trunc_normal_, std=0.02))
        for module in self.modules():
            if isinstance(module, Modulator | Gate):
                zero_(module.linear)
            if isinstance(module, AddedEmbedding):
                module.reset()

    def block_types(self) -> tuple[type[nn.Module], ...]:
        return SwinBlock, GlobalBlock

    def as_tokens(self, state: Float[Tensor, "b ... d"]) -> Tokens:
        return state.flatten(1, -2)

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
        cond = self.cond_layers(self.cond(t, y, r, augment, g))
        precomputed = self.precompute(x_t)

        # Convolutional stem (if any), patch embedding.
        stem = self.stem_in(x_t, cond)
        x = self.patch(modulate_image(self.patch_modulator, stem, cond))
        x = self.patch_norm(rearrange(x, "b d h w -> b h w d"))

        # Encoder: the output of each stage is a skip.
        skips = []
        for stage, merge in zip(self.encoder, self.merges, strict=True):
            x = stage(x, cond, precomputed)
            skips.append(x)
            x = merge(x, cond)

        # Bottleneck: global attention over all tokens.
        height = x.shape[1]
        x = rearrange(x, "b h w d -> b (h w) d") + self.positions
        for block in self.middle:
            x = block(x, cond)
        x = rearrange(x, "b (h w) d -> b h w d", h=height)

        # Decoder: each stage receives the skip of its mirror.
        for expand, stage, skip in zip(self.expands, self.decoder, reversed(skips), strict=True):
            x = expand(x, cond, skip.shape[1:3])
            x = stage(x, skip, cond, precomputed)

        # Patches to pixels, convolutional stem, head.
        x = modulate_image(self.unpatch_modulator, rearrange(x, "b h w d -> b d h w"), cond)
        x = self.unpatch_norm(self.unpatch(x))
        x = self.stem_out(torch.cat([x, stem], dim=1), cond)
        return self.head(modulate_image(self.head_modulator, x, cond))


def check_unconditional(num_classes: int, *, second_time: bool, augment_dim: int, guidance_input: bool) -> None:
    """Raise `ValueError` if a backbone without conditioning is given something to condition on."""
    inputs = {"labels no place: --data.use_labels false": num_classes}
    inputs |= {"a second time no place: --diffusion.kind flow": second_time}
    inputs |= {"a guidance scale no place: --diffusion.guidance_max null": guidance_input}
    inputs |= {"changes of images no place: --train.augment 0": augment_dim}
    for problem in filter(inputs.get, inputs):
        raise ValueError(f"conditioning=none leaves {problem}, or another one")
