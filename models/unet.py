"""Convolutional U-Nets with attention where it is asked for: the backbones of denoising in pixel space."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.backbone import Backbone
from models.layers import Changes, Cond, Images, Labels, Output, Times, check_choice
from models.layers.embedding import Conditioning
from models.layers.initialisation import zero_
from models.layers.patch import check_input_size
from models.layers.residual import ATTENTIONS, UPSAMPLERS, Downsample, ImageAttention, ResidualBlock, group_norm

LETTERS = {"R": False, "A": True}  # of a level's blocks: whether attention follows


class Level(nn.Module):
    """Residual blocks at one resolution, spelled: `RA` is one without and one with attention after it."""

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
    """Levels down, a middle, levels up, each of which is given its mirror's input (Ronneberger et al. 2015, Ho et al.
    2020).

    Images may have any size: a side is halved to its half rounded up, and doubled to the size it had there. Nothing is
    padded, so norms and attention see the image alone.

    Blocks are spelled, a word a level and a letter a block: `R` a residual block, `A` one with attention after it.

    Args:
        channels: width of the stem, then of each level, from the finest; multiples of 8.
        down: blocks of each level on the way down, from the finest; a level ends with a convolution of stride two.
        middle_channels: width of each group in the middle, below the coarsest level.
        middle: its blocks.
        up: blocks of each level on the way up, from the coarsest.
        time_dim: width of the embedding of time and label.
        attention_axis: `pixels` attend to pixels, or `channels` to channels.
        upsampling: `transposed` convolution, or `nearest` pixel and convolution.
        stem_size: side of the first convolution's kernel, odd.
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
        skip_widths = list(channels[:-1])  # what each level is given
        self.cond = Conditioning(num_classes, time_dim, std=None, second_time=second_time, augment_dim=augment_dim)
        self.stem = nn.Conv2d(in_channels, stem_width, stem_size, padding=stem_size // 2)

        self.encoder = nn.ModuleList(map(level, down, skip_widths, level_widths))
        self.downsamples = nn.ModuleList(map(Downsample, level_widths))

        middle_inputs = [channels[-1], *middle_channels[:-1]]
        self.middle = nn.ModuleList(map(level, middle, middle_inputs, middle_channels))

        outputs = skip_widths[::-1]  # of the levels on the way up: as their mirrors were given
        inputs = [middle_channels[-1], *outputs[:-1]]
        joined = [width + skip for width, skip in zip(inputs, outputs, strict=True)]
        self.upsamples = nn.ModuleList(map(UPSAMPLERS[upsampling], inputs))
        self.decoder = nn.ModuleList(map(level, up, joined, outputs))

        self.norm = group_norm(stem_width)
        self.head = zero_(nn.Conv2d(stem_width, out_channels, 3, padding=1))

    def block_types(self) -> tuple[type[nn.Module], ...]:
        return ResidualBlock, ImageAttention

    def forward(self, x_t: Images, t: Times, y: Labels, *, r: Times | None = None, augment: Changes = None) -> Output:
        cond = self.cond(t, y, r, augment)
        x, skips = self._down(x_t, cond)

        for level in self.middle:
            x = level(x, cond)

        # Up: the skip's size decides how far.
        for upsample, level, skip in zip(self.upsamples, self.decoder, reversed(skips), strict=True):
            x = upsample(x, skip.shape[-2:])
            x = level(torch.cat([x, skip], dim=1), cond)

        return self.head(F.silu(self.norm(x))).contiguous()  # as it came: noise drawn like it follows its memory format

    def encode(self, x_t: Images, t: Times, y: Labels) -> list[Float[Tensor, "b _ _ _"]]:
        """The encoder's features: what each level is given, from the finest, and what the middle is."""
        x, skips = self._down(x_t, self.cond(t, y))
        return [*skips, x]

    def _down(self, x_t: Tensor, cond: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The way down: what the middle is given, and each level, which is its mirror's skip."""
        x = self.stem(x_t.contiguous(memory_format=torch.channels_last))  # tokens are then a view of it
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


# Three studies in pixel space. The first four rows are of anime faces at 64x64, after their published table: 10.2M
# parameters of its 10M, 50.1 of 49, 77.0 of 74, 83.0 of 85 (its strided convolutions are 4x4, and its last level ends
# narrower). Giga's table and text disagree on the middle: three blocks a group, as its three letters say.
_ANIME = {"channels": (32, 64, 128, 256, 512), "middle_channels": (512, 256)}
_GIGA = {"channels": (128, 256, 256, 512), "middle_channels": (512, 256), "dropout": 0.1}
_CIFAR10 = {"channels": (64, 64, 128, 256), "middle_channels": (512,), "num_heads": 8, "stem_size": 7}
_MNIST = {"channels": (64, 64, 128, 256), "middle_channels": (256,)}
_ROWS = {
    "UNet-Mini": {},
    "UNet-Simple": {**_ANIME, "down": ("AAA",) * 4, "middle": ("AA", "AA"), "up": ("AAA",) * 4},
    "UNet-Mega": {**_ANIME, "down": ("AAAAA",) * 4, "middle": ("AAA",) * 2, "up": ("AAAAA",) * 4, "dropout": 0.1},
    "UNet-Giga": {**_GIGA, "down": ("RARAA",) * 3, "middle": ("RAR", "RAR"), "up": ("RARAR",) * 3},
    # CIFAR-10 at 32x32: multipliers 1, 2, 4 and, in the middle, 8; attention at 16x16 and 8x8. -S, a block a level, is
    # its variant for MNIST: 16.9M of about 15M; the study gives no more of its layout than the multipliers.
    "UNet-CIFAR10": {**_CIFAR10, "down": ("RR", "AA", "AA"), "middle": ("RR",), "up": ("AA", "AA", "RR")},
    "UNet-CIFAR10-S": {**_CIFAR10, "down": ("R", "A", "A"), "middle": ("RR",), "up": ("A", "A", "R")},
    # Class-conditional MNIST at 28x28, small enough for two CPU cores; attention at 7x7 and 4x4.
    "UNet-MNIST": {**_MNIST, "down": ("R", "R", "A"), "middle": ("A",), "up": ("A", "R", "R")},
}
MODELS = {name: (UNet, row) for name, row in _ROWS.items()}
