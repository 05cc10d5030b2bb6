"""Sections of the configuration that are open: their settings are the parameters of what is registered by then."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import field, make_dataclass
from inspect import Parameter, signature
from typing import Annotated, Any, get_args, get_origin

import docstring_parser

REMADE = ("__init__", "__repr__", "__eq__", "__hash__", "__match_args__", "__dataclass_fields__", "__annotations__")


def settings_of(preset: Callable[..., Any]) -> dict[str, Parameter]:
    """The parameters of a function or class, their annotations evaluated, those of Python's own `self` left out."""
    names = vars(sys.modules[preset.__module__])

    def hint(setting: Parameter) -> Any:
        if setting.annotation is Parameter.empty:
            return Any if setting.default in (None, Parameter.empty) else type(setting.default)
        return eval(setting.annotation, names) if isinstance(setting.annotation, str) else setting.annotation

    return {name: setting.replace(annotation=hint(setting)) for name, setting in signature(preset).parameters.items()}


def open_section(section: type, table: Mapping[str, Callable[..., Any]]) -> None:
    """Give a frozen dataclass, in place, the settings of every function in a table beside its `kind`; None is the
    kind's default."""
    owners: dict[str, dict[str, Parameter]] = {}
    for kind, preset in table.items():
        for name, setting in settings_of(preset).items():
            owners.setdefault(name, {})[kind] = setting
    settings: list[Any] = [("kind", str, field(default=next(iter(table))))]
    for name, kinds in owners.items():
        annotation = next(iter(kinds.values())).annotation
        hint, *intervals = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
        metadata = {"interval": intervals[0]} if intervals else {}
        settings.append((name, hint | None, field(default=None, metadata=metadata)))
    made = vars(make_dataclass(section.__name__, settings, frozen=True))
    for name in REMADE:
        setattr(section, name, made[name])
    for name in owners:
        setattr(section, name, None)
    section.__doc__ = "\n".join([str(section.__doc__).partition("\n\n")[0], "", "Args:", *_help(table, owners)])


def _help(table: Mapping[str, Callable[..., Any]], owners: Mapping[str, Mapping[str, Parameter]]) -> list[str]:
    def line(text: str | None) -> str:
        return " ".join((text or "").split())

    documented = {kind: docstring_parser.parse(preset.__doc__ or "") for kind, preset in table.items()}
    kinds = [f"'{kind}' ({line(text.short_description)})" for kind, text in documented.items()]
    lines = [f"    kind: {', '.join(kinds)}"]
    for name, settings in owners.items():
        texts: dict[str, list[str]] = {}
        for kind, setting in settings.items():
            texts_of_kind = {parameter.arg_name: parameter.description for parameter in documented[kind].params}
            texts.setdefault(line(texts_of_kind.get(name)), []).append(f"{kind} ({_as_yaml(setting.default)})")
        parts = [f"of {' and '.join(kinds)}: {text}" for text, kinds in texts.items()]
        lines.append(f"    {name}: {'; '.join(parts)}")
    return lines


def _as_yaml(default: Any) -> str:
    if isinstance(default, tuple | list):
        return f"[{', '.join(map(_as_yaml, default))}]"
    return {"None": "null", "True": "true", "False": "false"}.get(str(default), str(default))
