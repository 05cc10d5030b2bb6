"""Configuration to diffusion."""

from dataclasses import asdict
from typing import Any

from diffusion.diffusion import Diffusion
from diffusion.presets import DIFFUSIONS
from experiment.config import DiffusionConfig
from experiment.open_section import settings_of


def build_diffusion(config: DiffusionConfig) -> Diffusion:
    """The diffusion of a configuration; a ValueError names the setting that does not fit."""
    settings = diffusion_settings(config)
    return DIFFUSIONS[config.kind](**settings)


def diffusion_settings(config: DiffusionConfig) -> dict[str, Any]:
    """All that a diffusion of this kind can be told: what the configuration says, and the kind's defaults."""
    if config.kind not in DIFFUSIONS:
        raise ValueError(f"--diffusion.kind {config.kind}: unknown, choose from {', '.join(DIFFUSIONS)}")
    settings = {kind: settings_of(preset) for kind, preset in DIFFUSIONS.items()}
    defaults = {name: parameter.default for name, parameter in settings[config.kind].items()}
    asked = {name: value for name, value in asdict(config).items() if name != "kind" and value is not None}
    for name in asked.keys() - defaults.keys():
        owners = " and ".join(kind for kind, names in settings.items() if name in names)
        raise ValueError(f"--diffusion.{name} belongs to kind {owners}, not to {config.kind}; leave it out or null")
    return defaults | asked
