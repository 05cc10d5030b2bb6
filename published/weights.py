"""Weights of the published implementations into our backbones: renamed, not converted.

`load_reference` takes a published constructor's arguments and state dict. Keys are renamed by regular
expressions, tried in order; a key that none matches is an error, one that maps to None is dropped because ours
derives it.
"""

import re
from collections.abc import Callable, Mapping

import torch
from einops import rearrange
from torch import Tensor, nn

from models import create_model
from published.arguments import reference_arguments

Renames = list[tuple[str, str | None]]

TIME_AND_LABEL: Renames = [
    (r"t_embedder\.mlp\.(.*)", r"cond.time.mlp.\1"),
    (r"y_embedder\.embedding_table\.(.*)", r"cond.label.\1"),
    (r"pos_embed", None),
]

DIT: Renames = [
    *TIME_AND_LABEL,
    (r"x_embedder\.proj\.(.*)", r"patch.\1"),
    (r"(blocks\.\d+)\.attn\.(.*)", r"\1.attention.\2"),
    (r"(blocks\.\d+)\.mlp\.(.*)", r"\1.mlp.\2"),
    (r"(blocks\.\d+)\.adaLN_modulation\.1\.(.*)", r"\1.modulation.\2"),
    (r"blocks\.(\d+)\.skip_linear\.(.*)", r"joins.\1.\2"),
    (r"final_layer\.adaLN_modulation\.1\.(.*)", r"final.modulation.\1"),
    (r"final_layer\.linear\.(.*)", r"final.linear.\1"),
]

UVIT: Renames = [
    (r"pos_embed", r"positions"),
    (r"label_emb\.(.*)", r"label.\1"),
    (r"patch_embed\.proj\.(.*)", r"patch.\1"),
    (r"out_blocks\.(\d+)\.skip_linear\.(.*)", r"joins.\1.\2"),
    (r"in_blocks\.(\d+)\.attn\.(.*)", r"encoder.\1.attention.\2"),
    (r"in_blocks\.(.*)", r"encoder.\1"),
    (r"mid_block\.attn\.(.*)", r"middle.attention.\1"),
    (r"mid_block\.(.*)", r"middle.\1"),
    (r"out_blocks\.(\d+)\.attn\.(.*)", r"decoder.\1.attention.\2"),
    (r"out_blocks\.(.*)", r"decoder.\1"),
    (r"norm\.(.*)", r"norm.\1"),
    (r"decoder_pred\.(.*)", r"head.\1"),
    (r"final_layer\.(.*)", r"smooth.\1"),
]

SWIN_BLOCK: Renames = [
    (r"attn\.(relative_position_index|relative_coords_table)", None),
    (r"attn\.cpb_mlp\.(.*)", r"attention.position_bias.mlp.\1"),
    (r"attn\.(qkv\.weight|qkv\.bias|proj\..*|logit_scale)", r"attention.\1"),
    (r"mlp\.0\.(.*)", r"mlp.fc1.\1"),
    (r"mlp\.3\.(.*)", r"mlp.fc2.\1"),
    (r"mod([12])\.adaLN_modulation\.1\.(.*)", r"modulator\1.linear.\2"),
    (r"norm([12])\.(.*)", r"norm\1.\2"),
]
GLOBAL_BLOCK: Renames = [
    (r"self_attention\.in_proj_(.*)", r"attention.qkv.\1"),
    (r"self_attention\.out_proj\.(.*)", r"attention.proj.\1"),
    (r"ln_([12])\.(.*)", r"norm\1.\2"),
    *SWIN_BLOCK,
]
STEM: Renames = [
    (r"layers\.(0|4|8)\.adaLN_modulation\.1\.(.*)", r"modulators.\1.linear.\2"),
    (r"layers\.(1|5|9)\.(.*)", r"convs.\1.\2"),
    (r"layers\.(2|6|10)\.(.*)", r"norms.\1.\2"),
]
MODULATOR: Renames = [(r"mod\.adaLN_modulation\.1\.(.*)", r"modulator.linear.\1")]
CROSS_ATTENTION: Renames = [
    (r"mod_x\.adaLN_modulation\.1\.(.*)", r"modulator_x.linear.\1"),
    (r"mod_r\.adaLN_modulation\.1\.(.*)", r"modulator_skip.linear.\1"),
    (r"cross_attention\.in_proj_(.*)", r"attention.attention.in_proj.\1"),
    (r"cross_attention\.out_proj\.(.*)", r"attention.attention.proj.\1"),
    (r"norm\.(.*)", r"norm.\1"),
]


