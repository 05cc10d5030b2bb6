"""Sampling settings, completed and validated for a model before the first step, and the guide model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from checkpoints.checkpoint import open_checkpoint
from data.latents import abbreviate
from diffusion import Diffusion
from diffusion.samplers import Staged, check_options, num_steps_for
from experiment.build import defining_settings
from experiment.config import DiffusionConfig, ExperimentConfig, SamplingConfig
from machine.atomic_files import sha256_of
from models import ModelSpec

DEFAULT_GUIDANCE = ExperimentConfig().sampling.guidance_scale  # of trainings


def resolve_sampling(
    config: SamplingConfig,
    diffusion: Diffusion,
    num_guided: int,
    num_channels: int | None = None,
    *,
    say: Callable[[str], None] = lambda message: None,
    **overrides: Any,
) -> SamplingConfig:
    """Apply overrides and the diffusion's default sampler, number of steps and spacing, and validate the result.

    The guidance scale becomes 1, unless it is overridden, if the model cannot be guided or has learned one scale.

    Args:
        config: settings of the model's training
        num_guided: number of classes that the model can be guided by; 0 without a null label
        num_channels: of the latents, if known
        say: prints a note when a guidance scale is dropped, or applied to a model that has learned one
        overrides: settings of the command

    Raises:
        ValueError: names the setting that is invalid and the remedy
    """
    names = [setting.name for setting in fields(config)]
    for name in overrides.keys() - names:
        raise ValueError(f"--sampling.{name}: unknown, choose from {', '.join(names)}")
    config = replace(config, **_implied_overrides(config, overrides, diffusion, num_guided, say) | overrides)
    if config.guidance_unlabelled and config.guidance_checkpoint is None:
        raise ValueError(
            "--sampling.guidance_unlabelled true has no effect without --sampling.guidance_checkpoint: add that"
        )
    sampler, spacing = config.sampler or diffusion.default_sampler, config.spacing or diffusion.default_spacing
    config = replace(config, sampler=sampler, spacing=spacing)
    check_options(config, diffusion, has_guide=config.guidance_checkpoint is not None)
    if not num_guided and config.guidance_scale != 1.0 and config.guidance_checkpoint is None:
        raise ValueError(
            f"--sampling.guidance_scale {config.guidance_scale}: the model is unconditional, or was trained with "
            "--train.label_dropout 0, and has no null label to be guided away from; leave it at 1"
        )
    if num_channels is not None and (config.legacy_cfg_channels or 1) > num_channels:
        raise ValueError(f"--sampling.legacy_cfg_channels {config.legacy_cfg_channels}: there are {num_channels}")
    num_steps = num_steps_for(config, diffusion)
    diffusion.reverse_steps(num_steps, config.spacing)  # raises if they are invalid
    return replace(config, num_steps=num_steps)


def _implied_overrides(
    config: SamplingConfig,
    overrides: Mapping[str, Any],
    diffusion: Diffusion,
    num_guided: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Defaults for settings that the overrides make invalid, as they belong to a replaced sampler or guide, or that
    have no meaning for the model. `say` is called if a guidance scale is dropped."""
    configured = config.sampler or diffusion.default_sampler
    sampler = overrides.get("sampler", config.sampler) or diffusion.default_sampler
    guide = overrides.get("guidance_checkpoint", config.guidance_checkpoint)
    implied: dict[str, Any] = {} if sampler == configured else {"sampler_args": {}}
    if guide is not None:
        if overrides.get("guidance_checkpoint") and "guidance_scale" not in overrides and config.guidance_scale == 1:
            remedy = "give --sampling.guidance_scale too; at 1 it has no effect"
            raise ValueError(f"--sampling.guidance_checkpoint {guide}: {remedy}")
        return implied
    if config.guidance_checkpoint:
        implied["guidance_unlabelled"] = False
    if num_guided and (not diffusion.samples_are_guided(sampler) or diffusion.takes_guidance(sampler)):
        return implied
    reason = f"{sampler} is only guided if a command asks for it"
    if not num_guided:
        reason = "it has no null label to be guided away from"
    elif diffusion.guidance_settings:
        reason, scale = "guidance is part of its training", overrides.get("guidance_scale", 1.0)
        if scale != 1:
            say(f"--sampling.guidance_scale {scale:g}: beyond the guidance that is part of the model's training")
        elif overrides.get("guidance_interval"):
            say("--sampling.guidance_interval: without effect, guidance is part of the model's training")
    if "guidance_scale" not in overrides and config.guidance_scale not in (1.0, DEFAULT_GUIDANCE):
        say(f"--sampling.guidance_scale {config.guidance_scale:g} of the model's training: without effect, {reason}")
    return implied | {"guidance_scale": 1.0}


