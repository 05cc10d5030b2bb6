"""Ranges of numbers and tables of names, which every room declares its settings with. No torch here, so that `--help`
answers at once."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, field, fields, is_dataclass, make_dataclass
from inspect import signature
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

SEEDS = "[0, 4294967295]"  # NumPy's
UNSET = "as trained"

T = TypeVar("T")


def within(interval: str, default: Any = MISSING) -> Any:
    """A setting whose number, or each of whose numbers, lies in an interval: `(0, 1]` is without 0 and with 1."""
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"interval": interval})
    return field(default=default, metadata={"interval": interval})


def check_settings(config: Any, prefix: str = "--") -> None:
    """A ValueError names the flag of a number outside its interval, or what a configuration's own `check` has."""
    for setting in fields(config):
        value, flag = getattr(config, setting.name), f"{prefix}{setting.name}"
        for part in value if isinstance(value, list) else [value]:
            if is_dataclass(part):
                check_settings(part, f"{flag}.")
        if "interval" in setting.metadata and value != UNSET:
            check_interval(flag, value, setting.metadata["interval"])
    if hasattr(config, "check"):
        config.check(prefix)


def check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any], flag: str) -> None:
    """That a function takes these keywords, numbers in their `Annotated[float, "[0, 1]"]`; else a ValueError."""
    names = [name for name, one in signature(function).parameters.items() if one.kind is one.KEYWORD_ONLY]
    kinds = get_type_hints(function, include_extras=True)
    for name, value in arguments.items():
        if name not in names:
            raise ValueError(f"{flag}.{name}: {function.__name__} takes {', '.join(names) or 'no arguments'}")
        kind, *intervals = get_args(kinds[name]) if get_origin(kinds[name]) is Annotated else [kinds[name]]
        expected = (int, float) if kind is float else kind
        if isinstance(expected, type | tuple) and not isinstance(value, expected):
            raise ValueError(f"{flag}.{name} {value}: {function.__name__} takes a {kind.__name__} there")
        for interval in intervals:
            check_interval(f"{flag}.{name}", value, interval)


def unset(config: type[T], *, several: bool = False) -> type[T]:
    """A configuration's settings, none of which is set: what a command line puts in place of another's, null included.
    With `several`, a number may also be many with commas in between, as text."""
    kinds, settings = get_type_hints(config), []
    for setting in fields(config):  # pyright: ignore[reportArgumentType]
        kind, metadata = kinds[setting.name], setting.metadata
        if several and {int, float} & {kind, *get_args(kind)}:
            kind, metadata = kind | str, {}
        settings.append((setting.name, kind | Literal[UNSET], field(default=UNSET, metadata=metadata)))
    return make_dataclass(config.__name__, settings, bases=(config,), frozen=True)


def set_values(config: Any) -> dict[str, Any]:
    """Of a configuration by `unset` the settings that are set, by name."""
    values = {setting.name: getattr(config, setting.name) for setting in fields(config)}
    return {name: value for name, value in values.items() if value != UNSET}


def check_name(flag: str, name: str, known: Iterable[str]) -> None:
    """A ValueError names the flag of a name that a table has not."""
    if name not in known:
        raise ValueError(f"{flag} {name}: unknown, choose from {', '.join(known)}")


def check_interval(flag: str, value: Any, interval: str) -> None:
    """A ValueError names the flag of a number, or of one in a list, outside an interval."""
    low, high = map(float, interval[1:-1].split(","))
    for number in _numbers(value):
        above = number >= low if interval[0] == "[" else number > low
        below = number <= high if interval[-1] == "]" else number < high
        if not (above and below):
            raise ValueError(f"{flag} {value}: must lie in {interval}")


def _numbers(value: Any) -> Iterator[int | float]:
    """In lists of lists too."""
    if isinstance(value, list | tuple):
        for part in value:
            yield from _numbers(part)
    elif value is not None:
        yield value
