"""Command lines: the only importer of jsonargparse among the packages, and the one way errors reach a user."""

import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, auto_cli, set_loader, set_parsing_settings

from experiment.imports import load_imports
from experiment.mappings import NAMES, StrictLoader, of_today
from experiment.run_config import R, resuming
from machine import children
from settings import check_settings

set_parsing_settings(add_print_completion_argument=True)  # tab completion for shells, a schema for editors of YAML

T = TypeVar("T")

# A program is seldom typed alone: bash finds its name among the words behind `python` or a launcher.
BEHIND_LAUNCHERS = r"""
_behind_launcher() {
  local at word
  for ((at = 1; at < COMP_CWORD; at++)); do
    word=${COMP_WORDS[at]##*/}
    if declare -F "_shtab_${word//[^a-zA-Z0-9]/_}" > /dev/null; then
      COMP_WORDS=("${COMP_WORDS[@]:at}") COMP_CWORD=$((COMP_CWORD - at))
      "_shtab_${word//[^a-zA-Z0-9]/_}"
      return
    fi
  done
}
complete -o default -o filenames -F _behind_launcher python python3 accelerate torchrun
"""


UNION = r"Does not .* Union subtypes .* Errors: - (.*?)(?: - Expected (?:a )?NoneType)? Given value.*?Given value: "


def suggestion(words: str, parser: ArgumentParser, dashes: str = "--") -> str:
    """Which settings of the parser are meant, where its `words` say that there is none of some name."""
    unknown = re.search(r"unrecognized arguments: --([\w.]+)|ption '([\w.]+)'", words)
    if unknown is None:
        return ""
    flags = [flag.removeprefix("--") for flag in parser._option_string_actions]
    asked = unknown[1] or unknown[2]
    last, first = asked.rpartition(".")[2], asked.partition(".")[0]
    nearest = (
        difflib.get_close_matches(asked, flags, 1)
        or [flag for flag in flags if difflib.get_close_matches(last, [flag.rpartition(".")[2]])]
        or difflib.get_close_matches(first, [flag.partition(".")[0] for flag in flags], 1)
    )
    return f"; did you mean {' or '.join(dashes + flag for flag in nearest[:2])}?" if nearest else ""


class Parser(ArgumentParser):
    """Says in two lines what does not fit, with the nearest flag, where jsonargparse prints the usage of all."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        words = re.sub(r'Parser key "([^"]+)":', r"--\1:", " ".join(message.split()))
        words = re.sub(r"<class '([\w.]+)'>|typing\.", r"\1", words)
        words = re.sub(UNION, r"\1; given ", words).replace("Expected a int", "Expected an int")
        words += suggestion(words, self)
        print(f"{self.prog}: error: {words[:1000]}\n{self.prog} --help lists all settings", file=sys.stderr)
        raise SystemExit(2) from None

    def get_completion_script(self, completion_type: str, **kwargs: Any) -> str:
        script = super().get_completion_script(completion_type, **kwargs)
        return script + BEHIND_LAUNCHERS if completion_type == "shtab-bash" else script


set_loader("yaml", lambda text: of_today(yaml.load(text, StrictLoader)), exceptions=(yaml.YAMLError,))


def parse(
    config_class: type[T], arguments: list[str] | None = None, *, stored_in: Path | None = None, first: str = ""
) -> T:
    """Flags and `--config FILE.yaml` into a frozen dataclass; what does not fit ends the program with a message.
    `imports` are loaded first, the user's own or those `stored_in` a run. The flag `first` may go without its name."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if first and arguments and not arguments[0].startswith("-"):
        arguments = [f"--{first}", *arguments]
    arguments = written_out(config_class, arguments)
    quoted = quote_names(config_class, arguments)
    load_imports(named_imports(quoted), stored_in=stored_in)  # what they register has settings, which are flags
    told: dict[str, Any] = {"as_positional": False, "return_instance": True, "parser_class": Parser}
    told |= {"version": version("latent-diffusion-backbones"), "usage": "%(prog)s [settings]", "allow_abbrev": False}
    config = auto_cli(config_class, args=quoted, **told)
    check_settings(config)
    return cast(T, expand_home(config))


def named_imports(arguments: list[str]) -> list[str]:
    """What the command line, its lists of names quoted, names as `imports`, by a flag or in a file of `--config`."""
    names: list[str] = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        flag, has_value, value = argument.partition("=")
        value = value if has_value else following
        with suppress(OSError, ValueError, AttributeError, yaml.YAMLError):  # which reading it will tell
            if flag == "--config":
                names = yaml.load(Path(value).expanduser().read_text(), yaml.BaseLoader).get("imports", names)
            elif flag == "--imports":
                names = json.loads(value)
    return [str(name) for name in names] if isinstance(names, list) else []


