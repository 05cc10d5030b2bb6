"""What a sampler is told: completed by what the model is, and checked before the first step."""

from dataclasses import fields, replace
from typing import Any

from diffusion import Diffusion
from diffusion.samplers import check_options
from experiment.config import SamplingConfig


def resolve_sampling(
    config: SamplingConfig, diffusion: Diffusion, num_guided: int, num_channels: int | None = None, **overrides: Any
) -> SamplingConfig:
    """The configuration with `overrides` in place of its own settings, unguided where it has no classes to guide by and
    none ask for it, and with the diffusion's own sampler and spacing where it names none; a ValueError names what does
    not fit."""
    names = [setting.name for setting in fields(config)]
    for name in overrides.keys() - names:
        raise ValueError(f"--sampling.{name}: unknown, choose from {', '.join(names)}")
    defaults: dict[str, Any] = {}
    if overrides.get("sampler", config.sampler) != config.sampler:
        defaults["sampler_args"] = {}  # which are those of the sampler that is replaced
    if not num_guided:
        defaults["guidance_scale"] = 1.0
    config = replace(config, **defaults | overrides)
    sampler, spacing = config.sampler or diffusion.default_sampler, config.spacing or diffusion.default_spacing
    config = replace(config, sampler=sampler, spacing=spacing)
    check_options(config, diffusion)
    if not num_guided and config.guidance_scale != 1.0:
        raise ValueError(
            f"--sampling.guidance_scale {config.guidance_scale}: the model is unconditional, or was trained with "
            "--train.label_dropout 0, and has no null label to be guided away from; leave it at 1"
        )
    if num_channels is not None and (config.legacy_cfg_channels or 1) > num_channels:
        raise ValueError(f"--sampling.legacy_cfg_channels {config.legacy_cfg_channels}: there are {num_channels}")
    diffusion.reverse_steps(config.num_steps, config.spacing)
    return config
