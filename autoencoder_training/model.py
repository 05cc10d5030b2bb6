"""The AutoencoderKL in training: its module, construction, optimizers and export."""

import filecmp
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from autoencoder_training.autoencoder_config import ArchitectureConfig, AutoencoderOptimConfig, AutoencodingConfig
from autoencoders.codec import LatentCodec
from autoencoders.pretrained import sample_latents
from checkpoints.checkpoint import WEIGHTS, read_metadata
from machine.atomic_files import atomic_path, unused_path
from training.muon import Muon
from training.optimizer import Optimizers, split_weight_decay


class AutoencoderOutput(NamedTuple):
    """Output of the autoencoder: the posterior of a batch of images, and the decoded posterior samples."""

    reconstruction: Float[Tensor, "b 3 H W"]
    mean: Float[Tensor, "b c h w"]
    log_variance: Float[Tensor, "b c h w"]


class Autoencoding(nn.Module):
    """AutoencoderKL with the log-scale of its pixel errors, learned or 0. `decoder_only` freezes the encoder."""

    log_scale: Tensor

    def __init__(self, autoencoder: Any, *, learned_variance: bool, decoder_only: bool = False) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        if learned_variance:
            self.log_scale = nn.Parameter(torch.zeros(()))
        else:
            self.register_buffer("log_scale", torch.zeros(()))
        if decoder_only:
            for part in encoding_parts(autoencoder):
                part.requires_grad_(False)

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """Shape of a square image's latent. Raises ValueError for a size that the reduction factor does not divide."""
        config = self.autoencoder.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        if image_size % factor:
            raise ValueError(
                f"--data.image_size {image_size}: this autoencoder reduces by {factor}, take a multiple of that"
            )
        return config.latent_channels, image_size // factor, image_size // factor

    def forward(self, images: Float[Tensor, "b 3 H W"], noise: Float[Tensor, "b c h w"]) -> AutoencoderOutput:
        """Encode images in [-1, 1], sample the posterior with the given noise, and decode."""
        posterior = self.autoencoder.encode(images).latent_dist
        z = posterior.mean + posterior.std * noise
        return AutoencoderOutput(self.autoencoder.decode(z).sample, posterior.mean, posterior.logvar)


def autoencoder_optimizers(model: Autoencoding, config: AutoencoderOptimConfig) -> Optimizers:
    """Build AdamW, and with `muon_lr` Muon for the matrices but the first and last, whose rows are colours."""
    autoencoder = model.autoencoder
    first_and_last = {autoencoder.encoder.conv_in.weight, autoencoder.decoder.conv_out.weight}
    parameters, optimizers = [parameter for parameter in model.parameters() if parameter.requires_grad], Optimizers()
    if config.muon_lr is not None:
        matrices = [parameter for parameter in parameters if parameter.ndim > 1 and parameter not in first_and_last]
        parameters = [parameter for parameter in parameters if parameter.ndim <= 1 or parameter in first_and_last]
        optimizers["muon"] = Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay)
    options: dict[str, Any] = {"betas": config.betas, "weight_decay": config.weight_decay, "fused": True}
    optimizers["adamw"] = torch.optim.AdamW(split_weight_decay(parameters), config.lr, **options)
    return optimizers


def encoding_parts(autoencoder: Any) -> list[nn.Module]:
    """Return the modules that latents depend on, which fine-tuning only the decoder must not change."""
    return [part for part in (autoencoder.encoder, autoencoder.quant_conv) if part is not None]


