"""Command lines: flags and YAML files become a configuration, and errors become one line. No other package imports
jsonargparse."""

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
from textwrap import dedent
from typing import Any, NoReturn, TypeVar, cast, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, auto_cli, auto_parser, set_loader, set_parsing_settings

from experiment.imports import load_imports
from experiment.inputs import check_inputs
from experiment.mappings import NAMES, StrictLoader, upgrade
from experiment.run_config import R, with_resume
from machine import children
from machine.streams import tolerant_streams
from settings import check_settings

set_parsing_settings(add_print_completion_argument=True)  # completion in shells, and a schema for YAML editors

T = TypeVar("T")

# Programs are usually run through `python` or a launcher, so complete for the first known program among the words.
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

# jsonargparse's error for an optional value, from which the first reason is kept
UNION = r"Does not .* Union subtypes .* Errors: - (.*?)(?: - Expected (?:a )?NoneType)? Given value.*?Given value: "


# What DiT, SiT, EDM2 and diffusers call settings, and their names here.
ELSEWHERE = {
    **dict.fromkeys(("ckpt", "network", "model_path", "pretrained"), ("checkpoint", "init_from")),
    **dict.fromkeys(("cfg", "cfg_scale", "guidance"), ("guidance_scale",)),
    **dict.fromkeys(("steps", "num_sampling_steps", "num_inference_steps", "max_train_steps"), ("num_steps",)),
    **dict.fromkeys(("samples", "num_samples", "num_images", "num_fid_samples"), ("num_per_class", "num_samples")),
    **dict.fromkeys(("data_path", "data_dir", "train_data_dir"), ("data.path",)),
    **dict.fromkeys(("results_dir", "outdir", "output_dir"), ("name", "output")),
    **dict.fromkeys(("fp16", "bf16", "mixed_precision", "amp"), ("precision",)),
    **dict.fromkeys(("wandb", "report_to"), ("trackers",)),
    "ckpt_every": ("checkpoint_every",),
    "global_batch_size": ("batch_size",),
    "global_seed": ("seed",),
    "gradient_accumulation_steps": ("grad_accumulation",),
    "gradient_checkpointing": ("recompute",),
    "epochs": ("num_epochs",),
    "learning_rate": ("lr",),
    "ref": ("reference",),
    "resume_from_checkpoint": ("resume",),
    "vae": ("autoencoder",),
}


def suggest_flag(message: str, parser: ArgumentParser, dashes: str = "--") -> str:
    """If an error names an unknown setting, suggest those of the parser that mean the same or look alike."""
    match = re.search(r"unrecognized arguments: --([\w.-]+)|ption '([\w.]+)'", message)
    if match is None:
        return ""
    flags = [flag.removeprefix("--") for flag in parser._option_string_actions]
    unknown = (match[1] or match[2]).replace("-", "_")
    last, first = unknown.rpartition(".")[2], unknown.partition(".")[0]
    same = [flag for name in ELSEWHERE.get(last, ()) for flag in flags if f".{flag}".endswith(f".{name}")]
    nearest = (
        [flag for flag in same if first in (unknown, flag.partition(".")[0])]
        or difflib.get_close_matches(unknown, flags, 1)
        or [flag for flag in flags if difflib.get_close_matches(last, [flag.rpartition(".")[2]])]
        or difflib.get_close_matches(first, [flag.partition(".")[0] for flag in flags], 1)
    )
    return f"; did you mean {' or '.join(dashes + flag for flag in nearest[:2])}?" if nearest else ""


class Parser(ArgumentParser):
    """An argument parser that reports an error in two lines with the nearest flag, instead of printing the usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = re.sub(r'Parser key "([^"]+)":', r"--\1:", " ".join(message.split()))
        message = re.sub(r"<class '([\w.]+)'>|typing\.", r"\1", message)
        message = re.sub(UNION, r"\1; given ", message).replace("Expected a int", "Expected an int")
        message += suggest_flag(message, self)
        print(f"{self.prog}: error: {message[:1000]}\n{self.prog} --help lists all settings", file=sys.stderr)
        raise SystemExit(2) from None

    def format_help(self) -> str:
        """Add the commands that the program's docstring shows, at the end, where a terminal leaves off."""
        paragraphs = map(dedent, (sys.modules["__main__"].__doc__ or "").split("\n\n"))
        examples = [each.strip() for each in paragraphs if re.search("^python ", each, re.MULTILINE)]
        return super().format_help() + (f"\nexamples:\n{examples[0]}\n" if examples else "")

    def get_completion_script(self, completion_type: str, **kwargs: Any) -> str:
        script = super().get_completion_script(completion_type, **kwargs)
        build_parser.cache_clear()  # jsonargparse makes this parser unusable
        return script + BEHIND_LAUNCHERS if completion_type == "shtab-bash" else script


