"""Export of a DiT as diffusers' `DiTTransformer2DModel` in a `DiTPipeline`, which diffusers' tools can load."""

import copy
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from models.dit import DiT, DiTBlock
from models.layers.style import BlockStyle

NULL_LABEL = 1000  # hard-coded in diffusers' DiTPipeline


def write_native(folder: Path, checkpoint: Any, sampling: Any, scheduler: Any, vae: Any) -> dict[str, Any]:
    """Write the parts of a `DiTPipeline`, return its index; raise ValueError naming what it cannot reproduce."""
    kind, times = checkpoint.config.diffusion.kind, checkpoint.build_diffusion().path.model_times
    chain = f"DiTPipeline cannot walk {kind}, {sampling.sampler}, {sampling.spacing};"
    walks = kind == "gaussian" and sampling.sampler != "ddpm" and sampling.spacing == "trailing"
    _refuse(not walks, f"{chain} add --sampler ddim --spacing trailing, or")
    unguided = "DiTPipeline guides by 4 unless told else, away from a null label that this model was not trained on;"
    _refuse(not checkpoint.num_guided, unguided)
    guided = sampling.legacy_cfg_channels
    all_channels = f"DiTPipeline guides all channels, not {guided}; add --legacy_cfg_channels null, or"
    _refuse(guided is not None, all_channels)
    _refuse(vae is None, "DiTPipeline needs an autoencoder, and this model denoises pixels;")
    _refuse(times is not None, "DiTPipeline tells a model its times from 0 to 999;")
    transformer, vae = to_diffusers(checkpoint.load_model()), without_shift(vae)
    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    scheduler.register_to_config(timestep_spacing="trailing")
    return {
        "_class_name": "DiTPipeline",
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "id2label": {str(label): name for label, name in enumerate(native_names(checkpoint.classes))},
    }


def native_names(classes: list[str]) -> list[str]:
    """Make class names that DiTPipeline accepts: it splits at commas, and needs names to be unique."""
    names = [" ".join(name.replace(",", ";").split()) for name in classes]
    return [name if names.count(name) == 1 else f"{name} ({label})" for label, name in enumerate(names)]


def to_diffusers(model: nn.Module) -> Any:
    """Convert a DiT to a `DiTTransformer2DModel` whose null label is 1000. Raises ValueError saying why it cannot be.

    Outputs differ slightly: the frequencies of diffusers' time embedding are spaced by 10000^(1/127), those of DiT and
    ours by 10000^(1/128). They agree once `time_proj.downscale_freq_shift` of every block's `norm1.emb` is 0.
    """
    from diffusers import DiTTransformer2DModel

    if not isinstance(model, DiT) or len(model.joins):
        raise ValueError(f"--native: diffusers has no {type(model).__name__} with long skips or windows; leave it out")
    height, width = model.input_size
    shape = f"this model {model.num_classes} and {height}x{width};"
    fits = 0 < model.num_classes <= NULL_LABEL and height == width
    _refuse(not fits, f"diffusers' DiT has 1 to 1000 classes and a square latent, {shape}")
    first: Any = model.blocks[0]
    dim, num_heads = model.patch.out_features, first.attention.num_heads
    published = DiTBlock(dim, num_heads, BlockStyle())
    types, expected = ([type(module) for module in block.modules()] for block in (first, published))
    _refuse(types != expected, "diffusers' DiT has the published blocks, without qk_norm, other norms, mlp, ...;")
    _refuse(first.mlp.fc1.out_features != 4 * dim, "diffusers' DiT has an mlp_ratio of 4;")
    sizes: dict[str, Any] = {"num_attention_heads": num_heads, "attention_head_dim": dim // num_heads}
    sizes |= {"in_channels": model.in_channels, "out_channels": model.out_channels, "num_layers": len(model.blocks)}
    sizes |= {"sample_size": height, "patch_size": model.patch_size, "num_embeds_ada_norm": NULL_LABEL}
    transformer = DiTTransformer2DModel(**sizes, norm_eps=1e-6)
    transformer.load_state_dict({name: tensor.contiguous() for name, tensor in _convert(model).items()})
    return transformer.eval()


def without_shift(autoencoder: Any) -> Any:
    """Fold an autoencoder's `shift_factor`, which DiTPipeline ignores, into the convolutions around its latents.

    Returns a copy, or the autoencoder itself if it has no shift. Raises ValueError where it has no such convolutions.
    """
    has_one_scale = type(autoencoder).__name__ == "AutoencoderKL" and autoencoder.config.get("latents_std") is None
    _refuse(not has_one_scale, "DiTPipeline wants an AutoencoderKL of one scale for all channels;")
    shift = autoencoder.config.shift_factor
    if not shift:
        return autoencoder
    has_no_convs = autoencoder.quant_conv is None or autoencoder.post_quant_conv is None
    _refuse(has_no_convs, "DiTPipeline cannot shift latents, and this autoencoder needs it;")
    centred = copy.deepcopy(autoencoder)
    with torch.no_grad():
        centred.quant_conv.bias[: centred.config.latent_channels] -= shift
        centred.post_quant_conv.bias += shift * centred.post_quant_conv.weight.sum(dim=(1, 2, 3))
    centred.register_to_config(shift_factor=None)
    return centred


def _refuse(condition: bool, reason: str) -> None:
    """Raise ValueError with a reason where a condition holds."""
    if condition:
        raise ValueError(f"--native: {reason} leave --native out")


def _convert(model: DiT) -> dict[str, Tensor]:
    """State dict of the `DiTTransformer2DModel` that equals a DiT."""
    state_dict, side = model.state_dict(), model.patch_size
    labels = state_dict["cond.label.weight"]
    label_table = torch.zeros(NULL_LABEL + 1, labels.shape[1])
    label_table[: model.num_classes], label_table[NULL_LABEL] = labels[:-1], labels[-1]
    weights = {
        "pos_embed.proj.weight": rearrange(state_dict["patch.weight"], "d (c p q) -> d c p q", p=side, q=side),
        "pos_embed.proj.bias": state_dict["patch.bias"],
    }
    linears = {"proj_out_1": "final.modulation", "proj_out_2": "final.linear"}
    for number in range(len(model.blocks)):
        source, target = f"blocks.{number}", f"transformer_blocks.{number}"
        embedding = f"{target}.norm1.emb"
        weights[f"{embedding}.class_embedder.embedding_table.weight"] = label_table
        linears |= {
            f"{embedding}.timestep_embedder.linear_1": "cond.time.mlp.0",
            f"{embedding}.timestep_embedder.linear_2": "cond.time.mlp.2",
            f"{target}.norm1.linear": f"{source}.modulation",
            f"{target}.attn1.to_out.0": f"{source}.attention.proj",
            f"{target}.ff.net.0.proj": f"{source}.mlp.fc1",
            f"{target}.ff.net.2": f"{source}.mlp.fc2",
        }
        for kind in ("weight", "bias"):
            parts = state_dict[f"{source}.attention.qkv.{kind}"].chunk(3)
            weights |= {f"{target}.attn1.to_{x}.{kind}": part for x, part in zip("qkv", parts, strict=True)}
    for target, source in linears.items():
        weights |= {f"{target}.{kind}": state_dict[f"{source}.{kind}"] for kind in ("weight", "bias")}
    return weights
