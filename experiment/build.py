"""Configuration to objects: diffusion, images, their latents, and the backbone that fits all of these."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator

from autoencoders.codec import Codec
from data import open_dataset
from data.augmentation import NUM_CHANGES
from data.encoding import build_cache
from data.latents import LatentCache, cache_name, num_bytes
from diffusion.diffusion import Diffusion
from diffusion.presets import DIFFUSIONS
from experiment.config import DataConfig, DataFlags, DiffusionConfig, ExperimentConfig
from experiment.open_section import settings_of
from machine.accelerator import from_main, num_processes_here
from machine.memory import free_memory
from machine.threads import allowed_cores
from models import BACKBONES, ModelSpec
from settings import check_name, set_values

if TYPE_CHECKING:
    from metrics.feature_maps import FeatureMaps

import_module("studies.cascade.three_stages")  # registers its backbone, as a module of a user's would


def build_diffusion(config: DiffusionConfig) -> Diffusion:
    """The diffusion of a configuration; a ValueError names the setting that does not fit."""
    settings = diffusion_settings(config)  # first: it refuses a kind that there is not
    return DIFFUSIONS[config.kind](**settings)


def diffusion_settings(config: DiffusionConfig) -> dict[str, Any]:
    """All that a diffusion of this kind can be told: what the configuration says, and the kind's defaults."""
    check_name("--diffusion.kind", config.kind, DIFFUSIONS)
    settings = {kind: settings_of(preset) for kind, preset in DIFFUSIONS.items()}
    defaults = {name: parameter.default for name, parameter in settings[config.kind].items()}
    asked = {name: value for name, value in asdict(config).items() if name != "kind" and value is not None}
    for name in asked.keys() - defaults.keys():
        owners = " and ".join(kind for kind, names in settings.items() if name in names)
        raise ValueError(f"--diffusion.{name} belongs to kind {owners}, not to {config.kind}; leave it out or null")
    return defaults | asked


OF_TRAINING = {"loss", "weighting", "times", "times_args", "shift", "contrast", "P_mean", "P_std", "phases", "forcing"}
OF_TRAINING |= {"interval_share", "adaptive_power", "tangent"}
"""Settings of a diffusion that mean no other output."""


def meaning_of(config: DiffusionConfig) -> dict[str, Any]:
    """What the output of a model of this diffusion depends on."""
    settings = {"kind": config.kind, **diffusion_settings(config)}
    return {name: value for name, value in settings.items() if name not in OF_TRAINING}


def data_of(trained_on: DataConfig | None, asked: DataFlags) -> DataConfig:
    """A checkpoint's images, where they lie now: `path`, `cache` and `on_error` may change, and nothing else. Without
    one those that are asked for."""
    changed = set_values(asked)
    if trained_on is None:
        return DataConfig(**changed)
    for name, value in changed.items():
        trained = getattr(trained_on, name)
        if name not in ("path", "cache", "on_error") and value != trained:
            raise ValueError(f"--data.{name} {value}: the checkpoint's images have {trained}; leave it out")
    return replace(trained_on, **changed)


def open_split(config: DataConfig, split: str, accelerator: Accelerator | None = None) -> Any:
    """The training or test split of the configured images; with an accelerator its main process looks for all."""
    settings = {name: value for name, value in vars(config).items() if name not in ("path", "cache", "flip")}
    look = partial(open_dataset, config.path, split=split, **settings)
    return from_main(accelerator, look) if accelerator else look()


def open_cache(
    config: DataConfig, codec: Codec | FeatureMaps, dataset, accelerator: Accelerator, *, flips: bool
) -> LatentCache:
    """The encoded images, or features of them, from the cache folder or, on first use, made there by all processes.
    They lie on the device where they take less than a quarter of what is free there, else they stay in their files."""
    expected = {**codec.identity, **dataset.describe(), "flips": flips}
    folder, device = Path(config.cache) / cache_name(expected), accelerator.device
    num_sharing = num_processes_here(accelerator)
    if from_main(accelerator, lambda: not (folder / "manifest.json").exists()):
        build_cache(
            folder,
            dataset,
            codec.prepare,
            codec.provenance,
            flips=flips,
            device=device,
            num_threads=min(max(1, len(allowed_cores()) // num_sharing), 16),  # each has a batch in memory
            rank=accelerator.process_index,
            num_ranks=accelerator.num_processes,
            wait=accelerator.wait_for_everyone,
        )
        accelerator.wait_for_everyone()
    fits = from_main(accelerator, lambda: num_bytes(folder) < free_memory(device, num_sharing) / 4)
    with accelerator.local_main_process_first():  # files are checked once a machine
        return LatentCache(folder, expected, device if fits else None)


def model_spec(config: ExperimentConfig, codec: Codec, diffusion: Diffusion, num_classes: int) -> ModelSpec:
    """The backbone that fits codec, diffusion and data; one without the parts that the diffusion trains is refused."""
    parts: dict[str, Any] = dict(getattr(diffusion, "model_args", {}))  # of a backbone that is trained part by part
    asks = f"kind {config.diffusion.kind}"
    if config.train.augment:
        check_augment(config, codec, diffusion)
        parts["augment_dim"], asks = NUM_CHANGES, f"{asks} with --train.augment"
    fitting = [
        name for name, (backbone, _) in BACKBONES.items() if parts.keys() <= signature(backbone).parameters.keys()
    ]
    if config.model in BACKBONES and config.model not in fitting:
        raise ValueError(f"--model {config.model}: {asks} takes --model {', '.join(fitting)}")
    if diffusion.guidance_settings and not config.guided_classes(num_classes):
        raise ValueError(
            f"--diffusion.{diffusion.guidance_settings}: without labels, or with --train.label_dropout 0, there is no "
            "null label to be guided away from; leave it out"
        )
    channels, height, width = codec.latent_shape(config.data.image_size, config.data.image_size)
    return ModelSpec(
        name=config.model,
        args={**parts, **config.model_args},
        input_size=(height, width),
        in_channels=channels,
        out_channels=diffusion.output_channels(channels),
        num_classes=num_classes,
    )


def check_augment(config: ExperimentConfig, codec: Codec, diffusion: Diffusion) -> None:
    """That images can be changed as they are drawn, and the backbone be told: a ValueError says what does not fit."""
    asked = f"--train.augment {config.train.augment}"
    if type(codec).prepare is not Codec.prepare:
        raise ValueError(
            f"{asked}: images are changed at every step, and latents of them are encoded once, unchanged; take "
            "--autoencoder pixel, or 0"
        )
    if "extras" not in signature(diffusion.training_loss).parameters:
        raise ValueError(
            f"{asked}: the loss of --diffusion.kind {config.diffusion.kind} tells no backbone of changes; take 0"
        )
    if config.alignment.extractor:
        raise ValueError(
            f"{asked}: the features of --alignment.extractor are those of unchanged images; leave one of them out"
        )
