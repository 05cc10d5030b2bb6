"""Conversion of published weights to our backbones: arguments are inferred from shapes, and tensors are renamed."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from models import BACKBONES, create_model, model_arguments
from settings import check_name

Shapes = dict[str, tuple[int, ...]]
Weights = dict[str, Tensor]
Rules = list[tuple[str, str | Callable[[re.Match], str]]]  # arguments of re.sub, applied to each name in turn

# The number of heads does not show in the weights; in all published sizes it follows from the width.
HEADS = {384: 6, 512: 8, 768: 12, 1024: 16, 1152: 16}

CONDITIONING: Rules = [(r"^t_embedder\.", "cond.time."), (r"^y_embedder\.embedding_table\.", "cond.label.")]
DIT: Rules = [
    *CONDITIONING,
    (r"^x_embedder\.proj\.", "patch."),
    (r"\.attn\.", ".attention."),
    (r"^final_layer\.", "final."),
    (r"\.adaLN_modulation\.1\.", ".modulation."),
    (r"\.mlp\.w12\.", ".mlp.fc1."),  # LightningDiT's
    (r"\.mlp\.w3\.", ".mlp.fc2."),
]
UVIT: Rules = [
    (r"^pos_embed$", "positions"),
    (r"^label_emb\.", "label."),
    (r"^patch_embed\.proj\.", "patch."),
    (r"^out_blocks\.(\d+)\.skip_linear\.", r"joins.\1."),
    (r"^in_blocks\.", "encoder."),
    (r"^mid_block\.", "middle."),
    (r"^out_blocks\.", "decoder."),
    (r"\.attn\.", ".attention."),
    (r"^decoder_pred\.", "head."),
    (r"^final_layer\.", "smooth."),
]
XSWIN: Rules = [  # to be applied after `_stages_of_xswin`
    *CONDITIONING,
    (r"adaLN_modulation\.1\.", "linear."),
    (r"^(un)?patching\.\w+\.[01]\.", r"\1patch."),
    (r"^(un)?patching\.\w+\.2\.", r"\1patch_norm."),
    (r"^(un)?patching\.mod\.", r"\1patch_modulator."),
    (r"^head\.mod\.", "head_modulator."),
    (r"^head\.pointwise\.", "head."),
    (r"^middle\.sequential\.", "middle."),
    (r"^(decoder\.\d+)\.pointwise\.", r"\1.halve."),
    (r"\.mod_r\.", ".modulator_skip."),
    (r"\.mod(1|2|_x|)\.", r".modulator\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"(blocks\.\d+|wide|middle\.\d+)\.mlp\.0\.", r"\1.mlp.fc1."),
    (r"(blocks\.\d+|wide|middle\.\d+)\.mlp\.3\.", r"\1.mlp.fc2."),
    (r"\.attn\.cpb_mlp\.", ".attention.position_bias.mlp."),
    (r"\.attn\.", ".attention."),
    (r"\.self_attention\.in_proj_", ".attention.qkv."),
    (r"\.self_attention\.out_proj\.", ".attention.proj."),
    (r"\.cross_attention\.in_proj_", ".attention.attention.in_proj."),
    (r"\.cross_attention\.out_proj\.", ".attention.attention.proj."),
]
DERIVED = re.compile(r"pos_embed|feat_rope\..*|.*\.relative_(position_index|coords_table)")  # our models compute these


def load_reference(source: str, weights: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> nn.Module:
    """Create our backbone with published weights, in eval mode. Raises ValueError listing keys that do not fit."""
    check_name("--source", source, SOURCES)
    _, convert = SOURCES[source]
    model = create_model(**arguments)
    converted = convert(dict(weights), arguments)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in converted.items()}
    if expected != shapes:
        missing, unknown = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
        reshaped = sorted(name for name in expected.keys() & shapes.keys() if expected[name] != shapes[name])
        raise ValueError(f"weights do not fit: missing {missing}, unknown {unknown}, of another shape {reshaped}")
    model.load_state_dict(converted)
    return model.eval()


def infer_arguments(source: str, weights: Mapping[str, Tensor], num_heads: int | None = None) -> dict[str, Any]:
    """Infer the arguments of `create_model`, `name` included, from published weights. Raises ValueError for an unknown
    source, and where `num_heads` is needed: for a width that is no published one."""
    check_name("--source", source, SOURCES)
    read, _ = SOURCES[source]
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    try:
        return read(shapes, num_heads)
    except KeyError as error:
        first = ", ".join(list(shapes)[:3])
        raise ValueError(f"--source {source}: the weights have no {error}; they begin with {first}") from None


def find_named_backbone(name: str, arguments: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Find the named backbone (such as `DiT-XL/2`) that equals a family with these arguments. Returns its name and no
    arguments, or the name and arguments as given where there is none."""

    def all_arguments(name: str, **overrides: Any) -> dict[str, Any]:
        arguments = {**model_arguments(name), **overrides}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in arguments.items()}

    target = all_arguments(name, **arguments)
    for row, (family, _) in BACKBONES.items():
        if family == BACKBONES[name][0] and all_arguments(row) == target:
            return row, {}
    return name, arguments