set_loader("yaml", lambda text: upgrade(yaml.load(text, StrictLoader)), exceptions=(yaml.YAMLError,))


def parse(
    config_class: type[T], arguments: list[str] | None = None, *, stored_in: Path | None = None, first: str = ""
) -> T:
    """Parse flags and `--config FILE.yaml` into a frozen dataclass; invalid ones end the program with a message.

    Args:
        arguments: the command line's by default
        stored_in: the run that names the `imports`; None if the user does
        first: flag whose value may come first, without the flag
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if first and arguments and not arguments[0].startswith("-"):
        arguments = [f"--{first}", *arguments]
    arguments = quote_names(config_class, expand_short_flags(config_class, arguments))
    load_imports(find_imports(arguments), stored_in=stored_in)  # first, as they may register settings
    parser = build_parser(*constructors(config_class))
    parser.prog = Path(sys.argv[0]).name
    values = vars(parser.instantiate(parser.parse_args(arguments)))
    values.pop("config", None)
    config = config_class(**values)
    check_settings(config)
    return expand_home(config)


def find_imports(arguments: list[str]) -> list[str]:
    """Find the value of `imports` in flags (after `quote_names`) or in a file of `--config`, before parsing."""
    names: list[str] = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        flag, has_value, value = argument.partition("=")
        value = value if has_value else following
        with suppress(OSError, ValueError, AttributeError, yaml.YAMLError):  # the parser will report these
            if flag == "--config":
                names = yaml.load(Path(value).expanduser().read_text(), yaml.BaseLoader).get("imports", names)
            elif flag == "--imports":
                names = json.loads(value)
    return [str(name) for name in names] if isinstance(names, list) else []


def run_main(
    main: Callable[[T], int | None], config_class: type[T], *, read: Callable[..., T] | None = None, **options: Any
) -> None:
    """Run a program: read its configuration (by default with `parse`, which receives the options), check that what it
    names exists, and exit with the status that `main` returns, if it does."""
    with one_line_errors():
        config = (read or parse)(config_class, **options)
        check_inputs(config)
        if status := main(config):
            raise SystemExit(status)


def run_program(program: Callable[..., Any] | list[Callable[..., Any]]) -> None:
    """Run a function with its arguments as flags, or the one of several that is named; errors as by `parse`."""
    with one_line_errors():
        auto_cli(program, as_positional=False, parser_class=Parser, allow_abbrev=False)


def expand_short_flags(config_class: type, arguments: list[str]) -> list[str]:
    """Replace flags such as `--guidance_scale` by `--sampling.guidance_scale`, for groups with the metadata `short`."""
    hints, settings = get_type_hints(config_class), fields(config_class)
    groups = [setting.name for setting in settings if setting.metadata.get("short")]
    full_name = {inner.name: f"{group}.{inner.name}" for group in groups for inner in fields(hints[group])}
    full_name |= {setting.name: setting.name for setting in settings}
    return [re.sub(r"(?<=^--)\w+", lambda name: full_name.get(name[0], name[0]), argument) for argument in arguments]


def quote_names(config_class: type, arguments: list[str]) -> list[str]:
    """Write each list of names as JSON, because YAML would not read 007, no, null and 1e3 as text."""
    list_flags = [f"--{flag}" for flag in lists_of_names(config_class)]
    quoted, previous = [], ""
    for argument in arguments:
        flag, equals, value = argument.partition("=") if argument.startswith("--") else (previous, "", argument)
        previous = "" if equals or not argument.startswith("--") else argument
        if flag in list_flags and value:
            names = None
            with suppress(yaml.YAMLError):
                names = yaml.load(value, yaml.BaseLoader)
            argument = f"{flag}=" * bool(equals) + json.dumps(names if isinstance(names, list) else [value])
        quoted.append(argument)
    return quoted


def lists_of_names(config_class: type, prefix: str = "") -> Iterator[str]:
    """Yield the flags, without dashes, of settings that are lists of names."""
    for name, hint in get_type_hints(config_class).items():
        if is_dataclass(hint):
            yield from lists_of_names(cast(type, hint), f"{prefix}{name}.")
        elif name in NAMES and list[str] in (hint, *get_args(hint)):  # also if optional
            yield f"{prefix}{name}"


def expand_home(config: Any) -> Any:
    """Expand `~/` in paths, which shells leave after `=` and in YAML."""
    if isinstance(config, str | Path):
        return type(config)(Path(config).expanduser()) if str(config).startswith("~/") else config
    if not is_dataclass(config) or isinstance(config, type):
        return config
    return replace(config, **{setting.name: expand_home(getattr(config, setting.name)) for setting in fields(config)})


def constructors(config_class: type) -> Iterator[Any]:
    """Yield a class, and the constructors of it and of its sections, which `--imports` may replace."""
    yield from (config_class, cast(Any, config_class).__init__)
    for kind in filter(is_dataclass, get_type_hints(config_class).values()):
        yield from constructors(cast(type, kind))


@cache
def build_parser(config_class: type, *made_by: Any) -> ArgumentParser:
    """Build the parser for `parse`, cached because this takes longer than its uses."""
    options: dict[str, Any] = {"as_positional": False, "return_instance": True, "parser_class": Parser}
    options |= {"version": version("latent-diffusion-backbones"), "usage": "%(prog)s [settings]", "allow_abbrev": False}
    return auto_parser(config_class, **options)


@cache
def build_mapping_parser(config_class: type, *made_by: Any) -> ArgumentParser:
    """Build the parser for `parse_mapping`, cached because this takes longer than a hundred uses of it."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(config_class)
    return parser


