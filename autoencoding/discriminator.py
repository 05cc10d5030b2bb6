"""The patch discriminator of an autoencoder's training."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

NORMS: dict[str, Callable[[nn.Conv2d], list[nn.Module]]] = {
    "group": lambda conv: [conv, nn.GroupNorm(min(32, conv.out_channels // 4), conv.out_channels)],
    "spectral": lambda conv: [spectral_norm(conv)],
}


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches, one logit each, positive for real ones (PatchGAN: Isola et al. 2017, section 3.2.2).

    `num_layers` convolutions of stride two, each twice as wide as the one before up to eight times `channels`, then two
    of stride one: with three a logit sees 70 pixels. Norms are `group`, or `spectral`: of the convolutions' weights
    (Miyato et al. 2018). No layer mixes images.
    """

    def __init__(self, *, channels: int = 64, num_layers: int = 3, norm: str = "group") -> None:
        super().__init__()
        widths = [channels * min(2**level, 8) for level in range(num_layers + 1)]
        strides = [2] * (num_layers - 1) + [1]
        layers: list[nn.Module] = [_conv(3, channels, 2), nn.LeakyReLU(0.2)]
        for narrow, wide, stride in zip(widths[:-1], widths[1:], strides, strict=True):
            layers += [*NORMS[norm](_conv(narrow, wide, stride)), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, _conv(widths[-1], 1, 1))

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h_out w_out"]:
        return self.layers(images)


def _conv(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, 4, stride, padding=1)
    nn.init.normal_(conv.weight, std=0.02)
    nn.init.zeros_(conv.bias)  # pyright: ignore[reportArgumentType]
    return conv
