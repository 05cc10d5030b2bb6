"""Configuration to backbone."""

from collections.abc import Mapping
from importlib import import_module
from inspect import signature
from typing import Any

from autoencoders.codec import Codec
from diffusion import Diffusion
from experiment.config import ExperimentConfig
from models import BACKBONES, ModelSpec

import_module("studies.cascade.three_stages")  # registers its backbone, as a module of a user's would


def model_spec(config: ExperimentConfig, codec: Codec, diffusion: Diffusion, num_classes: int) -> ModelSpec:
    """The backbone that fits codec, diffusion and data; one without the parts that the diffusion trains is refused."""
    parts: Mapping[str, Any] = getattr(diffusion, "model_args", {})  # of a backbone that is trained part by part
    fitting = [
        name for name, (backbone, _) in BACKBONES.items() if parts.keys() <= signature(backbone).parameters.keys()
    ]
    if config.model in BACKBONES and config.model not in fitting:
        raise ValueError(f"--model {config.model}: kind {config.diffusion.kind} takes --model {', '.join(fitting)}")
    channels, height, width = codec.latent_shape(config.data.image_size, config.data.image_size)
    return ModelSpec(
        name=config.model,
        args={**parts, **config.model_args},
        input_size=(height, width),
        in_channels=channels,
        out_channels=diffusion.output_channels(channels),
        num_classes=num_classes,
    )
