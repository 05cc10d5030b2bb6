"""Arguments of the published constructors: read off the shapes of their weights (a `.pt` file seldom says them), and
what they are to our own constructors."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from models import BACKBONES, model_arguments

# Heads cannot be seen in the weights; width says them for every published size.
HEADS = {384: 6, 512: 8, 768: 12, 1024: 16, 1152: 16}


def infer_config(source: str, weights: Mapping[str, Tensor], **overrides: object) -> dict[str, object]:
    """What the published constructor was called with, under its own names; `overrides` come first.

    Raises:
        ValueError: when the weights are not of this source, or do not say what has to be given.
    """
    read, _ = _of_source(source)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    try:
        return read(shapes, {name: value for name, value in overrides.items() if value is not None})
    except KeyError as error:
        first = ", ".join(list(shapes)[:3])
        raise ValueError(f"--source {source}: the weights have no {error}; they begin with {first}") from None


def reference_arguments(source: str, config: Mapping[str, object]) -> dict[str, Any]:
    """What `create_model` is to be given, `name` included, for a published constructor's arguments.

    Raises:
        ValueError: for an unknown source, or arguments that ours cannot follow.
    """
    return _of_source(source)[1](config)


def row_of(name: str, arguments: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The row of the table of backbones that builds the same, if there is one, and what is left to say."""

    def whole(row: str, **others: Any) -> dict[str, Any]:
        arguments = {**model_arguments(row), **others}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in arguments.items()}

    wanted = whole(name, **arguments)
    same = (row for row, (family, _) in BACKBONES.items() if family is BACKBONES[name][0] and whole(row) == wanted)
    row = next(same, None)
    return (name, arguments) if row is None else (row, {})


def _of_source(source: str) -> tuple[Callable, Callable]:
    if source not in SOURCES:
        raise ValueError(f"--source {source}: unknown, choose from {', '.join(SOURCES)}")
    return SOURCES[source]


def _read_dit(shapes: dict[str, tuple[int, ...]], overrides: dict) -> dict[str, object]:
    dim, channels, patch_size, _ = shapes["x_embedder.proj.weight"]
    return {
        "input_size": patch_size * math.isqrt(shapes["pos_embed"][1]),
        "patch_size": patch_size,
        "in_channels": channels,
        "hidden_size": dim,
        "depth": _count(shapes, r"blocks\.(\d+)\."),
        "num_heads": _heads(dim, overrides),
        "mlp_ratio": shapes["blocks.0.mlp.fc1.weight"][0] / dim,
        "num_classes": shapes["y_embedder.embedding_table.weight"][0] - 1,
        "learn_sigma": shapes["final_layer.linear.weight"][0] == 2 * channels * patch_size**2,
    }


def _read_uvit(shapes: dict[str, tuple[int, ...]], overrides: dict) -> dict[str, object]:
    dim, channels, patch_size, _ = shapes["patch_embed.proj.weight"]
    num_labels = shapes.get("label_emb.weight", (-1,))[0]  # the null label among them
    num_extras = 1 if num_labels < 0 else 2
    return {
        "img_size": patch_size * math.isqrt(shapes["pos_embed"][1] - num_extras),
        "patch_size": patch_size,
        "in_chans": channels,
        "embed_dim": dim,
        "depth": 2 * _count(shapes, r"in_blocks\.(\d+)\.") + 1,
        "num_heads": _heads(dim, overrides),
        "mlp_ratio": shapes["mid_block.mlp.fc1.weight"][0] / dim,
        "num_classes": num_labels,
    }


