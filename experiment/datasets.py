"""Configuration to images, and to their latents."""

from dataclasses import asdict, replace
from pathlib import Path

from accelerate import Accelerator

from autoencoders.codec import Codec
from data import open_dataset
from data.latents import LatentCache, build_cache, cache_name
from experiment.config import DataConfig
from machine.accelerator import from_main


def data_of(trained_on: DataConfig, asked: DataConfig) -> DataConfig:
    """A checkpoint's images, where they lie now: `path`, `cache` and `on_error` may change, and nothing else."""
    changed = {name: value for name, value in asdict(asked).items() if value != getattr(DataConfig(), name)}
    for name, value in changed.items():
        trained = getattr(trained_on, name)
        if name not in ("path", "cache", "on_error") and value != trained:
            raise ValueError(f"--data.{name} {value}: the checkpoint's images have {trained}; leave it out")
    return replace(trained_on, **changed)


def open_split(config: DataConfig, split: str):
    """The training or test split of the configured images."""
    settings = {name: value for name, value in vars(config).items() if name not in ("path", "cache", "flip")}
    return open_dataset(config.path, split=split, **settings)


def open_cache(config: DataConfig, codec: Codec, dataset, accelerator: Accelerator, *, flips: bool) -> LatentCache:
    """The encoded images, from the cache folder or, on first use, encoded into it by all processes."""
    expected = {**codec.identity, **dataset.describe(), "flips": flips}
    folder = Path(config.cache) / cache_name(expected)
    if from_main(accelerator, lambda: not (folder / "manifest.json").exists()):
        build_cache(
            folder,
            dataset,
            lambda images: codec.prepare(images.to(accelerator.device)).cpu(),
            codec.provenance,
            flips=flips,
            batch_size=128,
            rank=accelerator.process_index,
            num_ranks=accelerator.num_processes,
            progress=accelerator.is_main_process,
        )
        accelerator.wait_for_everyone()
    return LatentCache(folder, expected)
