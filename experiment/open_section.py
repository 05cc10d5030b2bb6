"""Open sections of the configuration: their settings are the parameters of registered functions."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import field, make_dataclass
from inspect import Parameter, signature
from typing import Annotated, Any, get_args, get_origin

import docstring_parser

REPLACED = ("__init__", "__repr__", "__eq__", "__hash__", "__match_args__", "__dataclass_fields__", "__annotations__")


def signature_settings(preset: Callable[..., Any]) -> dict[str, Parameter]:
    """The parameters of a function or class without `self`, with annotations, else inferred from defaults."""
    namespace = vars(sys.modules[preset.__module__])

    def hint(parameter: Parameter) -> Any:
        if parameter.annotation is Parameter.empty:
            return Any if parameter.default in (None, Parameter.empty) else type(parameter.default)
        return eval(parameter.annotation, namespace) if isinstance(parameter.annotation, str) else parameter.annotation

    parameters = signature(preset).parameters
    return {name: parameter.replace(annotation=hint(parameter)) for name, parameter in parameters.items()}


def open_section(section: type, table: Mapping[str, Callable[..., Any]]) -> None:
    """Redefine a frozen dataclass in place: its fields become `kind`, a name in the table, and the parameters of all
    functions in the table. Their default is None, which stands for that of the selected function."""
    by_name: dict[str, dict[str, Parameter]] = {}
    for kind, preset in table.items():
        for name, parameter in signature_settings(preset).items():
            by_name.setdefault(name, {})[kind] = parameter
    settings: list[Any] = [("kind", str, field(default=next(iter(table))))]
    for name, parameters in by_name.items():
        annotation = next(iter(parameters.values())).annotation
        hint, *intervals = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
        metadata = {"interval": intervals[0]} if intervals else {}
        settings.append((name, hint | None, field(default=None, metadata=metadata)))
    dataclass_members = vars(make_dataclass(section.__name__, settings, frozen=True))
    for name in REPLACED:
        setattr(section, name, dataclass_members[name])
    for name in by_name:
        setattr(section, name, None)
    section.__doc__ = "\n".join([str(section.__doc__).partition("\n\n")[0], "", "Args:", *_help(table, by_name)])


def _help(table: Mapping[str, Callable[..., Any]], by_name: Mapping[str, Mapping[str, Parameter]]) -> list[str]:
    """Compose the help of an open section from the docstrings of the table's functions."""

    def join_lines(text: str | None) -> str:
        return " ".join((text or "").split())

    docstrings = {kind: docstring_parser.parse(preset.__doc__ or "") for kind, preset in table.items()}
    kinds = [f"'{kind}' ({join_lines(docstring.short_description)})" for kind, docstring in docstrings.items()]
    described = {kind: {entry.arg_name: entry.description for entry in docstrings[kind].params} for kind in table}
    lines = [f"    kind: {', '.join(kinds)}"]
    for name, parameters in by_name.items():
        by_text: dict[str, dict[str, list[str]]] = {}  # the kinds by default and text
        first = next((described[kind][name] for kind in parameters if name in described[kind]), None)
        for kind, parameter in parameters.items():
            text = join_lines(described[kind].get(name, first))
            by_text.setdefault(text, {}).setdefault(_as_yaml(parameter.default), []).append(kind)
        of_kinds = {
            text: "".join(f"[{', '.join(kinds)}; default {default}] " for default, kinds in by_default.items())
            for text, by_default in by_text.items()
        }
        lines.append(f"    {name}: {'; '.join(kinds + text for text, kinds in of_kinds.items())}")
    return lines


def _as_yaml(default: Any) -> str:
    if isinstance(default, tuple | list):
        return f"[{', '.join(map(_as_yaml, default))}]"
    return {"None": "null", "True": "true", "False": "false"}.get(str(default), str(default))
