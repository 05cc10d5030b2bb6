"""Backbones by name: `create_model("XSwin", input_size=8, in_channels=4, out_channels=8, num_classes=101)`.

Importing this does not import torch.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from models.variants import DIT, UNET, UVIT, XSWIN, Variant
from settings import alternatives

if TYPE_CHECKING:
    from models.backbone import Backbone
    from models.layers import Size

BACKBONES: dict[str, Variant] = {**XSWIN, **DIT, **UVIT, **UNET}
BACKBONES |= {family: BACKBONES[f"{family}-S/2"] for family in ("DiT", "UViT", "U-ViT", "UViT-tokens")}
# Arguments of this project's backbones that must be positive; no number among the others may be negative.
POSITIVE = {"dim", "time_dim", "channels", "middle_channels", "depth", "depths", "num_heads", "mlp_ratio"}
POSITIVE |= {"patch_size", "window_size", "neighbourhood", "stem_size", "factor"}


def check_model(name: str) -> None:
    """Raise ValueError with the nearest names where no backbone has this one."""
    if name not in BACKBONES:
        close = difflib.get_close_matches(name, BACKBONES, n=3, cutoff=0.4)
        hint = f"did you mean {alternatives(close)}? " if close else ""
        raise ValueError(f"--model {name}: unknown; {hint}there are {abbreviate(BACKBONES)}")


def abbreviate(names: Iterable[str]) -> str:
    """List names of backbones, those of a family together: `XSwin, USwin, DiT-{S,B}/{2,4}`."""
    patch_sizes, sizes, listed = defaultdict(list), defaultdict(list), []
    for name in names:
        variant, _, patch_size = name.partition("/")
        patch_sizes[variant].append(patch_size)
    for variant, patches in patch_sizes.items():
        family, _, size = variant.rpartition("-")
        sizes[family, _braced(patches)].append(size)
    for (family, patches), own in sizes.items():
        ending = patches and f"/{patches}"
        listed += [f"{family}-{_braced(own)}{ending}"] if family else [f"{size}{ending}" for size in own]
    return ", ".join(listed)


def _braced(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{{{','.join(words)}}}"


def class_of(name: str) -> Any:
    backbone = BACKBONES[name][0]
    return resolve_name(backbone) if isinstance(backbone, str) else backbone


def model_arguments(name: str, **overrides: object) -> dict[str, object]:
    """Merge the constructor's defaults, the row of `BACKBONES` and `overrides`; later ones win."""
    from models.backbone import as_backbone

    parameters = inspect.signature(as_backbone(class_of(name))).parameters.values()
    defaults = {
        parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty
    }
    return {**defaults, **BACKBONES[name][1], **overrides}


def create_model(
    name: str, *, input_size: Size, in_channels: int, out_channels: int, num_classes: int, **overrides: object
) -> Backbone:
    """Build a backbone `model(x_t, t, y) -> [b out_channels h w]` with fresh weights.

    `overrides` replace constructor arguments of the row of `BACKBONES`. A plain `nn.Module` from outside gets the
    defaults of `models.backbone.Backbone`. An unknown name or argument, or one out of range, raises `ValueError`.
    """
    from models.backbone import SIZES, as_backbone

    check_model(name)
    backbone, row = as_backbone(class_of(name)), BACKBONES[name][1]
    parameters = inspect.signature(backbone).parameters
    unknown = sorted(overrides.keys() - parameters.keys())
    if unknown:
        raise ValueError(f"--model_args.{unknown[0]}: {name} has no such argument; it takes {', '.join(parameters)}")
    if backbone.__module__.startswith(("models.", "studies.")):
        _check_numbers(overrides)
    height_width = (input_size, input_size) if isinstance(input_size, int) else input_size
    sizes = dict(zip(SIZES, (height_width, in_channels, out_channels, num_classes), strict=True))
    model = backbone(**{**sizes, **row, **overrides})
    for size in SIZES - vars(model).keys():
        setattr(model, size, sizes[size])
    return model


def _check_numbers(arguments: Mapping[str, object]) -> None:
    """Raise ValueError for the first number, alone or in a list, that no backbone of this project takes."""
    for argument, value in arguments.items():
        numbers = [n for n in (value if isinstance(value, list | tuple) else [value]) if isinstance(n, int | float)]
        if not all(0 <= number < math.inf for number in numbers) or (argument in POSITIVE and 0 in numbers):
            bounds = "positive" if argument in POSITIVE else "at least 0"
            raise ValueError(f"--model_args.{argument} {value}: must be {bounds}, and finite")


@dataclass(frozen=True)
class ModelSpec:
    """All that is needed to rebuild a backbone: name and arguments from the configuration, sizes from the data."""

    name: str
    args: dict[str, Any]
    input_size: tuple[int, int]
    in_channels: int
    out_channels: int
    num_classes: int

    def build(self) -> Backbone:
        """Build the backbone with fresh weights, after validating the arguments without allocating memory."""
        self.build_on_meta()
        return self._create()

    def build_on_meta(self) -> Backbone:
        """Build the backbone on the meta device, to validate the arguments or count parameters."""
        import torch

        with torch.device("meta"):
            return self._create()

    def _create(self) -> Backbone:
        from models.backbone import SIZES

        return create_model(self.name, **{size: getattr(self, size) for size in SIZES}, **self.args)
