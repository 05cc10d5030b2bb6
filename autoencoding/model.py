"""An AutoencoderKL while it is trained, its optimizers, and what is written of it."""

import filecmp
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from autoencoders.codec import LatentCodec
from autoencoding.autoencoder_config import ArchitectureConfig, AutoencoderOptimConfig, AutoencodingConfig
from checkpoints.checkpoint import WEIGHTS, read_metadata
from machine.whole_files import beside, whole
from training.muon import Muon
from training.optimizer import Optimizers, decaying


class Coded(NamedTuple):
    """What became of a batch of images: the posterior, and what was made of a draw from it."""

    reconstruction: Float[Tensor, "b 3 H W"]
    mean: Float[Tensor, "b c h w"]
    log_variance: Float[Tensor, "b c h w"]


class Autoencoding(nn.Module):
    """An AutoencoderKL with the scale of its pixels' errors, learned or 0; with `decoder_only`, what encodes stays."""

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
        """Of a square image's latent; a size that the reduction does not divide is refused."""
        config = self.autoencoder.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        if image_size % factor:
            raise ValueError(
                f"--data.image_size {image_size}: this autoencoder reduces by {factor}, take a multiple of that"
            )
        return config.latent_channels, image_size // factor, image_size // factor

    def forward(self, images: Float[Tensor, "b 3 H W"], noise: Float[Tensor, "b c h w"]) -> Coded:
        """What comes back of `images`, which lie in [-1, 1]."""
        posterior = self.autoencoder.encode(images).latent_dist
        z = posterior.mean + posterior.std * noise
        return Coded(self.autoencoder.decode(z).sample, posterior.mean, posterior.logvar)


def autoencoder_optimizers(model: Autoencoding, config: AutoencoderOptimConfig) -> Optimizers:
    """By name: AdamW, or Muon on all matrices but the first and last layers', whose rows are colours."""
    autoencoder = model.autoencoder
    ends = {autoencoder.encoder.conv_in.weight, autoencoder.decoder.conv_out.weight}
    rest, optimizers = [parameter for parameter in model.parameters() if parameter.requires_grad], Optimizers()
    if config.muon_lr is not None:
        matrices = [parameter for parameter in rest if parameter.ndim > 1 and parameter not in ends]
        rest = [parameter for parameter in rest if parameter.ndim <= 1 or parameter in ends]
        optimizers["muon"] = Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay)
    of_adamw: dict[str, Any] = {"betas": config.betas, "weight_decay": config.weight_decay, "fused": True}
    optimizers["adamw"] = torch.optim.AdamW(decaying(rest), config.lr, **of_adamw)
    return optimizers


def encoding_parts(autoencoder: Any) -> list[nn.Module]:
    """The modules that latents depend on: a fine-tuned decoder leaves them as they are."""
    return [part for part in (autoencoder.encoder, autoencoder.quant_conv) if part is not None]


def build_autoencoder(config: AutoencodingConfig, checkpoint: Path | None = None) -> Any:
    """A fresh AutoencoderKL, or the one to start from, or as the `checkpoint` of a run says that it was: what it began
    from may have changed. Flags that do not go together are refused."""
    if stored := checkpoint and read_metadata(checkpoint / WEIGHTS).get("autoencoder"):
        from diffusers import AutoencoderKL

        as_it_was: Any = AutoencoderKL.from_config(json.loads(stored))
        return as_it_was.train()
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
    autoencoder.register_to_config(_name_or_path="")  # diffusers would publish the folder that it began from
    return autoencoder.requires_grad_(True).train()


def create_autoencoder(config: ArchitectureConfig, image_size: int) -> Any:
    """An AutoencoderKL with fresh weights; a shape that does not fit together is refused."""
    from diffusers import AutoencoderKL

    for width in config.channels:
        if width % config.norm_groups:
            flag = f"--architecture.norm_groups {config.norm_groups}"
            raise ValueError(f"{flag} must divide --architecture.channels {width}")
    num = len(config.channels)
    shape: dict[str, Any] = {"block_out_channels": tuple(config.channels)}
    shape |= {"down_block_types": ("DownEncoderBlock2D",) * num, "up_block_types": ("UpDecoderBlock2D",) * num}
    shape |= {"layers_per_block": config.layers_per_block, "latent_channels": config.latent_channels}
    shape |= {"norm_num_groups": config.norm_groups, "mid_block_add_attention": config.attention}
    autoencoder: Any = AutoencoderKL(sample_size=image_size, **shape)
    # A posterior that starts narrow: otherwise the first hundreds of steps go into escaping its noise.
    nn.init.constant_(autoencoder.quant_conv.bias[config.latent_channels :], -5.0)
    return autoencoder.train()


@torch.inference_mode()
def measure_latents(autoencoder: Any, images: UInt8[Tensor, "n 3 h w"]) -> tuple[float, float]:
    """Scale and shift that give posterior draws of these images unit variance and zero mean."""
    draw = torch.Generator().manual_seed(0)
    latents = []
    for batch in images.split(64):
        posterior = autoencoder.encode(batch.to(autoencoder.device).float() / 127.5 - 1).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=draw).to(autoencoder.device)
        latents.append(posterior.mean + posterior.std * noise)
    drawn = torch.cat(latents)
    return 1 / drawn.std().item(), drawn.mean().item()


def finish(
    folder: Path, autoencoder: Any, images: UInt8[Tensor, "n 3 h w"], metrics: dict, *, measure: bool, half: bool
) -> None:
    """Write diffusers' folder format and `metrics.json`, whole or as it was; another autoencoder there is kept beside
    it. With `measure`, scale and shift of latents are those of `images`, else the autoencoder's own."""
    if measure:
        scale, shift = measure_latents(autoencoder, images)
        per_channel = {"latents_mean": None, "latents_std": None}  # of what it began from
        autoencoder.register_to_config(scaling_factor=scale, shift_factor=shift, **per_channel)
    kept = beside(folder)
    with whole(folder) as partial:
        if half and any(not weight.half().isfinite().all() for weight in autoencoder.state_dict().values()):
            print("--half: weights beyond float16's 65504 would become infinite; they are kept in float32")
            half = False
        (autoencoder.half() if half else autoencoder).save_pretrained(partial)
        (partial / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        if folder.exists():
            folder.rename(kept)
    if kept.exists():
        names = [path.name for path in folder.iterdir() if path.name != "metrics.json"]
        if filecmp.cmpfiles(folder, kept, names, shallow=False)[0] == names:
            shutil.rmtree(folder)
            kept.rename(folder)
        else:
            print(f"{folder} was another autoencoder, which trainings on its latents need: it is now {kept}")
