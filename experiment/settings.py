"""The way from and to plain mappings, and from configurations of before."""

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, cast, get_args, get_origin, get_type_hints

from settings import SEEDS, check_settings, within

__all__ = ["SEEDS", "check_settings", "flatten", "from_dict", "renamed", "within"]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"optim": {"lr": 1}}` as `{"optim.lr": 1}`: the spelling of flags."""
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def from_dict(kind: Any, values: Any) -> Any:
    """A configuration again, from `to_dict`: no value is read anew. Settings that it lacks are their defaults."""
    if is_dataclass(kind):
        kinds = get_type_hints(kind)
        return cast(Any, kind)(**{name: from_dict(kinds.get(name), value) for name, value in renamed(values).items()})
    if get_origin(kind) is list:
        return [from_dict(get_args(kind)[0], value) for value in values]
    return tuple(values) if get_origin(kind) is tuple else values


def renamed(values: Any) -> Any:
    """A whole configuration, as files of before have it, in the settings of today: samplers own their arguments, where
    `sampling` had `eta` (of ddim) and `churn` (of heun), 0 for all others."""
    sampling = values.get("sampling") if isinstance(values, Mapping) else None
    if not isinstance(sampling, Mapping) or sampling.keys().isdisjoint(("eta", "churn")):
        return values
    arguments = {name: sampling[name] for name in ("eta", "churn") if sampling.get(name)}
    others = {name: value for name, value in sampling.items() if name not in ("eta", "churn")}
    return {**values, "sampling": {**others, **({"sampler_args": arguments} if arguments else {})}}