def load_reference(source: str, state_dict: Mapping[str, Tensor], config: Mapping[str, object]) -> nn.Module:
    """Our backbone, in eval mode, with a published implementation's weights.

    Args:
        source: `dit`, `sit`, `uvit`, `uvit-adaln`, `uswin` or `xswin`.
        state_dict: the published weights.
        config: the published constructor's arguments.

    Raises:
        ValueError: for an unknown source, and listing keys that are missing, unknown or of another shape.
    """
    model = create_model(**reference_arguments(source, config))
    weights = CONVERSIONS[source](dict(state_dict), config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if expected != shapes:
        missing, unknown = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
        reshaped = sorted(name for name in expected.keys() & shapes.keys() if expected[name] != shapes[name])
        raise ValueError(f"weights do not fit: missing {missing}, unknown {unknown}, of another shape {reshaped}")
    model.load_state_dict(weights)
    return model.eval()


def _convert_dit(weights: dict[str, Tensor], config: Mapping) -> dict[str, Tensor]:
    weights = _rename(weights, DIT)
    depth = config["depth"]
    first_join = depth - (depth - 1) // 2
    weights = _renumber(weights, r"joins\.(\d+)", lambda number: number - first_join)
    return _flatten_patch(weights)


def _convert_sit(weights: dict[str, Tensor], config: Mapping) -> dict[str, Tensor]:
    """SiT's velocity points from noise to data, ours from data to noise; the half of its output that SiT throws away
    is left out."""
    weights = _convert_dit(weights, config)
    patch = {"p": config["patch_size"], "q": config["patch_size"]}
    for name in ("final.linear.weight", "final.linear.bias"):
        rows = rearrange(weights[name], "(p q c) ... -> p q c ...", **patch)[:, :, : config["in_channels"]]
        weights[name] = -rearrange(rows, "p q c ... -> (p q c) ...")
    return weights


def _convert_uvit(weights: dict[str, Tensor], config: Mapping) -> dict[str, Tensor]:
    weights = _flatten_patch(_rename(weights, UVIT))
    weights["positions"] = weights["positions"][0]
    if "smooth.weight" not in weights:  # the huge ones have no last convolution: ours passes the image on
        channels = config["in_chans"]
        weights["smooth.weight"] = nn.init.dirac_(torch.empty(channels, channels, 3, 3))
        weights["smooth.bias"] = torch.zeros(channels)
    return weights


def _convert_xswin(weights: dict[str, Tensor], config: Mapping) -> dict[str, Tensor]:
    weights = _rename(weights, _xswin_renames(config))
    for stem in ("stem_in", "stem_out"):
        weights = _renumber(weights, rf"{stem}\.\w+\.(\d+)", lambda number: number // 4)
    for name in [name for name in weights if name.endswith("attention.qkv.bias") and "middle" not in name]:
        q_bias, _, v_bias = weights.pop(name).chunk(3)
        weights |= {name.replace("qkv.bias", "q_bias"): q_bias, name.replace("qkv.bias", "v_bias"): v_bias}
    for name in [name for name in weights if ".in_proj." in name]:
        tensor = weights.pop(name)
        q, kv = tensor.tensor_split([len(tensor) // 3])
        weights |= {name.replace("in_proj", "q"): q, name.replace("in_proj", "kv"): kv}
    return weights


def _xswin_renames(config: Mapping) -> Renames:
    """The published encoder and decoder are flat lists; which entry is what follows from the configuration."""
    cross = config["residual_cross_attention"]
    final = config["final_downsample"]
    renames: Renames = [
        *TIME_AND_LABEL,
        *_under("smooth_conv_in", "stem_in", STEM),
        *_under("smooth_conv_out", "stem_out", STEM),
        (r"patching\.mod\.adaLN_modulation\.1\.(.*)", r"patch_modulator.linear.\1"),
        (r"patching\.patching\.0\.(.*)", r"patch.\1"),
        (r"patching\.patching\.2\.(.*)", r"patch_norm.\1"),
        (r"unpatching\.mod\.adaLN_modulation\.1\.(.*)", r"unpatch_modulator.linear.\1"),
        (r"unpatching\.unpatching\.1\.(.*)", r"unpatch.\1"),
        (r"unpatching\.unpatching\.2\.(.*)", r"unpatch_norm.\1"),
        (r"head\.mod\.adaLN_modulation\.1\.(.*)", r"head_modulator.linear.\1"),
        (r"head\.pointwise\.(.*)", r"head.\1"),
    ]
    for number in range(config["global_stages"]):
        renames += _under(f"middle.sequential.{number}", f"middle.{number}", GLOBAL_BLOCK)
    for stage, depth in enumerate(config["depths"]):
        for block in range(depth):
            source = f"encoder.{2 * stage}.sequential.{block}"
            renames += _under(source, f"encoder.{stage}.blocks.{block}", SWIN_BLOCK)
        merge = [*MODULATOR, (r"(reduction|norm)\.(.*)", r"\1.\2")]
        renames += _under(f"encoder.{2 * stage + 1}", f"merges.{stage}", merge)
    position = 0
    for stage, depth in enumerate(reversed(config["depths"])):
        if stage > 0 or final:
            expand = [*MODULATOR, (r"(expansion|norm)\.(.*)", r"\1.\2")]
            renames += _under(f"decoder.{position}", f"expands.{stage}", expand)
            position += 1
        if cross:
            renames += _under(f"decoder.{position}", f"decoder.{stage}.skip", CROSS_ATTENTION)
            position += 1
        source, target = f"decoder.{position}.sequential", f"decoder.{stage}"
        renames += _under(f"{source}.0", f"{target}.wide", SWIN_BLOCK)
        halve = [*MODULATOR, (r"pointwise\.(.*)", r"halve.\1")]
        renames += _under(f"{source}.1", target, halve)
        for block in range(1, depth):
            renames += _under(f"{source}.{block + 1}", f"{target}.blocks.{block - 1}", SWIN_BLOCK)
        position += 1
    return renames


def _under(source: str, target: str, renames: Renames) -> Renames:
    """The same renames below a prefix."""
    return [
        (re.escape(source) + r"\." + pattern, None if new is None else f"{target}.{new}") for pattern, new in renames
    ]


def _rename(weights: dict[str, Tensor], renames: Renames) -> dict[str, Tensor]:
    compiled = [(re.compile(pattern), new) for pattern, new in renames]
    renamed, unknown = {}, []
    for name, tensor in weights.items():
        for pattern, new in compiled:
            match = pattern.fullmatch(name)
            if match:
                if new is not None:
                    renamed[match.expand(new)] = tensor
                break
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"weights do not fit: unknown {sorted(unknown)}")
    return renamed


def _renumber(weights: dict[str, Tensor], pattern: str, new: Callable[[int], int]) -> dict[str, Tensor]:
    compiled = re.compile(pattern)

    def renumbered(name: str) -> str:
        match = compiled.match(name)
        return name if match is None else f"{name[: match.start(1)]}{new(int(match[1]))}{name[match.end(1) :]}"

    return {renumbered(name): tensor for name, tensor in weights.items()}


def _flatten_patch(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A patch convolution is a linear over the patch."""
    weights["patch.weight"] = rearrange(weights["patch.weight"], "d c p q -> d (c p q)")
    return weights


CONVERSIONS = {
    "dit": _convert_dit,
    "sit": _convert_sit,
    "uvit-adaln": _convert_dit,
    "uvit": _convert_uvit,
    "uswin": _convert_xswin,
    "xswin": _convert_xswin,
}
