"""What every configuration shares: ranges of numbers, and the way from and to plain mappings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, field, fields, is_dataclass
from typing import Any, cast, get_args, get_origin, get_type_hints

SEEDS = "[0, 4294967295]"  # NumPy's


def within(interval: str, default: Any = MISSING) -> Any:
    """A setting whose number, or each of whose numbers, lies in an interval: `(0, 1]` is without 0 and with 1."""
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"interval": interval})
    return field(default=default, metadata={"interval": interval})


def check_settings(config: Any, prefix: str = "--") -> None:
    """Every number of a configuration lies in its interval, and what its own `check` asks for holds.

    Raises:
        ValueError: naming the flag.
    """
    for each in fields(config):
        value, flag, interval = getattr(config, each.name), f"{prefix}{each.name}", each.metadata.get("interval")
        parts = value if isinstance(value, list) else [value]
        for part in parts:
            if is_dataclass(part):
                check_settings(part, f"{flag}.")
        if interval and not all(_contains(interval, number) for number in _numbers(value)):
            raise ValueError(f"{flag} {value}: must lie in {interval}")
    if hasattr(config, "check"):
        config.check(prefix)


def _numbers(value: Any) -> Iterator[int | float]:
    """In lists of lists too."""
    if isinstance(value, list | tuple):
        for part in value:
            yield from _numbers(part)
    elif value is not None:
        yield value


def _contains(interval: str, number: int | float) -> bool:
    low, high = map(float, interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    return above and (number <= high if interval[-1] == "]" else number < high)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"optim": {"lr": 1}}` as `{"optim.lr": 1}`: the spelling of flags."""
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def from_dict(kind: Any, values: Any) -> Any:
    """A configuration again, from `to_dict`: no value is read anew. Settings that it lacks are their defaults.

    Raises:
        TypeError, AttributeError: for settings that there are not.
    """
    if is_dataclass(kind):
        kinds = get_type_hints(kind)
        return cast(Any, kind)(**{name: from_dict(kinds.get(name), value) for name, value in values.items()})
    if get_origin(kind) is list:
        return [from_dict(get_args(kind)[0], value) for value in values]
    return tuple(values) if get_origin(kind) is tuple else values