def _read_xswin(shapes: dict[str, tuple[int, ...]], overrides: dict) -> dict[str, object]:
    dim, _, *patch_size = shapes["patching.patching.0.weight"]
    stages = [f"encoder.{number}.sequential" for number in range(0, _count(shapes, r"encoder\.(\d+)\."), 2)]
    window = shapes[f"{stages[0]}.0.attn.relative_coords_table"][1:3]
    final_downsample = f"encoder.{2 * len(stages) - 1}.reduction.weight" in shapes
    reduction = 2 ** (len(stages) - 1 + final_downsample)
    side = overrides.get("input_size") or patch_size[0] * reduction * math.isqrt(shapes["pos_embed"][1])
    return {
        "patch_size": patch_size,
        "embed_dim": dim,
        "depths": [_count(shapes, rf"{re.escape(stage)}\.(\d+)\.") for stage in stages],
        "num_heads": [shapes[f"{stage}.0.attn.logit_scale"][0] for stage in stages],
        "window_size": [(side + 1) // 2 for side in window],
        "num_classes": shapes["y_embedder.embedding_table.weight"][0] - 1,
        "global_stages": _count(shapes, r"middle\.sequential\.(\d+)\."),
        "input_size": [side, side],
        "final_downsample": final_downsample,
        "input_channels": shapes["smooth_conv_in.layers.1.weight"][1],
        "output_channels": shapes["head.pointwise.weight"][0],
        "smooth_conv": True,
        "residual_cross_attention": any(".cross_attention." in name for name in shapes),
    }


def _count(shapes: dict[str, tuple[int, ...]], pattern: str) -> int:
    """One more than the largest number that the pattern finds at the start of a name."""
    numbers = [int(match[1]) for name in shapes if (match := re.match(pattern, name))]
    return max(numbers, default=-1) + 1


def _heads(dim: int, overrides: dict) -> int:
    heads = overrides.get("num_heads") or HEADS.get(dim)
    if heads is None:
        raise ValueError(f"--num_heads: the weights do not say it, and width {dim} is no published size; give it")
    return heads


def _dit(config: Mapping) -> dict[str, Any]:
    return {
        "name": "DiT",
        "input_size": config["input_size"],
        "in_channels": config["in_channels"],
        "out_channels": config["in_channels"] * (2 if config.get("learn_sigma", True) else 1),
        "num_classes": config["num_classes"],
        "dim": config["hidden_size"],
        "depth": config["depth"],
        "num_heads": config["num_heads"],
        "patch_size": config["patch_size"],
        "mlp_ratio": float(config.get("mlp_ratio", 4.0)),
    }


def _sit(config: Mapping) -> dict[str, Any]:
    return _dit({**config, "learn_sigma": False})


def _uvit_adaln(config: Mapping) -> dict[str, Any]:
    return {**_dit({**config, "learn_sigma": True}), "name": "UViT"}


def _uvit(config: Mapping) -> dict[str, Any]:
    depth = config["depth"]
    return {
        "name": "UViT-tokens",
        "input_size": config["img_size"],
        "in_channels": config["in_chans"],
        "out_channels": config["in_chans"],
        "num_classes": max(0, config["num_classes"] - 1),  # the published count includes the null label
        "dim": config["embed_dim"],
        "depth": depth // 2 * 2 + 1,
        "num_heads": config["num_heads"],
        "patch_size": config["patch_size"],
        "mlp_ratio": float(config.get("mlp_ratio", 4.0)),
    }


def _xswin(config: Mapping) -> dict[str, Any]:
    for name in ("window_size", "patch_size"):
        if len(set(config[name])) != 1:
            raise ValueError(f"{name}={list(config[name])}: ours are square")
    return {
        "name": "XSwin",
        "input_size": tuple(config["input_size"]),
        "in_channels": config["input_channels"],
        "out_channels": config["output_channels"],
        "num_classes": config["num_classes"],
        "dim": config["embed_dim"],
        "depths": config["depths"],
        "num_heads": config["num_heads"],
        "window_size": config["window_size"][0],
        "patch_size": config["patch_size"][0],
        "num_global_blocks": config["global_stages"],
        "skip": "cross_attention" if config["residual_cross_attention"] else "concat",
        "final_downsample": config["final_downsample"],
    }


SOURCES = {
    "dit": (_read_dit, _dit),
    "sit": (_read_dit, _sit),
    "uvit-adaln": (_read_dit, _uvit_adaln),
    "uvit": (_read_uvit, _uvit),
    "uswin": (_read_xswin, _xswin),
    "xswin": (_read_xswin, _xswin),
}