def parse_mapping(config_class: type[T], values: dict[str, Any]) -> T:
    """Like `parse`, from nested mappings as read from YAML. Raises a ValueError that names an invalid key."""
    if imports := values.get("imports"):
        load_imports(imports)
    parser = build_mapping_parser(*constructors(config_class))
    try:
        config = config_class(**vars(parser.instantiate(parser.parse_object(upgrade(values)))))
    except ArgumentError as error:
        raise ValueError(f"{error}{suggest_flag(str(error), parser, dashes='')}") from error
    check_settings(config, prefix="")
    return config


def parse_run(config_class: type[R], arguments: list[str] | None = None) -> R:
    """Parse the configuration of a training.

    With `--resume RUN` that run's `config.yaml` provides the defaults. `--resume auto` resumes the run of this name if
    its folder has an intact checkpoint, and starts it afresh otherwise.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    config = parse(config_class, arguments)
    if config.resume == "auto":
        from machine.checkpoint_folder import newest_intact

        fresh = with_resume(config, None)
        if newest_intact(fresh.folder / "checkpoints") is None:
            return fresh
        config, arguments = with_resume(config, fresh.folder), [*arguments, "--resume", str(fresh.folder)]
    if config.resume is None:
        return config
    stored = Path(config.resume) / "config.yaml"
    if not stored.is_file():
        remedy = "give the folder of a training that has begun, or --resume auto with the first one's flags"
        raise FileNotFoundError(f"--resume {config.resume}: nothing to resume, {stored} does not exist; {remedy}")
    if not stored.read_text().strip():
        raise ValueError(f"--resume {config.resume}: {stored} is empty; put a copy of it back")
    flags = ["--config", str(stored)]
    with suppress(yaml.YAMLError, LookupError, TypeError):  # the parser will report these
        train = yaml.safe_load(stored.read_text())["train"]
        if train.get("num_steps") and train.get("num_epochs"):  # older runs wrote both; the steps applied
            flags += ["--train.num_epochs", "null"]
    stored_in = None if getattr(config, "imports", ()) else stored
    return parse(config_class, [*flags, *arguments], stored_in=stored_in)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Context in which a ValueError or an OSError ends the program with a one-line message and exit status 2. With
    `TRACEBACK=1` in the environment it is raised. What cannot be printed is no error."""
    children.end_with_launcher()
    with tolerant_streams():
        try:
            yield
        except (ValueError, OSError) as error:
            if os.environ.get("TRACEBACK"):
                raise
            message = " ".join(str(error).split())
            print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
            raise SystemExit(2) from None