def files_in_record(sampling: SamplingConfig) -> dict[str, str | None]:
    """Hash the files that sampling settings name, for records: the guide's weights and a file of noise levels."""
    hashes, spacing = {}, Path(sampling.spacing or "")
    if sampling.guidance_checkpoint is not None:
        hashes["guide_sha256"] = open_checkpoint(sampling.guidance_checkpoint).weights_sha256
    return hashes | ({"spacing_sha256": sha256_of(spacing)} if spacing.is_file() else {})


def load_guide_model(
    sampling: SamplingConfig,
    diffusion: DiffusionConfig,
    spec: ModelSpec,
    accelerator: Accelerator,
    classes: Sequence[str],
    identity: Mapping[str, Mapping[str, Any]],
) -> nn.Module | None:
    """Load the EMA weights of `guidance_checkpoint`, if set: the worse model of autoguidance (Karras et al. 2024)
    or, without labels, of Domain Guidance (Zhong et al. 2025).

    The other arguments describe the guided model. Raises ValueError if the guide differs from it in more than backbone
    and training; in Domain Guidance the classes may differ too.
    """
    if sampling.guidance_checkpoint is None:
        return None
    guide, unlabelled = open_checkpoint(sampling.guidance_checkpoint, accelerator), sampling.guidance_unlabelled
    if unlabelled and isinstance(guide.build_diffusion(), Staged):
        raise ValueError("--guidance_unlabelled true: stages of a cascade are not asked without labels; leave it out")
    if unlabelled and guide.classes and not guide.num_guided:
        raise ValueError(
            f"--guidance_unlabelled true: {sampling.guidance_checkpoint} knows no null label; leave it out"
        )
    compare_codecs = "codec" in identity and "codec" in guide.identity

    def comparable(diffusion: DiffusionConfig, spec: ModelSpec, classes: Sequence[str], identity: Any) -> dict:
        values = defining_settings(diffusion)
        values |= {name: getattr(spec, name) for name in ("input_size", "in_channels", "out_channels")}
        if not unlabelled:
            values |= {"num_classes": spec.num_classes, "classes": abbreviate(list(classes))}
        if compare_codecs:
            values["latents"] = abbreviate({name: identity["codec"].get(name) for name in ("sha256", "scale", "shift")})
        return values

    of_model = comparable(diffusion, spec, classes, identity)
    of_guide = comparable(guide.config.diffusion, guide.spec, guide.classes, guide.identity)
    for name in of_model:
        if of_guide.get(name) != of_model[name]:
            raise ValueError(
                f"--guidance_checkpoint {sampling.guidance_checkpoint}: its {name} is {of_guide.get(name)}, the guided "
                f"model's {of_model[name]}; only backbone and training may differ"
                f"{', and classes with --guidance_unlabelled true' if 'classes' in name else ''}"
            )
    model = guide.load_model(accelerator.device)
    return Unlabelled(model, guide.spec.num_classes) if unlabelled else model


class Unlabelled(nn.Module):
    """Wrapper that replaces all labels by the null label."""

    def __init__(self, model: nn.Module, null_label: int) -> None:
        super().__init__()
        self.model, self.null_label = model, null_label

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, **extras: Any) -> Tensor:
        return self.model(x_t, t, torch.full_like(y, self.null_label), **extras)
