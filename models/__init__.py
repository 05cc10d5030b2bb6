"""Backbones by name: `create_model("XSwin", input_size=8, in_channels=4, out_channels=8, num_classes=101)`."""

import difflib
import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from models import dit, unet, uvit, xswin
from models.backbone import SIZES, Backbone, complete
from models.layers import Size

# By name: class, and arguments that differ from its own.
BACKBONES: dict[str, tuple[type[nn.Module], dict]] = {**xswin.MODELS, **dit.MODELS, **uvit.MODELS, **unet.MODELS}
BACKBONES |= {family: BACKBONES[f"{family}-S/2"] for family in ("DiT", "UViT", "UViT-tokens")}
MAY_BE_ZERO = {"num_global_blocks", "mlp_ratio", "drop_path", "dropout", "augment_dim"}


def list_models() -> list[str]:
    return list(BACKBONES)


def model_arguments(name: str, **overrides: object) -> dict[str, object]:
    """What a backbone of this name is built with: overrides, its row in the table, its constructor's defaults."""
    backbone, row = complete(BACKBONES[name][0]), BACKBONES[name][1]
    accepted = inspect.signature(backbone).parameters.items()
    defaults = {argument: kind.default for argument, kind in accepted if kind.default is not kind.empty}
    return {**defaults, **row, **overrides}


def create_model(
    name: str, *, input_size: Size, in_channels: int, out_channels: int, num_classes: int, **overrides: object
) -> Backbone:
    """A backbone `model(x_t, t, y) -> [b out_channels h w]`; `overrides` change arguments of its row in the table. A
    plain `nn.Module` from outside is given what it lacks of the contract (see `models.backbone`)."""
    if name not in BACKBONES:
        close = difflib.get_close_matches(name, BACKBONES, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(f"--model {name}: unknown; {hint}there are {', '.join(BACKBONES)}")
    backbone, row = complete(BACKBONES[name][0]), BACKBONES[name][1]
    accepted = inspect.signature(backbone).parameters
    unknown = sorted(overrides.keys() - accepted.keys())
    if unknown:
        raise ValueError(f"--model_args.{unknown[0]}: {name} has no such argument; it takes {', '.join(accepted)}")
    for argument, value in overrides.items():
        smallest = 0 if argument in MAY_BE_ZERO else 1
        numbers = value if isinstance(value, list | tuple) else [value]
        if any(type(number) is int and number < smallest for number in numbers):
            raise ValueError(f"--model_args.{argument} {value}: must be at least {smallest}")
        if any(type(number) is float and not 0 <= number < math.inf for number in numbers):
            raise ValueError(f"--model_args.{argument} {value}: must lie in [0, inf)")
    height_width = (input_size, input_size) if isinstance(input_size, int) else input_size
    sizes = dict(zip(SIZES, (height_width, in_channels, out_channels, num_classes), strict=True))
    model = backbone(**{**sizes, **row, **overrides})
    for size in SIZES - vars(model).keys():
        setattr(model, size, sizes[size])
    return model


@dataclass(frozen=True)
class ModelSpec:
    """What it takes to build a backbone again: the configuration's part, and what followed from the data."""

    name: str
    args: dict[str, Any]
    input_size: tuple[int, int]
    in_channels: int
    out_channels: int
    num_classes: int

    def build(self) -> Backbone:
        """The backbone with fresh weights; nothing is allocated before its arguments are known to fit."""
        self.build_on_meta()
        return self._create()

    def build_on_meta(self) -> Backbone:
        """The backbone without memory for its weights: validates the arguments, counts parameters."""
        with torch.device("meta"):
            return self._create()

    def _create(self) -> Backbone:
        return create_model(self.name, **{size: getattr(self, size) for size in SIZES}, **self.args)
