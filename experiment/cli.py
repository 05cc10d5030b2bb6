"""Command lines: the only importer of jsonargparse among the packages, and the one way errors reach a user."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from jsonargparse import ArgumentError, ArgumentParser, auto_cli, get_loader, set_loader, set_parsing_settings

from experiment import children
from experiment.config import R, resuming
from experiment.strict_yaml import StrictLoader

set_parsing_settings(add_print_completion_argument=True)  # tab completion for shells, a schema for editors of YAML

T = TypeVar("T")
load_yaml = get_loader("yaml")


def load_strict_yaml(text: str) -> Any:
    """As jsonargparse reads it, once it is known to be no bomb and to say each thing once."""
    yaml.load(text, StrictLoader)
    return load_yaml(text)


set_loader("yaml", load_strict_yaml, exceptions=(yaml.YAMLError,))


def parse(config_class: type[T], arguments: list[str] | None = None) -> T:
    """Flags and `--config FILE.yaml` into a frozen dataclass; unknown keys are refused.

    Raises:
        SystemExit: with a message that names the flag, when an argument does not fit.
    """
    number = version("latent-diffusion-backbones")
    return cast(T, auto_cli(config_class, args=arguments, as_positional=False, return_instance=True, version=number))


def parse_mapping(config_class: type[T], values: dict[str, Any]) -> T:
    """The same from nested mappings, as YAML gives them.

    Raises:
        ValueError: that names the key, when one is unknown or its value does not fit.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(config_class)
    try:
        found = parser.instantiate(parser.parse_object(values))
    except ArgumentError as error:
        raise ValueError(str(error)) from error
    return config_class(**vars(found))


def parse_run(config_class: type[R], arguments: list[str] | None = None) -> R:
    """The configuration of a training; `--resume RUN` starts from that run's own `config.yaml`.

    `--resume auto` means the folder of this name where it holds a whole checkpoint, and a fresh run elsewhere.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    config = parse(config_class, arguments)
    if config.resume == "auto":
        from experiment.checkpoint_folder import newest_whole

        fresh = resuming(config, None)
        if newest_whole(fresh.folder / "checkpoints") is None:
            return fresh
        config, arguments = resuming(config, fresh.folder), [*arguments, "--resume", str(fresh.folder)]
    if config.resume is None:
        return config
    stored = Path(config.resume) / "config.yaml"
    if not stored.is_file():
        raise FileNotFoundError(f"--resume {config.resume}: nothing to resume, {stored} does not exist")
    return parse(config_class, ["--config", str(stored), *arguments])


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
