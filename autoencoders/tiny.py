"""Published tiny autoencoders (TAESD and its family, Bohan 2023), distilled from those of Stable Diffusion and FLUX."""

import re
from collections.abc import Mapping

from torch import Tensor

from autoencoders.pooled import AutoencoderTiny, PooledTinyAutoencoder
from autoencoders.pretrained import AutoencoderError


def from_published(encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor]) -> AutoencoderTiny:
    """Build the autoencoder of a published pair of files: TAESD(XL) (4 channels), TAESD3, TAEF1 (16) or TAEF2 (32)."""
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