def _read_dit(shapes: Shapes, num_heads: int | None) -> dict[str, Any]:
    dim, channels, patch_size, _ = shapes["x_embedder.proj.weight"]
    return {
        "name": "DiT",
        "input_size": patch_size * math.isqrt(shapes["pos_embed"][1]),
        "in_channels": channels,
        "out_channels": shapes["final_layer.linear.weight"][0] // patch_size**2,
        "num_classes": shapes["y_embedder.embedding_table.weight"][0] - 1,
        "dim": dim,
        "depth": _num_modules(shapes, r"blocks\.(\d+)\."),
        "num_heads": _num_heads(dim, num_heads),
        "patch_size": patch_size,
        "mlp_ratio": shapes["blocks.0.mlp.fc1.weight"][0] / dim,
    }


def _read_sit(shapes: Shapes, num_heads: int | None) -> dict[str, Any]:
    arguments = _read_dit(shapes, num_heads)
    return {**arguments, "out_channels": arguments["in_channels"]}


def _read_lightningdit(shapes: Shapes, num_heads: int | None) -> dict[str, Any]:
    """Infer arguments of LightningDiT's published configuration, with or without QK-norm."""
    (_, head_dim), (dim, width) = shapes["feat_rope.freqs_cos"], shapes["blocks.0.mlp.w3.weight"]
    mlp = {"blocks.0.mlp.fc1.weight": (3 * width // 2, dim)}  # of an ungated MLP with as many parameters
    arguments = _read_sit({**shapes, **mlp}, dim // head_dim)
    return {
        **arguments,
        "mlp_ratio": round(arguments["mlp_ratio"], 2),
        "qk_norm": "blocks.0.attn.q_norm.weight" in shapes,
        "norm": "rms",
        "mlp": "swiglu",
        "positions": "both",
    }


def _read_uvit(shapes: Shapes, num_heads: int | None) -> dict[str, Any]:
    dim, channels, patch_size, _ = shapes["patch_embed.proj.weight"]
    num_labels = shapes.get("label_emb.weight", (0,))[0]  # including the null label
    num_extra_tokens = 2 if num_labels else 1  # time, and label
    return {
        "name": "U-ViT",
        "input_size": patch_size * math.isqrt(shapes["pos_embed"][1] - num_extra_tokens),
        "in_channels": channels,
        "out_channels": channels,
        "num_classes": max(0, num_labels - 1),
        "dim": dim,
        "depth": 2 * _num_modules(shapes, r"in_blocks\.(\d+)\.") + 1,
        "num_heads": _num_heads(dim, num_heads),
        "patch_size": patch_size,
        "mlp_ratio": shapes["mid_block.mlp.fc1.weight"][0] / dim,
    }


def _read_xswin(shapes: Shapes, num_heads: int | None) -> dict[str, Any]:
    dim, _, *patch = shapes["patching.patching.0.weight"]
    stages = [f"encoder.{number}.sequential" for number in range(0, _num_modules(shapes, r"encoder\.(\d+)\."), 2)]
    window = [(side + 1) // 2 for side in shapes[f"{stages[0]}.0.attn.relative_coords_table"][1:3]]
    for name, sides in (("window_size", window), ("patch_size", patch)):
        if len(set(sides)) != 1:
            raise ValueError(f"{name}={sides}: ours are square")
    final_downsample = f"encoder.{2 * len(stages) - 1}.reduction.weight" in shapes
    reduction = 2 ** (len(stages) - 1 + final_downsample)
    side = patch[0] * reduction * math.isqrt(shapes["pos_embed"][1])
    return {
        "name": "XSwin",
        "input_size": side,
        "in_channels": shapes["smooth_conv_in.layers.1.weight"][1],
        "out_channels": shapes["head.pointwise.weight"][0],
        "num_classes": shapes["y_embedder.embedding_table.weight"][0] - 1,
        "dim": dim,
        "depths": [_num_modules(shapes, rf"{re.escape(stage)}\.(\d+)\.") for stage in stages],
        "num_heads": [shapes[f"{stage}.0.attn.logit_scale"][0] for stage in stages],
        "window_size": window[0],
        "patch_size": patch[0],
        "num_global_blocks": _num_modules(shapes, r"middle\.sequential\.(\d+)\."),
        "skip": "cross_attention" if any(".cross_attention." in name for name in shapes) else "concat",
        "final_downsample": final_downsample,
    }


def _num_modules(shapes: Shapes, pattern: str) -> int:
    """Count modules: one more than the largest index that a pattern finds at the start of names."""
    return max((int(match[1]) for name in shapes if (match := re.match(pattern, name))), default=-1) + 1


def _num_heads(dim: int, num_heads: int | None) -> int:
    """Number of heads: as given, or that of the published model of this width."""
    heads = num_heads or HEADS.get(dim)
    if heads is None:
        raise ValueError(f"--num_heads: the weights do not say it, and width {dim} is no published size; give it")
    return heads


def _convert_dit(weights: Weights, arguments: Mapping[str, Any]) -> Weights:
    depth = arguments["depth"]
    first_join = depth - (depth - 1) // 2
    joins = (r"^blocks\.(\d+)\.skip_linear\.", lambda match: f"joins.{int(match[1]) - first_join}.")
    return _flatten_patch(_rename(_without_derived(weights), [joins, *DIT]))


def _convert_sit(weights: Weights, arguments: Mapping[str, Any]) -> Weights:
    """Convert SiT: negate its output, as its velocity points from noise to data, and drop the unused half of it."""
    weights = _convert_dit(weights, arguments)
    patch = {"p": arguments["patch_size"], "q": arguments["patch_size"]}
    for name in ("final.linear.weight", "final.linear.bias"):
        rows = rearrange(weights[name], "(p q c) ... -> p q c ...", **patch)[:, :, : arguments["in_channels"]]
        weights[name] = -rearrange(rows, "p q c ... -> (p q c) ...")
    return weights


def _convert_lightningdit(weights: Weights, arguments: Mapping[str, Any]) -> Weights:
    """Convert LightningDiT, which differs from ours in two ways.

    - Its norms have weights, which are folded into the modulation after them: `s (1 + scale) = 1 + (s scale + s - 1)`.
    - Its rotary embedding rotates neighbouring channels of a head; ours rotates channels half a head apart.
    """
    weights = _convert_sit(weights, arguments)
    norms = [("final", "norm_final", 1)]  # module, name of the norm, index of its scale among the modulation's vectors
    norms += [(f"blocks.{n}", *norm) for n in range(arguments["depth"]) for norm in (("norm1", 1), ("norm2", 4))]
    for module, norm, index in norms:
        scale = weights.pop(f"{module}.{norm}.weight")
        rows = slice(index * len(scale), (index + 1) * len(scale))
        weight, bias = (weights[f"{module}.modulation.{kind}"].clone() for kind in ("weight", "bias"))
        weight[rows], bias[rows] = scale[:, None] * weight[rows], scale * bias[rows] + scale - 1
        weights |= {f"{module}.modulation.weight": weight, f"{module}.modulation.bias": bias}

    def half_apart(rows: Tensor, num_heads: int) -> Tensor:
        return rearrange(rows, "(k hw f pair) ... -> (k pair hw f) ...", k=num_heads, hw=2, pair=2)

    for name in [name for name in weights if ".attention.qkv." in name]:
        q, k, v = weights[name].chunk(3)
        weights[name] = torch.cat([half_apart(q, arguments["num_heads"]), half_apart(k, arguments["num_heads"]), v])
    for name in [name for name in weights if name.endswith(("q_norm.weight", "k_norm.weight"))]:
        weights[name] = half_apart(weights[name], 1)
    return weights


def _convert_uvit(weights: Weights, arguments: Mapping[str, Any]) -> Weights:
    weights = _flatten_patch(_rename(weights, UVIT))
    weights["positions"] = weights["positions"][0]
    if "smooth.weight" not in weights:  # U-ViT-H has no last convolution, so ours becomes the identity
        channels = arguments["in_channels"]
        weights["smooth.weight"] = nn.init.dirac_(torch.empty(channels, channels, 3, 3))
        weights["smooth.bias"] = torch.zeros(channels)
    return weights


def _convert_xswin(weights: Weights, arguments: Mapping[str, Any]) -> Weights:
    weights = _rename(_without_derived(weights), [*_stages_of_xswin(arguments), *XSWIN])
    for name in [name for name in weights if name.endswith("attention.qkv.bias") and "middle" not in name]:
        q_bias, _, v_bias = weights.pop(name).chunk(3)
        weights |= {name.replace("qkv.bias", "q_bias"): q_bias, name.replace("qkv.bias", "v_bias"): v_bias}
    for name in [name for name in weights if ".in_proj." in name]:
        q, k, v = weights.pop(name).chunk(3)
        weights |= {name.replace("in_proj", "q"): q, name.replace("in_proj", "kv"): torch.cat([k, v])}
    return weights


def _stages_of_xswin(arguments: Mapping[str, Any]) -> Rules:
    """Rules that rename the published stems, encoder and decoder, which are flat lists of modules, to our stages."""
    decoder: list[str] = []  # our prefix of each module in the published list
    for stage in range(len(arguments["depths"])):
        decoder += [f"expands.{stage}."] * (stage > 0 or arguments["final_downsample"])
        decoder += [f"decoder.{stage}.skip."] * (arguments["skip"] == "cross_attention")
        decoder += [f"decoder.{stage}."]

    def in_stem(match: re.Match) -> str:
        part = ("modulators", "convs", "norms", "activations")[int(match[2]) % 4]
        return f"stem_{match[1]}.{part}.{int(match[2]) // 4}."

    def in_encoder(match: re.Match) -> str:
        stage = int(match[1]) // 2
        return f"encoder.{stage}.blocks." if match[2] else f"merges.{stage}."

    def in_decoder(match: re.Match) -> str:
        index, block = int(match[1]), int(match[2] or 1)
        prefix = decoder[index] if index < len(decoder) else match[0]
        return prefix + ("wide." if block == 0 else "" if block == 1 else f"blocks.{block - 2}.")

    return [
        (r"^smooth_conv_(in|out)\.layers\.(\d+)\.", in_stem),
        (r"^encoder\.(\d+)\.(sequential\.)?", in_encoder),
        (r"^decoder\.(\d+)\.(?:sequential\.(\d+)\.)?", in_decoder),
    ]


def _rename(weights: Weights, rules: Rules) -> Weights:
    renamed = {}
    for name, tensor in weights.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def _without_derived(weights: Weights) -> Weights:
    return {name: tensor for name, tensor in weights.items() if not DERIVED.fullmatch(name)}


def _flatten_patch(weights: Weights) -> Weights:
    """Turn the patch convolution into the equal linear layer over flattened patches."""
    return {**weights, "patch.weight": rearrange(weights["patch.weight"], "d c p q -> d (c p q)")}


SOURCES = {
    "dit": (_read_dit, _convert_dit),
    "sit": (_read_sit, _convert_sit),
    "repa": (_read_sit, _convert_dit),  # SiT's backbone, but its velocity points from data to noise, as ours
    "lightningdit": (_read_lightningdit, _convert_lightningdit),
    "uvit-adaln": (lambda *weights: {**_read_dit(*weights), "name": "UViT"}, _convert_dit),
    "uvit": (_read_uvit, _convert_uvit),
    "uswin": (_read_xswin, _convert_xswin),
    "xswin": (_read_xswin, _convert_xswin),
}
