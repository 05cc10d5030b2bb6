"""Convolutions around a transformer: before its patches, and after."""

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from models.layers.modulation import Injection


class ConvStem(nn.Module):
    """Three modulated 3x3 convolutions, each with its norm and a leaky ReLU."""

    def __init__(self, in_channels: int, dim: int, injection: Injection, norm: str) -> None:
        super().__init__()
        self.out_channels = dim
        widths = [in_channels, dim, dim]
        self.modulators = nn.ModuleList(map(injection.modulator, widths))
        self.convs = nn.ModuleList(nn.Conv2d(width, dim, 3, padding=1) for width in widths)
        self.norms = nn.ModuleList(CONV_NORMS[norm](dim) for _ in widths)
        self.activation = nn.LeakyReLU()

    def forward(self, x: Float[Tensor, "b c h w"], cond: Tensor) -> Float[Tensor, "b d h w"]:
        for modulator, conv, norm in zip(self.modulators, self.convs, self.norms, strict=True):
            x = self.activation(norm(conv(modulate_image(modulator, x, cond))))
        return x


class NoStem(nn.Module):
    """The image as it is."""

    def __init__(self, in_channels: int, dim: int, injection: Injection, norm: str) -> None:
        super().__init__()
        self.out_channels = in_channels

    def forward(self, x: Float[Tensor, "b c h w"], cond: Tensor) -> Float[Tensor, "b c h w"]:
        return x


STEMS = {"convolutions": ConvStem, "none": NoStem}
CONV_NORMS = {"batch": nn.BatchNorm2d, "group": lambda dim: nn.GroupNorm(min(32, dim // 4), dim)}


def modulate_image(modulator: nn.Module, x: Float[Tensor, "b c h w"], cond: Tensor) -> Float[Tensor, "b c h w"]:
    """A modulator over the channels of an image."""
    return rearrange(modulator(rearrange(x, "b c h w -> b h w c"), cond), "b h w c -> b c h w")
