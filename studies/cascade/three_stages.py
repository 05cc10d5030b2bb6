"""Backbone of the cascade: three wide, shallow stages (coarse, upsampler, refiner), each chosen from a table."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.backbone import Backbone
from models.layers import Images, Labels, Output, Times, check_choice
from models.layers.attention import check_heads
from models.layers.embedding import Conditioning, TimeEmbedding, sincos_2d
from models.layers.initialisation import zero_
from models.layers.modulation import PassThrough
from models.layers.patch import check_input_size, patchify, unpatchify
from models.layers.residual import Downsample, NearestUpsample, ResidualBlock, group_norm

TIME_DIM = 128  # width of the embedding of time and label

# The coarse stage: (x_t, t, y) -> [b c_out h w], at the coarse size.


class ResidualNet(nn.Module):
    """Residual blocks at one resolution, conditioned on time and label; their width grows from `width` to `latent`."""

    def __init__(
        self, in_channels: int, out_channels: int, num_classes: int, *, width=128, latent=256, num_blocks=3
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        widths = [width, *[latent] * (num_blocks - 1)]
        self.cond = Conditioning(num_classes, TIME_DIM, std=None)
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(channels, latent, TIME_DIM, dropout=0.0) for channels in widths)
        self.norm = group_norm(latent)
        self.head = zero_(nn.Conv2d(latent, out_channels, 3, padding=1))

    def forward(self, x_t: Images, t: Times, y: Labels) -> Output:
        cond = self.cond(t, y)
        x = self.stem(x_t)
        for block in self.blocks:
            x = block(x, cond)
        return self.head(F.silu(self.norm(x)))


class Autoencoder(nn.Module):
    """Encoder to half the side, a wider bottleneck and a decoder, without skip connections around the bottleneck."""

    def __init__(
        self, in_channels: int, out_channels: int, num_classes: int, *, width: int = 128, latent: int = 256
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.cond = Conditioning(num_classes, TIME_DIM, std=None)
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1)
        self.encoder = ResidualBlock(width, width, TIME_DIM, dropout=0.0)
        self.downsample = Downsample(width)
        self.bottleneck = ResidualBlock(width, latent, TIME_DIM, dropout=0.0)
        self.upsample = NearestUpsample(latent)
        self.decoder = ResidualBlock(latent, width, TIME_DIM, dropout=0.0)
        self.norm = group_norm(width)
        self.head = zero_(nn.Conv2d(width, out_channels, 3, padding=1))

    def forward(self, x_t: Images, t: Times, y: Labels) -> Output:
        cond = self.cond(t, y)
        x = self.encoder(self.stem(x_t), cond)
        x = self.bottleneck(self.downsample(x), cond)
        x = self.decoder(self.upsample(x, tuple(x_t.shape[-2:])), cond)
        return self.head(F.silu(self.norm(x)))


# The upsampler: [b c h w] -> [b c factor*h factor*w].


class PlainBlock(nn.Sequential):
    """Residual block of two convolutions without conditioning; it starts as the identity."""

    def __init__(self, channels: int) -> None:
        first, second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        super().__init__(group_norm(channels), nn.SiLU(), first, group_norm(channels), nn.SiLU(), zero_(second))

    def forward(self, x: Images) -> Images:
        return x + super().forward(x)


def interpolation(channels: int, factor: int) -> nn.Module:
    return nn.Upsample(scale_factor=factor, mode="bilinear")


class Bilinear(nn.Sequential):
    """Bilinear interpolation followed by a convolution that starts as the identity."""

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__()
        self.interpolate = interpolation(channels, factor)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.dirac_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # pyright: ignore[reportArgumentType]


class PixelShuffle(nn.Sequential):
    """Residual blocks at the coarse size; sub-pixel convolution then turns channels into pixels (Shi et al. 2016)."""

    def __init__(self, channels: int, factor: int, *, width: int = 256, num_blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.Sequential(*(PlainBlock(width) for _ in range(num_blocks)))
        self.head = nn.Conv2d(width, channels * factor**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(factor)


class Residual(nn.Module):
    """Residual blocks whose output is added to the image; it starts at zero."""

    def __init__(self, channels: int, width: int, num_blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.Sequential(*(PlainBlock(width) for _ in range(num_blocks)))
        self.head = zero_(nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, image: Images) -> Images:
        return image + self.head(self.blocks(self.stem(image)))


class ResNet(Residual):
    """Bilinear interpolation, corrected by residual blocks at the full size."""

    def __init__(self, channels: int, factor: int, *, width: int = 128, num_blocks: int = 2) -> None:
        super().__init__(channels, width, num_blocks)
        self.interpolate = interpolation(channels, factor)

    def forward(self, image: Images) -> Float[Tensor, "b c h2 w2"]:
        return super().forward(self.interpolate(image))


# The refiner: (image, condition) -> [b c h w], at the full size.

Condition = tuple[Tensor, Tensor, Tensor, Tensor] | None
"""(x_t, t, level, y) for a diffusion refiner: noisy image, its time, noise level of the image to refine, labels."""


class ViTRefiner(nn.Module):
    """Vision transformer over patches whose output is added to the image; it starts at zero."""

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        num_classes: int,
        *,
        width: int = 256,
        depth: int = 4,
        num_heads: int = 4,
        patch_size: int = 4,
    ) -> None:
        from timm.models.vision_transformer import Block  # here, as the import takes seconds

        super().__init__()
        check_heads(width, num_heads)
        rows, columns = check_input_size(size, patch_size)
        self.patch_size, self.grid = patch_size, (rows // patch_size, columns // patch_size)
        self.patch = nn.Linear(channels * patch_size**2, width)
        self.register_buffer("position", sincos_2d(width, *self.grid), persistent=False)
        self.blocks = nn.Sequential(*(Block(width, num_heads, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = zero_(nn.Linear(width, channels * patch_size**2))

    def forward(self, image: Images, condition: Condition) -> Images:
        x = self.patch(patchify(image, self.patch_size)) + self.position  # [b n d]
        x = self.head(self.norm(self.blocks(x)))
        return image + unpatchify(x, self.grid, self.patch_size)


class ConvRefiner(Residual):
    """Residual blocks at the full size."""

    def __init__(
        self, channels: int, size: tuple[int, int], num_classes: int, *, width: int = 128, num_blocks: int = 2
    ) -> None:
        super().__init__(channels, width, num_blocks)

    def forward(self, image: Images, condition: Condition) -> Images:
        return super().forward(image)


class DiffusionRefiner(nn.Module):
    """Denoiser of the full-size image, conditioned on the image to refine and both noise levels (Ho et al. 2021)."""

    def __init__(
        self, channels: int, size: tuple[int, int], num_classes: int, *, width: int = 128, num_blocks: int = 3
    ) -> None:
        super().__init__()
        self.cond = Conditioning(num_classes, TIME_DIM, std=None)
        self.level = TimeEmbedding(TIME_DIM, std=None)
        self.stem = nn.Conv2d(2 * channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(width, width, TIME_DIM, dropout=0.0) for _ in range(num_blocks))
        self.norm = group_norm(width)
        self.head = zero_(nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, image: Images, condition: Condition) -> Images:
        assert condition is not None  # the diffusion passes it with this refiner
        x_t, t, level, y = condition
        cond = self.cond(t, y) + self.level(level)
        x = self.stem(torch.cat([x_t, image], dim=1))
        for block in self.blocks:
            x = block(x, cond)
        return self.head(F.silu(self.norm(x)))


COARSE = {"diffusion": ResidualNet, "dae": Autoencoder, "resnet": ResidualNet}
UPSAMPLERS = {"pixelshuffle": PixelShuffle, "bilinear": Bilinear, "resnet": ResNet, "interpolation": interpolation}
REFINERS = {"vit": ViTRefiner, "conv": ConvRefiner, "none": lambda *_: PassThrough(), "diffusion": DiffusionRefiner}


Connect = Callable[[Tensor], Tensor | None] | None
"""Maps the coarse stage's output to the upsampler's input, or to None where only the coarse stage is to run."""


Stages = tuple[Tensor, Tensor | None, Tensor | None]
"""Outputs of coarse stage, upsampler and refiner; None where a stage did not run."""


class Cascade(Backbone):
    """Coarse stage at a fraction of the image's side, upsampler and refiner, by their names in `COARSE`, `UPSAMPLERS`
    and `REFINERS`, with arguments that differ from their defaults.

    Like any backbone, `model(x_t, t, y)` passes an image through all three. The cascade's diffusion trains the stages
    by objectives of their own, in one call that says how they are connected (`connect`), and samples them separately.
    `factor` is the side of the image divided by that of the coarse image.
    """

    def __init__(
        self,
        *,
        input_size: int | tuple[int, int],
        in_channels: int,
        out_channels: int,
        num_classes: int,
        coarse: str = "diffusion",
        upsampler: str = "pixelshuffle",
        refiner: str = "vit",
        factor: int = 2,
        coarse_args: Mapping[str, Any] | None = None,
        upsampler_args: Mapping[str, Any] | None = None,
        refiner_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.input_size, self.factor = check_input_size(input_size, factor, "factor"), factor
        self.in_channels, self.out_channels, self.num_classes = in_channels, out_channels, num_classes
        self.coarse = _build("coarse", COARSE, coarse, coarse_args, in_channels, out_channels, num_classes)
        self.upsampler = _build("upsampler", UPSAMPLERS, upsampler, upsampler_args, out_channels, factor)
        self.refiner = _build("refiner", REFINERS, refiner, refiner_args, out_channels, self.input_size, num_classes)

    def block_types(self) -> tuple[type[nn.Module], ...]:
        from timm.models.vision_transformer import Block  # here, as the import takes seconds

        return ResidualBlock, PlainBlock, Block

    def forward(
        self, x_t: Images, t: Times, y: Labels, *, connect: Connect = None, condition: Condition = None, frozen=False
    ) -> Tensor | Stages:
        if connect is None:
            small = F.avg_pool2d(x_t, self.factor)
            upsampled = self.upsampler(self.coarse(small, t, y))
            return self.refiner(upsampled, (upsampled, t, torch.zeros_like(t), y))

        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            coarse = self.coarse(x_t, t, y)
        image = connect(coarse)
        if image is None:
            return coarse, None, None
        upsampled = self.upsampler(image)
        return coarse, upsampled, self.refiner(upsampled, condition)


def _build(
    stage: str,
    table: Mapping[str, Callable[..., nn.Module]],
    name: str,
    arguments: Mapping[str, Any] | None,
    *fixed: Any,
) -> nn.Module:
    """Build a stage by its name in a table from the fixed arguments, which follow from the others, and its own. Raises
    ValueError for an unknown name or argument."""
    check_choice(stage, name, table)
    accepted = list(inspect.signature(table[name]).parameters)[len(fixed) :]
    for argument in (arguments or {}).keys() - set(accepted):
        raise ValueError(f"--model_args.{stage}_args.{argument}: {name} takes {', '.join(accepted) or 'no arguments'}")
    return table[name](*fixed, **(arguments or {}))
