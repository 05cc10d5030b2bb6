"""Configuration to diffusion."""

from __future__ import annotations

from dataclasses import asdict
from importlib import import_module
from inspect import signature
from typing import Any

from diffusion import DIFFUSIONS, Diffusion
from experiment.config import DiffusionConfig

for study in ("cascade",):  # of this repository; they register themselves, as modules of users do
    import_module(f"studies.{study}")


def build_diffusion(config: DiffusionConfig) -> Diffusion:
    """The diffusion of a configuration.

    Raises:
        ValueError: for an unknown kind, a setting of another kind, or one that does not fit.
    """
    settings = diffusion_settings(config)
    return DIFFUSIONS[config.kind](**settings)


def diffusion_settings(config: DiffusionConfig) -> dict[str, Any]:
    """All that a diffusion of this kind can be told: what was given, and its defaults.

    Raises:
        ValueError: for an unknown kind, or a setting of another kind.
    """
    if config.kind not in DIFFUSIONS:
        raise ValueError(f"--diffusion.kind {config.kind}: unknown, choose from {', '.join(DIFFUSIONS)}")
    settings = {kind: signature(diffusion).parameters for kind, diffusion in DIFFUSIONS.items()}
    own = {name: parameter.default for name, parameter in settings[config.kind].items()}
    given = {name: value for name, value in asdict(config).items() if name != "kind" and value is not None}
    for name in given.keys() - own.keys():
        owners = " and ".join(kind for kind, names in settings.items() if name in names)
        raise ValueError(f"--diffusion.{name} belongs to kind {owners}, not to {config.kind}; leave it out or null")
    return own | given
