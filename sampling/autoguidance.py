"""The worse model of autoguidance (Karras et al. 2024): a checkpoint of the same diffusion and data."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from checkpoints.checkpoint import open_checkpoint
from data.latents import short
from experiment.config import DiffusionConfig, SamplingConfig
from experiment.diffusions import diffusion_settings
from models import ModelSpec

OF_TRAINING = {
    "loss",
    "weighting",
    "times",
    "shift",
    "P_mean",
    "P_std",
    "phases",
    "forcing",
}  # these do not change what an output means


def load_guide_model(
    sampling: SamplingConfig,
    diffusion: DiffusionConfig,
    spec: ModelSpec,
    device: torch.device,
    classes: Sequence[str],
    identity: Mapping[str, Mapping[str, Any]],
) -> nn.Module | None:
    """The averaged model of `guidance_checkpoint`, if there is one: it may differ in backbone and training alone, so
    that its labels and latents mean what the guided model's do, whose `classes` and `identity` (see
    `experiment.checkpoint`) these are.

    Raises:
        ValueError: when there is no such checkpoint, or its outputs do not mean what the guided model's do.
    """
    if sampling.guidance_checkpoint is None:
        return None
    other = open_checkpoint(sampling.guidance_checkpoint)
    names = ("input_size", "in_channels", "out_channels", "num_classes")
    ours = {"kind": diffusion.kind, **diffusion_settings(diffusion)} | {name: getattr(spec, name) for name in names}
    theirs = {"kind": other.config.diffusion.kind, **diffusion_settings(other.config.diffusion)}
    theirs |= {name: getattr(other.spec, name) for name in names}
    ours["classes"], theirs["classes"] = short(list(classes)), short(other.classes)
    if "codec" in identity and "codec" in other.identity:
        ours["latents"], theirs["latents"] = (
            short({name: each["codec"].get(name) for name in ("sha256", "scale", "shift")})
            for each in (identity, other.identity)
        )
    for name in ours:
        if name not in OF_TRAINING and theirs.get(name) != ours[name]:
            raise ValueError(
                f"--guidance_checkpoint {sampling.guidance_checkpoint}: its {name} is {theirs.get(name)}, the guided "
                f"model's {ours[name]}; only backbone and training may differ"
            )
    return other.load_model(device)
