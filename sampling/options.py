"""What a sampler is told: completed by what the model is, and checked before the first step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any

from diffusion import Diffusion, Guidance
from diffusion.samplers import samplers_of
from experiment.config import SamplingConfig
from experiment.settings import check_settings


def sampling_of(
    config: SamplingConfig, num_classes: int, asked: Mapping[str, Any] = MappingProxyType({}), **flags: object
) -> SamplingConfig:
    """The configuration, unguided where no classes can be (`guided_classes`), with what was asked in its place: by
    `--sampling.NAME`, where null is an answer, or by a flag of its own, where it is none.

    Raises:
        ValueError: for a name that it does not have, or that was asked for twice.
    """
    own = config if num_classes or config.guidance_checkpoint else replace(config, guidance_scale=1.0)
    flags = {name: value for name, value in flags.items() if value is not None}
    known = {each.name: each.default for each in fields(config)}
    for name in (asked.keys() | flags.keys()) - known.keys():
        raise ValueError(f"--sampling.{name}: unknown, choose from {', '.join(known)}")
    for name in flags.keys() & asked.keys():
        raise ValueError(f"--{name} {flags[name]} beside --sampling.{name} {asked[name]}: leave one out")
    for name, value in asked.items():
        if value is None and known[name] is not None:
            raise ValueError(f"--sampling.{name} null: give a value, or leave it out")
    return replace(own, **asked, **flags)


def check_sampling(
    config: SamplingConfig, diffusion: Diffusion, num_classes: int, num_channels: int | None = None
) -> SamplingConfig:
    """The configuration, with the diffusion's own sampler and spacing where it names none, if the model can follow it.

    Raises:
        ValueError: for an unknown name, a number out of its range or of another sampler, more steps than the diffusion
            has, or guidance without classes.
    """
    check_settings(config, "--sampling.")
    config = replace(
        config,
        sampler=config.sampler or diffusion.default_sampler,
        spacing=config.spacing or diffusion.default_spacing,
    )
    if config.sampler not in samplers_of(diffusion):
        known = ", ".join(samplers_of(diffusion))
        raise ValueError(f"--sampling.sampler {config.sampler}: unknown, choose from {known}")
    if num_classes == 0 and config.guidance_scale != 1.0 and config.guidance_checkpoint is None:
        raise ValueError(
            f"--guidance_scale {config.guidance_scale}: the model is unconditional, or was trained with "
            "--train.label_dropout 0, and has no null label to be guided away from; leave it at 1"
        )
    if num_channels is not None and (config.legacy_cfg_channels or 1) > num_channels:
        raise ValueError(f"--sampling.legacy_cfg_channels {config.legacy_cfg_channels}: there are {num_channels}")
    for name, sampler in {"eta": "ddim", "churn": "heun"}.items():
        if getattr(config, name) and config.sampler != sampler:
            raise ValueError(f"--{name} {getattr(config, name)}: {sampler} alone uses it, not {config.sampler}; give 0")
    build_guidance(config)
    diffusion.reverse_steps(config.num_steps, config.spacing)
    return config


def build_guidance(config: SamplingConfig) -> Guidance:
    """How guidance is applied.

    Raises:
        ValueError: for a number out of its range.
    """
    if config.guidance_interval is not None and len(config.guidance_interval) != 2:
        raise ValueError(f"--guidance_interval {config.guidance_interval}: give two noise levels, such as [0.2, 5]")
    low, high = config.guidance_interval or (0.0, math.inf)
    return Guidance(
        interval=(float(low), float(high)),
        schedule=config.guidance_schedule,
        rescale=config.guidance_rescale,
        parallel=config.guidance_parallel,
        radius=config.guidance_radius,
        momentum=config.guidance_momentum,
    )