def build_autoencoder(config: AutoencodingConfig, checkpoint: Path | None = None) -> Any:
    """Build the AutoencoderKL of a training: a new one, or the one that `init_from` names.

    Given a `checkpoint` of the run, its architecture is that of the checkpoint, as `init_from` may have changed since.
    Raises ValueError for flags that do not go together.
    """
    if stored := checkpoint and read_metadata(checkpoint / WEIGHTS).get("autoencoder"):
        from diffusers import AutoencoderKL

        resumed: Any = AutoencoderKL.from_config(json.loads(stored))
        return resumed.train()
    if config.init_from is None:
        if config.decoder_only:
            raise ValueError("--decoder_only: there is no encoder to leave as it is; give --init_from")
        return create_autoencoder(config.architecture, config.data.image_size)
    autoencoder = LatentCodec(config.init_from).autoencoder
    if type(autoencoder).__name__ != "AutoencoderKL":
        raise ValueError(f"--init_from {config.init_from}: not an AutoencoderKL, it has no posterior to train")
    weights = [weight for part in encoding_parts(autoencoder) for weight in part.state_dict().values()]
    if config.decoder_only and config.half and any(not torch.equal(w.half().float(), w) for w in weights):
        raise ValueError("--half: rounding the encoder would change its latents, which --decoder_only promises not to")
    autoencoder.register_to_config(_name_or_path="")  # otherwise diffusers writes the path of init_from to config.json
    return autoencoder.requires_grad_(True).train()


def create_autoencoder(config: ArchitectureConfig, image_size: int) -> Any:
    """Create an AutoencoderKL with new weights. Raises ValueError for widths that the norm groups do not divide."""
    from diffusers import AutoencoderKL

    for width in config.channels:
        if width % config.norm_groups:
            flag = f"--architecture.norm_groups {config.norm_groups}"
            raise ValueError(f"{flag} must divide --architecture.channels {width}")
    num_levels = len(config.channels)
    arguments: dict[str, Any] = {
        "sample_size": image_size,
        "block_out_channels": tuple(config.channels),
        "down_block_types": ("DownEncoderBlock2D",) * num_levels,
        "up_block_types": ("UpDecoderBlock2D",) * num_levels,
        "layers_per_block": config.layers_per_block,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_groups,
        "mid_block_add_attention": config.attention,
    }
    autoencoder: Any = AutoencoderKL(**arguments)
    # Start with a narrow posterior: otherwise the first hundreds of steps go into overcoming its noise.
    nn.init.constant_(autoencoder.quant_conv.bias[config.latent_channels :], -5.0)
    return autoencoder.train()


def measure_latents(autoencoder: Any, images: UInt8[Tensor, "n 3 h w"]) -> tuple[float, float]:
    """Return the scale and shift that give posterior samples of these images unit variance and zero mean."""
    std, mean = torch.std_mean(sample_latents(autoencoder, images.float() / 127.5 - 1))
    return 1 / std.item(), mean.item()


def export_autoencoder(
    folder: Path, autoencoder: Any, images: UInt8[Tensor, "n 3 h w"], metrics: dict, *, measure: bool, half: bool
) -> None:
    """Write the autoencoder in diffusers' folder format, with `metrics.json`, replacing the folder atomically.

    A different autoencoder that was in the folder is moved to a new folder beside it. With `measure`, the scale and
    shift of latents are measured on `images`; otherwise they stay the autoencoder's own.
    """
    if measure:
        scale, shift = measure_latents(autoencoder, images)
        per_channel = {"latents_mean": None, "latents_std": None}  # statistics of init_from no longer hold
        autoencoder.register_to_config(scaling_factor=scale, shift_factor=shift, **per_channel)
    previous = unused_path(folder)
    with atomic_path(folder) as partial:
        if half and any(not weight.half().isfinite().all() for weight in autoencoder.state_dict().values()):
            print("--half: weights beyond float16's 65504 would become infinite; they are kept in float32")
            half = False
        (autoencoder.half() if half else autoencoder).save_pretrained(partial)
        (partial / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        if folder.exists():
            folder.rename(previous)
    if previous.exists():
        names = [path.name for path in folder.iterdir() if path.name != "metrics.json"]
        if filecmp.cmpfiles(folder, previous, names, shallow=False)[0] == names:
            shutil.rmtree(folder)
            previous.rename(folder)
        else:
            print(f"{folder} was another autoencoder, which trainings on its latents need: it is now {previous}")
