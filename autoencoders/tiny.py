"""Published tiny autoencoders (TAESD and its family, Bohan 2023), distilled from those of Stable Diffusion and FLUX."""

import re
from collections.abc import Mapping
from typing import Any

from diffusers import AutoencoderTiny
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float
from torch import Tensor, nn

from autoencoders.pretrained import AutoencoderError

ENCODER_POOLED, DECODER_POOLED = range(11, 14), range(2, 5)  # indices of the layers at the lowest resolution


class PooledTinyAutoencoder(AutoencoderTiny):
    """TAEF2: diffusers' `AutoencoderTiny` whose blocks at the lowest resolution also see statistics of the image."""

    @register_to_config
    def __init__(self, latent_channels: int = 32) -> None:
        super().__init__(latent_channels=latent_channels)
        for layers, pooled in ((self.encoder.layers, ENCODER_POOLED), (self.decoder.layers, DECODER_POOLED)):
            for index in pooled:
                layers[index] = PooledBlock(layers[index])


class PooledBlock(nn.Module):
    """A block that first adds group-normalised features to its input, whose statistics are those of the whole image."""

    def __init__(self, block: Any, width: int = 64, hidden: int = 256) -> None:
        super().__init__()
        self.pool = nn.Sequential(
            nn.Conv2d(width, hidden, 1, bias=False),
            nn.GroupNorm(4, hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, width, 1, bias=False),
        )
        self.conv: nn.Module = block.conv
        self.skip: nn.Module = block.skip
        self.fuse: nn.Module = block.fuse

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        x = x + self.pool(x)
        return self.fuse(self.conv(x) + self.skip(x))


def from_published(encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor]) -> AutoencoderTiny:
    """Build the autoencoder of a published pair of files: TAESD, TAESDXL (4 latent channels), TAESD3, TAEF1 (16) or
    TAEF2 (32)."""
    # The files number the layers; the decoder's first layer, a clamp, has no weights and is not one of diffusers'.
    state_dict = {f"encoder.layers.{name}": weight.float() for name, weight in encoder.items()}
    state_dict |= {
        re.sub(r"^\d+", lambda match: f"decoder.layers.{int(match[0]) - 1}", name): weight.float()
        for name, weight in decoder.items()
    }
    encoder_last, decoder_first = encoder.get("14.weight"), decoder.get("1.weight")
    if encoder_last is None or decoder_first is None or decoder_first.dim() != 4:
        exchanged = "14.weight" in decoder and "0.weight" in decoder and "1.weight" in encoder
        hint = "they are exchanged, the encoder comes first" if exchanged else "give ENCODER DECODER as published"
        raise AutoencoderError(f"--weights: not the encoder and the decoder of a tiny autoencoder; {hint}")
    if len(encoder_last) != decoder_first.shape[1]:
        channels = f"the encoder makes {len(encoder_last)} channels and the decoder reads {decoder_first.shape[1]}"
        raise AutoencoderError(f"--weights: {channels}; take both of one version")
    pooled = any(".pool." in name for name in encoder)
    autoencoder = (PooledTinyAutoencoder if pooled else AutoencoderTiny)(latent_channels=len(encoder_last))
    try:
        autoencoder.load_state_dict(state_dict)
    except RuntimeError as error:
        first = str(error).split("\n")[1].strip()
        raise AutoencoderError(f"--weights: not the encoder and the decoder of a tiny autoencoder ({first})") from None
    return autoencoder.eval()
