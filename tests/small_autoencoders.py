"""Small random-weight autoencoders in the formats of published ones: their layout, channels and scales."""

import torch
from diffusers import AutoencoderKL, AutoencoderTiny

SMALL_KL = {
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 4,
    "sample_size": 32,
}
SMALL_TINY = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
NO_QUANT = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
MEAN, STD = [-1.6574, 1.886, -1.383, 2.5155], [8.4927, 5.9022, 6.5498, 5.2299]
FORMATS = {
    "sd": (AutoencoderKL, {**SMALL_KL, "latent_channels": 4, "scaling_factor": 0.18215}),
    "sdxl": (AutoencoderKL, {**SMALL_KL, "latent_channels": 4, "scaling_factor": 0.13025}),
    "sd3": (AutoencoderKL, {**SMALL_KL, **NO_QUANT, "scaling_factor": 1.5305, "shift_factor": 0.0609}),
    "flux": (AutoencoderKL, {**SMALL_KL, **NO_QUANT, "scaling_factor": 0.3611, "shift_factor": 0.1159}),
    "playground": (
        AutoencoderKL,
        {**SMALL_KL, "latent_channels": 4, "scaling_factor": 0.5, "latents_mean": MEAN, "latents_std": STD},
    ),
    "taesd": (AutoencoderTiny, {**SMALL_TINY, "latent_channels": 4}),
    "taef1": (AutoencoderTiny, {**SMALL_TINY, "latent_channels": 16}),
}


def create(name, seed=0, **changes):
    """Create an autoencoder of a format, with random weights from a seed; `changes` override its configuration."""
    kind, settings = FORMATS[name]
    torch.manual_seed(seed)
    return kind(**{**settings, **changes}).eval()


def write(name, folder, seed=0, **changes):
    """Write an autoencoder of a format as a folder in diffusers' layout; returns its path."""
    create(name, seed, **changes).save_pretrained(folder)
    return str(folder)
