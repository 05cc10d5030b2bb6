"""Conversion of autoencoders from the format of latent-diffusion's code (Rombach et al. 2022): Stable Diffusion's,
VA-VAE (Yao et al. 2025), and all others trained there with a KL term."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autoencoders.pretrained import AutoencoderError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

PARTS = re.compile(r"(?:first_stage_model\.)?((?:encoder|decoder|quant_conv|post_quant_conv)\..+)")
RENAMES = (  # regular expressions and replacements for the names of weights, in this order
    (r"\.down\.(\d+)\.", r".down_blocks.\1."),
    (r"\.(block|attn)\.(\d+)\.", lambda match: f".{'resnets' if match[1] == 'block' else 'attentions'}.{match[2]}."),
    (r"\.mid\.block_(\d)\.", lambda match: f".mid_block.resnets.{int(match[1]) - 1}."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)


def from_ldm(weights: Mapping[str, Tensor]) -> "AutoencoderKL":
    """Build diffusers' autoencoder from these weights or their EMA; widths, depth and attention follow from them."""
    from diffusers import AutoencoderKL

    weights = {  # their EMA, which training there stores under the same names without dots
        match[1]: weights.get(f"model_ema.{match[1].replace('.', '')}", weight)
        for name, weight in weights.items()
        if (match := PARTS.fullmatch(name))
    }
    try:
        autoencoder = AutoencoderKL(**infer_arguments(weights))
        num_levels = len(autoencoder.config["block_out_channels"])
        renamed = {diffusers_name(name, num_levels): weight for name, weight in weights.items()}
        state_dict = {  # attention has pointwise convolutions there, linear layers in diffusers
            name: weight.flatten(1) if ".attentions." in name and weight.dim() == 4 else weight
            for name, weight in renamed.items()
        }
        autoencoder.load_state_dict(state_dict)
    except (KeyError, ValueError, RuntimeError) as error:
        reason = (
            f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error).strip().split("\n")[-1].strip()
        )
        raise AutoencoderError(f"--weights: not an autoencoder of latent-diffusion's format ({reason})") from None
    return autoencoder.eval()


def infer_arguments(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Infer the arguments of `AutoencoderKL` from the names and shapes of weights."""

    def count(pattern: str) -> int:
        return len({match[1] for name in weights if (match := re.match(pattern, name))})

    levels, depth = count(r"encoder\.down\.(\d+)\."), count(r"encoder\.down\.0\.block\.(\d+)\.")
    latent_channels = weights["decoder.conv_in.weight"].shape[1]
    if weights["encoder.conv_out.weight"].shape[0] != 2 * latent_channels:
        raise ValueError("its encoder gives no mean and variance, as those of VQ do not")
    attends = [any(name.startswith(f"encoder.down.{level}.attn.") for name in weights) for level in range(levels)]
    return {
        "block_out_channels": [len(weights[f"encoder.down.{level}.block.0.conv2.weight"]) for level in range(levels)],
        "down_block_types": ["AttnDownEncoderBlock2D" if attention else "DownEncoderBlock2D" for attention in attends],
        "up_block_types": ["AttnUpDecoderBlock2D" if attention else "UpDecoderBlock2D" for attention in attends[::-1]],
        "layers_per_block": depth,
        "latent_channels": latent_channels,
        "use_quant_conv": "quant_conv.weight" in weights,
        "use_post_quant_conv": "post_quant_conv.weight" in weights,
    }


def diffusers_name(name: str, num_levels: int) -> str:
    """Convert the name of a weight; diffusers counts the decoder's levels from the coarsest on."""
    name = re.sub(r"\.up\.(\d+)\.", lambda match: f".up_blocks.{num_levels - 1 - int(match[1])}.", name)
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def read_statistics(saved: Mapping[str, Tensor], channels: int) -> dict[str, list[float]]:
    """Read mean and standard deviation of each latent channel, in the format that VA-VAE's authors publish."""
    mean, std = (saved.get(name, torch.empty(0)).flatten() for name in ("mean", "std"))
    if not len(mean) == len(std) == channels or not (std > 0).all():
        raise AutoencoderError(f"--weights: statistics want a mean and a positive std of each of {channels} channels")
    return {"latents_mean": mean.tolist(), "latents_std": std.tolist()}
