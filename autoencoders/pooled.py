"""TAEF2's autoencoder. Exports to diffusers copy this file, so it imports nothing of this project."""

from typing import Any

from diffusers import AutoencoderTiny
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

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

    def __init__(self, block: Any) -> None:
        super().__init__()
        widen, narrow = nn.Conv2d(64, 256, 1, bias=False), nn.Conv2d(256, 64, 1, bias=False)
        self.pool = nn.Sequential(widen, nn.GroupNorm(4, 256), nn.ReLU(), narrow)
        self.conv: nn.Module = block.conv
        self.skip: nn.Module = block.skip
        self.fuse: nn.Module = block.fuse

    def forward(self, x: Tensor) -> Tensor:
        """Return features [b c h w] of features [b c h w]."""
        x = x + self.pool(x)
        return self.fuse(self.conv(x) + self.skip(x))
