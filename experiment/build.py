"""Build what a configuration describes: the diffusion, the images, their latents and the matching backbone."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
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
from experiment.open_section import signature_settings
from machine.accelerator import from_main, num_processes_here
from machine.memory import free_memory
from machine.threads import allowed_cores
from models import BACKBONES, ModelSpec, abbreviate, class_of
from settings import check_name, set_values

if TYPE_CHECKING:
    from metrics.feature_maps import FeatureMaps


def build_diffusion(config: DiffusionConfig) -> Diffusion:
    """Create the diffusion. Raises a ValueError that names an invalid setting."""
    settings = diffusion_settings(config)  # also validates the kind
    return DIFFUSIONS[config.kind](**settings)


def diffusion_settings(config: DiffusionConfig) -> dict[str, Any]:
    """All parameters of a diffusion of this kind: the configured ones, and the kind's defaults for the others."""
    check_name("--diffusion.kind", config.kind, DIFFUSIONS)
    settings = {kind: signature_settings(preset) for kind, preset in DIFFUSIONS.items()}
    defaults = {name: parameter.default for name, parameter in settings[config.kind].items()}
    configured = {name: value for name, value in asdict(config).items() if name != "kind" and value is not None}
    for name in configured.keys() - defaults.keys():
        owners = " and ".join(kind for kind, names in settings.items() if name in names)
        raise ValueError(f"--diffusion.{name} belongs to kind {owners}, not to {config.kind}; leave it out or null")
    return defaults | configured


TRAINING_ONLY = {"loss", "weighting", "times", "times_args", "shift", "contrast", "P_mean", "P_std", "phases"}
TRAINING_ONLY |= {"forcing", "interval_share", "adaptive_power", "tangent", "difference"}
"""Settings of a diffusion that do not change the meaning of the backbone's output."""


def defining_settings(config: DiffusionConfig) -> dict[str, Any]:
    """The settings that define the meaning of the backbone's output; a checkpoint is used with the same ones."""
    settings = {"kind": config.kind, **diffusion_settings(config)}
    return {name: value for name, value in settings.items() if name not in TRAINING_ONLY}


def merge_data_flags(trained_on: DataConfig | None, flags: DataFlags) -> DataConfig:
    """Combine the images of a checkpoint, if there is one, with flags. These may change `path`, `cache` and `on_error`;
    other settings that differ from the checkpoint's raise a ValueError."""
    changed = set_values(flags)
    if trained_on is None:
        return DataConfig(**changed)
    for name, value in changed.items():
        trained = getattr(trained_on, name)
        if name not in ("path", "cache", "on_error") and value != trained:
            raise ValueError(f"--data.{name} {value}: the checkpoint's images have {trained}; leave it out")
    return replace(trained_on, **changed)


def open_split(config: DataConfig, split: str, accelerator: Accelerator | None = None) -> Any:
    """Open a split of the configured images. With an accelerator, only its main process reads the file system."""
    settings = {name: value for name, value in vars(config).items() if name not in ("path", "cache", "flip")}
    open_images = partial(open_dataset, config.path, split=split, **settings)
    return from_main(accelerator, open_images) if accelerator else open_images()


def open_cache(
    config: DataConfig, codec: Codec | FeatureMaps, dataset, accelerator: Accelerator, *, flips: bool
) -> LatentCache:
    """Open the encoded images, or features of images; on first use, all processes encode them into the cache folder.
    They are loaded to the device if they take less than a quarter of its free memory, and stay in their files
    otherwise."""
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
            num_threads=min(max(1, len(allowed_cores()) // num_sharing), 16),  # each holds a batch in memory
            accelerator=accelerator,
        )
        accelerator.wait_for_everyone()
    fits = from_main(accelerator, lambda: num_bytes(folder) < free_memory(device, num_sharing) / 4)
    with accelerator.local_main_process_first():  # so that files are verified once per machine
        return LatentCache(folder, expected, device if fits else None)


def model_spec(config: ExperimentConfig, codec: Codec, diffusion: Diffusion, num_classes: int) -> ModelSpec:
    """Specify the backbone with the shapes of codec, diffusion and data. Raises ValueError for a backbone that lacks
    parameters which the diffusion or augmentation requires."""
    required: dict[str, Any] = dict(diffusion.model_args)
    requested_by = f"kind {config.diffusion.kind}"
    if diffusion.guidance_max is not None:
        requested_by = f"{requested_by} with --diffusion.guidance_max"
    if config.train.augment:
        check_augment(config, codec, diffusion)
        required["augment_dim"], requested_by = NUM_CHANGES, f"{requested_by} with --train.augment"

    def is_suitable(name: str) -> bool:
        return required.keys() <= signature(class_of(name)).parameters.keys()

    if config.model in BACKBONES and not is_suitable(config.model):
        suitable = abbreviate(filter(is_suitable, BACKBONES))
        raise ValueError(f"--model {config.model}: {requested_by} takes --model {suitable}")
    if diffusion.guidance_settings and not config.guided_classes(num_classes):
        raise ValueError(
            f"--diffusion.{diffusion.guidance_settings}: without labels, or with --train.label_dropout 0, there is no "
            "null label to be guided away from; leave it out"
        )
    channels, height, width = codec.latent_shape(config.data.image_size, config.data.image_size)
    return ModelSpec(
        name=config.model,
        args={**required, **config.model_args},
        input_size=(height, width),
        in_channels=channels,
        out_channels=diffusion.output_channels(channels),
        num_classes=num_classes,
    )


def check_augment(config: ExperimentConfig, codec: Codec, diffusion: Diffusion) -> None:
    """Raise ValueError unless images can be augmented at every step and the backbone conditioned on the changes."""
    flag = f"--train.augment {config.train.augment}"
    if type(codec).prepare is not Codec.prepare:
        raise ValueError(
            f"{flag}: images are changed at every step, and latents of them are encoded once, unchanged; take "
            "--autoencoder pixel, or 0"
        )
    if "extras" not in signature(diffusion.training_loss).parameters:
        raise ValueError(
            f"{flag}: the loss of --diffusion.kind {config.diffusion.kind} does not support augmentation "
            "conditioning; set it to 0"
        )
    if config.alignment.extractor:
        raise ValueError(
            f"{flag}: the features of --alignment.extractor are those of unchanged images; leave one of them out"
        )
