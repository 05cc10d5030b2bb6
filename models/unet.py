"""Convolutional U-Nets with optional attention: the backbones for diffusion in pixel space."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.backbone import Backbone
from models.layers import AugmentLabels, Cond, GuidanceScales, Images, Labels, Output, Times, check_choice
from models.layers.embedding import Conditioning
from models.layers.initialisation import zero_
from models.layers.patch import check_input_size
from models.layers.residual import ATTENTIONS, UPSAMPLERS, Downsample, ImageAttention, ResidualBlock, group_norm

LETTERS = {"R": False, "A": True}  # a residual block, and whether attention follows it


class Level(nn.Module):
    """Residual blocks at one resolution. `spelling` has a letter for each: `R` without, `A` with attention after it."""

    def __init__(
        self,
        spelling: str,
        in_channels: int,
        out_channels: int,
        *,
        cond_dim: int,
        num_heads: int,
        attention_axis: str,
        dropout: float,
    ) -> None:
        super().__init__()
        widths = [in_channels, *[out_channels] * (len(spelling) - 1)]
        self.blocks = nn.ModuleList(ResidualBlock(width, out_channels, cond_dim, dropout=dropout) for width in widths)
        self.attentions = nn.ModuleList(
            ImageAttention(out_channels, num_heads, attention_axis) if LETTERS[letter] else nn.Identity()
            for letter in spelling
        )

    def forward(self, x: Images, cond: Cond) -> Output:
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            x = attention(block(x, cond))
        return x


class UNet(Backbone):
    """Encoder levels, a middle and decoder levels; the input of each encoder level is the skip to its mirror in the
    decoder (Ronneberger et al. 2015, Ho et al. 2020).

    Images may have any size: downsampling rounds a side up, and upsampling restores the size of the skip. Images are
    not padded to a multiple, so norms and attention see no padding.

    Each level is spelled as a word with a letter for each block: `R` for a residual block, `A` for one with attention.
    `second_time`, `augment_dim` and `guidance_input` are those of `Backbone`.

    Args:
        channels: width of the stem, then of each level, from the finest; multiples of 8.
        down: words of the encoder levels, from the finest; each level ends with a convolution of stride two.
        middle_channels: width of each group of blocks in the middle, below the coarsest level.
        middle: words of these groups.
        up: words of the decoder levels, from the coarsest.
        time_dim: width of the conditioning, the embedding of time and label.
        attention_axis: `pixels` attend to pixels, or `channels` to channels.
        upsampling: `transposed` convolution, or `nearest` neighbour followed by a convolution.
        stem_size: side of the first convolution's kernel, odd.
    """

    def __init__(
        self,
        *,
        input_size: int | tuple[int, int],
        in_channels: int,
        out_channels: int,
        num_classes: int,
        channels: Sequence[int] = (32, 64, 128, 256),
        down: Sequence[str] = ("AA", "AA", "AA"),
        middle_channels: Sequence[int] = (256, 128),
        middle: Sequence[str] = ("AA", "AA"),
        up: Sequence[str] = ("AA", "AA", "AA"),
        time_dim: int = 128,
        num_heads: int = 4,
        attention_axis: str = "pixels",
        upsampling: str = "transposed",
        stem_size: int = 3,
        dropout: float = 0.0,
        second_time: bool = False,
        augment_dim: int = 0,
        guidance_input: bool = False,
    ) -> None:
        super().__init__()
        _check_spelling("down", down, len(channels) - 1)
        _check_spelling("middle", middle, len(middle_channels))
        _check_spelling("up", up, len(channels) - 1)
        check_choice("attention_axis", attention_axis, ATTENTIONS)
        check_choice("upsampling", upsampling, UPSAMPLERS)
        if stem_size % 2 == 0:
            raise ValueError(f"stem_size={stem_size} must be odd")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} must lie in [0, 1)")
        self.input_size = check_input_size(input_size, 1)
        self.in_channels, self.out_channels, self.num_classes = in_channels, out_channels, num_classes

        level = partial(Level, cond_dim=time_dim, num_heads=num_heads, attention_axis=attention_axis, dropout=dropout)
        stem_width, *level_widths = channels
        skip_widths = list(channels[:-1])  # skips are the inputs of the encoder levels
        self.cond = Conditioning(
            num_classes,
            time_dim,
            std=None,
            second_time=second_time,
            augment_dim=augment_dim,
            guidance_input=guidance_input,
        )
        self.stem = nn.Conv2d(in_channels, stem_width, stem_size, padding=stem_size // 2)

        self.encoder = nn.ModuleList(map(level, down, skip_widths, level_widths))
        self.downsamples = nn.ModuleList(map(Downsample, level_widths))

        middle_inputs = [channels[-1], *middle_channels[:-1]]
        self.middle = nn.ModuleList(map(level, middle, middle_inputs, middle_channels))

        outputs = skip_widths[::-1]  # a decoder level returns the width that its mirror in the encoder was given
        inputs = [middle_channels[-1], *outputs[:-1]]
        joint_widths = [width + skip for width, skip in zip(inputs, outputs, strict=True)]
        self.upsamples = nn.ModuleList(map(UPSAMPLERS[upsampling], inputs))
        self.decoder = nn.ModuleList(map(level, up, joint_widths, outputs))

        self.norm = group_norm(stem_width)
        self.head = zero_(nn.Conv2d(stem_width, out_channels, 3, padding=1))

    def block_types(self) -> tuple[type[nn.Module], ...]:
        return ResidualBlock, ImageAttention

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
        x, skips = self._run_encoder(x_t, cond)

        for level in self.middle:
            x = level(x, cond)

        # Decoder: upsample to the size of the skip, concatenate it.
        for upsample, level, skip in zip(self.upsamples, self.decoder, reversed(skips), strict=True):
            x = upsample(x, skip.shape[-2:])
            x = level(torch.cat([x, skip], dim=1), cond)

        # Contiguous like the input: noise drawn with the output's memory format would have other values.
        return self.head(F.silu(self.norm(x))).contiguous()

    def encode(self, x_t: Images, t: Times, y: Labels) -> list[Float[Tensor, "b _ _ _"]]:
        """Return the encoder's activations: the inputs of its levels, from the finest, and of the middle."""
        x, skips = self._run_encoder(x_t, self.cond(t, y))
        return [*skips, x]

    def _run_encoder(self, x_t: Tensor, cond: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the input of the middle, and the skips: the input of each level."""
        # In channels_last, attention's tokens are a view of the feature map.
        x = self.stem(x_t.contiguous(memory_format=torch.channels_last))
        skips = []
        for level, downsample in zip(self.encoder, self.downsamples, strict=True):
            skips.append(x)
            x = downsample(level(x, cond))
        return x, skips


def _check_spelling(name: str, words: Sequence[str], num_levels: int) -> None:
    if isinstance(words, str) or len(words) != num_levels:
        raise ValueError(f"{name}={words}: must be {num_levels} words, one for each of its widths")
    for word in words:
        if not word or set(word) - LETTERS.keys():
            raise ValueError(f"{name}={word}: a letter a block, R for a residual block, A for one with attention")
