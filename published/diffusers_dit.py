"""A DiT of ours as diffusers' own, so that any of its tools can read the weights."""

import copy
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from models.dit import DiT

NULL_LABEL = 1000  # diffusers' DiTPipeline knows no other


def to_diffusers(model: nn.Module) -> Any:
    """A `DiTTransformer2DModel` with the model's weights; its null label is 1000, whatever the number of classes.

    diffusers spaces the frequencies of its time embedding by 10000^(1/127), DiT and ours by 10000^(1/128): outputs
    agree once `time_proj.downscale_freq_shift` of every block's `norm1.emb` is 0.

    Raises:
        ValueError: for another backbone, long skips, no classes or more than 1000, or a latent that is not square.
    """
    from diffusers import DiTTransformer2DModel

    if not isinstance(model, DiT) or len(model.joins):
        raise ValueError(f"--native: diffusers has no {type(model).__name__} with long skips or windows; leave it out")
    if not 0 < model.num_classes <= NULL_LABEL or len(set(model.input_size)) > 1:
        raise ValueError(
            f"--native: diffusers' DiT has 1 to 1000 classes and a square latent, this model {model.num_classes} and "
            f"{model.input_size[0]}x{model.input_size[1]}; leave --native out"
        )
    first: Any = model.blocks[0]
    dim, num_heads = model.patch.out_features, first.attention.num_heads
    if first.mlp.fc1.out_features != 4 * dim:
        raise ValueError("--native: diffusers' DiT has an mlp_ratio of 4; leave --native out")
    theirs = DiTTransformer2DModel(
        num_attention_heads=num_heads,
        attention_head_dim=dim // num_heads,
        in_channels=model.in_channels,
        out_channels=model.out_channels,
        num_layers=len(model.blocks),
        sample_size=model.input_size[0],
        patch_size=model.patch_size,
        num_embeds_ada_norm=NULL_LABEL,
        norm_eps=1e-6,
    )
    weights = _weights(model)
    theirs.load_state_dict({name: tensor.contiguous() for name, tensor in weights.items()})
    return theirs.eval()


def without_shift(autoencoder: Any) -> Any:
    """A copy whose latents are centred by its own layers, as DiTPipeline takes no notice of `shift_factor`.

    Raises:
        ValueError: where the layers that can take the shift in are missing, or channels have scales of their own.
    """
    if type(autoencoder).__name__ != "AutoencoderKL" or autoencoder.config.get("latents_std") is not None:
        raise ValueError("--native: DiTPipeline wants an AutoencoderKL of one scale for all channels; leave it out")
    shift = autoencoder.config.shift_factor
    if not shift:
        return autoencoder
    if autoencoder.quant_conv is None or autoencoder.post_quant_conv is None:
        raise ValueError("--native: DiTPipeline cannot shift latents, and this autoencoder needs it; leave it out")
    centred = copy.deepcopy(autoencoder)
    channels = centred.config.latent_channels
    with torch.no_grad():
        centred.quant_conv.bias[:channels] -= shift
        centred.post_quant_conv.bias += shift * centred.post_quant_conv.weight.sum(dim=(1, 2, 3))
    centred.register_to_config(shift_factor=None)
    return centred


def _weights(model: DiT) -> dict[str, Tensor]:
    ours = model.state_dict()
    side = model.patch_size
    weights = {
        "pos_embed.proj.weight": rearrange(ours["patch.weight"], "d (c p q) -> d c p q", p=side, q=side),
        "pos_embed.proj.bias": ours["patch.bias"],
    }
    table = torch.zeros(NULL_LABEL + 1, ours["cond.label.weight"].shape[1])
    table[: model.num_classes] = ours["cond.label.weight"][:-1]
    table[NULL_LABEL] = ours["cond.label.weight"][-1]
    linears = {"proj_out_1": "final.modulation", "proj_out_2": "final.linear"}
    for number in range(len(model.blocks)):
        source, target = f"blocks.{number}", f"transformer_blocks.{number}"
        embedding = f"{target}.norm1.emb"
        weights[f"{embedding}.class_embedder.embedding_table.weight"] = table
        linears |= {
            f"{embedding}.timestep_embedder.linear_1": "cond.time.mlp.0",
            f"{embedding}.timestep_embedder.linear_2": "cond.time.mlp.2",
            f"{target}.norm1.linear": f"{source}.modulation",
            f"{target}.attn1.to_out.0": f"{source}.attention.proj",
            f"{target}.ff.net.0.proj": f"{source}.mlp.fc1",
            f"{target}.ff.net.2": f"{source}.mlp.fc2",
        }
        for kind in ("weight", "bias"):
            parts = ours[f"{source}.attention.qkv.{kind}"].chunk(3)
            weights |= {f"{target}.attn1.to_{x}.{kind}": part for x, part in zip("qkv", parts, strict=True)}
    for target, source in linears.items():
        weights |= {f"{target}.{kind}": ours[f"{source}.{kind}"] for kind in ("weight", "bias")}
    return weights
