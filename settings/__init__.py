"""Declaration and validation of settings: ranges of numbers, tables of names. Imports no torch, so `--help` is fast."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, field, fields, is_dataclass, make_dataclass
from inspect import signature
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

SEEDS = "[0, 4294967295]"  # the range of NumPy's seeds
UNSET = "as trained"  # value of a setting that a command line leaves to the checkpoint's configuration

T = TypeVar("T")


def within(interval: str, default: Any = MISSING) -> Any:
    """Declare a dataclass field whose number, or each of whose numbers, lies in an interval. A parenthesis excludes the
    end and a bracket includes it: `(0, 1]` is without 0 and with 1."""
    return _declare(default, interval=interval)


def reads(kind: str, default: Any = MISSING) -> Any:
    """Declare a dataclass field that names a file or folder to read, or several, of a kind in `experiment.inputs`."""
    return _declare(default, reads=kind)


def writes(endings: str, default: Any = MISSING) -> Any:
    """Declare a dataclass field that names a file to write, with one of these endings; '' stands for any, or a folder.
    It is checked before the work, which may take hours."""
    return _declare(default, writes=endings)


def _declare(default: Any, **metadata: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def check_settings(config: Any, prefix: str = "--") -> None:
    """Check all intervals of a configuration, nested ones included, and call its own `check` where it has one. Raises
    ValueError naming the flag; `prefix` is what its name starts with."""
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
    """Check that a function takes these keyword arguments: their names, types and intervals. Intervals are those of
    annotations such as `Annotated[float, "[0, 1]"]`. Raises ValueError naming the flag."""
    parameters = signature(function).parameters
    names = [name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]
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
    """Derive a configuration class whose settings all default to `UNSET`.

    A command line uses it to override the settings of a checkpoint: what stays unset is left as trained, and null is a
    value. With `several`, a number may also be text: several numbers, separated by commas.
    """
    kinds, settings = get_type_hints(config), []
    for setting in fields(config):  # pyright: ignore[reportArgumentType]
        kind, metadata = kinds[setting.name], setting.metadata
        if several and {int, float} & {kind, *get_args(kind)}:
            kind, metadata = kind | str, {}
        settings.append((setting.name, kind | Literal[UNSET], field(default=UNSET, metadata=metadata)))
    return make_dataclass(config.__name__, settings, bases=(config,), frozen=True)


def set_values(config: Any) -> dict[str, Any]:
    """Return the settings that are set in a configuration of a class made by `unset`, by name."""
    values = {setting.name: getattr(config, setting.name) for setting in fields(config)}
    return {name: value for name, value in values.items() if value != UNSET}


def alternatives(words: Sequence[str]) -> str:
    """Return words as a choice in a sentence: `a`, `a or b`, `a, b or c`."""
    return " or ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def check_name(flag: str, name: str, known: Iterable[str]) -> None:
    """Raise ValueError naming the flag where a name is not among the known ones."""
    if name not in known:
        raise ValueError(f"{flag} {name}: unknown, choose from {', '.join(known)}")


def check_interval(flag: str, value: Any, interval: str) -> None:
    """Raise ValueError naming the flag where a number, or one in nested lists, lies outside an interval."""
    low, high = map(float, interval[1:-1].split(","))
    for number in _numbers(value):
        above_low = number >= low if interval[0] == "[" else number > low
        below_high = number <= high if interval[-1] == "]" else number < high
        if not (above_low and below_high):
            raise ValueError(f"{flag} {value}: must lie in {interval}")


def _numbers(value: Any) -> Iterator[int | float]:
    """Yield the numbers in nested lists; None is skipped."""
    if isinstance(value, list | tuple):
        for part in value:
            yield from _numbers(part)
    elif value is not None:
        yield value