def run_program(program: Callable[..., Any] | list[Callable[..., Any]], *, as_positional: bool = False) -> None:
    """A function, or one of several by its name, whose arguments are flags; what does not fit is told as by `parse`."""
    with one_line_errors():
        auto_cli(program, as_positional=as_positional, parser_class=Parser, allow_abbrev=False)


def written_out(config_class: type, arguments: list[str]) -> list[str]:
    """The arguments, with `--guidance_scale` as `--sampling.guidance_scale` where the group `sampling` is `short`."""
    kinds, settings = get_type_hints(config_class), fields(config_class)
    groups = [setting.name for setting in settings if setting.metadata.get("short")]
    names = {inner.name: f"{group}.{inner.name}" for group in groups for inner in fields(kinds[group])}
    names |= {setting.name: setting.name for setting in settings}
    return [re.sub(r"(?<=^--)\w+", lambda name: names.get(name[0], name[0]), argument) for argument in arguments]


def quote_names(config_class: type, arguments: list[str]) -> list[str]:
    """The arguments, with each list of names as JSON: YAML takes 007, no, null and 1e3 for something else."""
    lists = [f"--{flag}" for flag in lists_of_names(config_class)]
    quoted, before = [], ""
    for argument in arguments:
        flag, equals, value = argument.partition("=") if argument.startswith("--") else (before, "", argument)
        before = "" if equals or not argument.startswith("--") else argument
        if flag in lists and value:
            names = None
            with suppress(yaml.YAMLError):
                names = yaml.load(value, yaml.BaseLoader)
            argument = f"{flag}=" * bool(equals) + json.dumps(names if isinstance(names, list) else [value])
        quoted.append(argument)
    return quoted


def lists_of_names(config_class: type, prefix: str = "") -> Iterator[str]:
    """Flags of settings that are lists of names, without their dashes."""
    for name, kind in get_type_hints(config_class).items():
        if is_dataclass(kind):
            yield from lists_of_names(cast(type, kind), f"{prefix}{name}.")
        elif name in NAMES and list[str] in (kind, *get_args(kind)):  # or unset
            yield f"{prefix}{name}"


def expand_home(config: Any) -> Any:
    """`~/` where no shell has expanded it: behind `=`, and in YAML."""
    if isinstance(config, str | Path):
        return type(config)(Path(config).expanduser()) if str(config).startswith("~/") else config
    if not is_dataclass(config) or isinstance(config, type):
        return config
    return replace(config, **{setting.name: expand_home(getattr(config, setting.name)) for setting in fields(config)})


@cache
def parser_of(config_class: type) -> ArgumentParser:
    """Building it takes longer than a hundred uses."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(config_class)
    return parser


def parse_mapping(config_class: type[T], values: dict[str, Any]) -> T:
    """The same from nested mappings, as YAML gives them; a ValueError names the key that does not fit."""
    if imports := values.get("imports"):
        load_imports(imports)
        parser_of.cache_clear()
    parser = parser_of(config_class)
    try:
        config = config_class(**vars(parser.instantiate(parser.parse_object(of_today(values)))))
    except ArgumentError as error:
        raise ValueError(f"{error}{suggestion(str(error), parser, dashes='')}") from error
    check_settings(config, prefix="")
    return config


def parse_run(config_class: type[R], arguments: list[str] | None = None) -> R:
    """The configuration of a training; `--resume RUN` starts from that run's own `config.yaml`, `--resume auto` means
    the folder of this name where it holds a whole checkpoint, and a fresh run elsewhere."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    config = parse(config_class, arguments)
    if config.resume == "auto":
        from machine.checkpoint_folder import newest_whole

        fresh = resuming(config, None)
        if newest_whole(fresh.folder / "checkpoints") is None:
            return fresh
        config, arguments = resuming(config, fresh.folder), [*arguments, "--resume", str(fresh.folder)]
    if config.resume is None:
        return config
    stored = Path(config.resume) / "config.yaml"
    if not stored.is_file():
        words = "give the folder of a training that has begun, or --resume auto with the first one's flags"
        raise FileNotFoundError(f"--resume {config.resume}: nothing to resume, {stored} does not exist; {words}")
    if not stored.read_text().strip():
        raise ValueError(f"--resume {config.resume}: {stored} is empty; put a copy of it back")
    flags = ["--config", str(stored)]
    with suppress(yaml.YAMLError, LookupError, TypeError):  # which reading it will tell
        length = yaml.safe_load(stored.read_text())["train"]
        if length.get("num_steps") and length.get("num_epochs"):  # older runs wrote both; the steps counted
            flags += ["--train.num_epochs", "null"]
    named_by = None if getattr(config, "imports", ()) else stored
    return parse(config_class, [*flags, *arguments], stored_in=named_by)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """What a user can get wrong ends in one line and exit status 2; `TRACEBACK=1` shows where it was raised."""
    children.end_with_launcher()
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        message = " ".join(str(error).split())
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        raise SystemExit(2) from None
