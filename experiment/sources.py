"""Where images to be scored come from: a checkpoint, a dataset, a file, or the autoencoder.

A source gives images by index, so that processes share them, and any of them can be looked at again.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import UInt8
from torch import Tensor

from data import open_dataset
from diffusion.samplers import num_calls
from experiment.autoguidance import load_guide_model
from experiment.build import check_sampling
from experiment.checkpoint import Checkpoint
from experiment.config import EvaluationConfig, SamplingConfig
from experiment.generation import Generator, sample_labels
from experiment.precision import precision_of
from metrics.images import ImageBatch, Images, image_batches
from models.autoencoder import Codec


@dataclass(frozen=True)
class Source:
    """Images by index, and where they come from."""

    name: str
    num_images: int
    batches: Callable[[Tensor, int], Iterator[ImageBatch]]  # (indices, batch size)
    provenance: dict[str, Any]

    def images(self, indices: Tensor) -> UInt8[Tensor, "n 3 h w"]:
        """Some of them, to look at."""
        return torch.cat([batch.images for batch in self.batches(indices, 64)])


def from_generator(generator: Generator, name: str, **provenance: object) -> Source:
    """Samples drawn as they are scored."""
    sampler = generator.sampling.sampler or generator.process.default_sampler
    settings = {
        "kind": "samples",
        "seed": generator.seed,
        "weights": "ema",
        "autoencoder": generator.codec.provenance,
        "precision": precision_of(generator.accelerator),
        "model_calls": num_calls(sampler, generator.sampling.num_steps),
        **asdict(generator.sampling),
    }
    return Source(name, len(generator.labels), generator.batches, {**settings, **provenance})


def from_images(images: Images, name: str, num_images: int | None = None, **provenance: object) -> Source:
    """A dataset or tensor; of more than `num_images`, so many evenly spread ones."""
    total = len(images)  # pyright: ignore[reportArgumentType]
    num = min(num_images or total, total)
    spread = torch.arange(num) * total // num

    def batches(indices: Tensor, batch_size: int) -> Iterator[ImageBatch]:
        found = image_batches(images, batch_size, indices=spread[indices])
        for part, batch in zip(indices.split(batch_size), found, strict=True):
            yield replace(batch, indices=part)

    return Source(name, num, batches, {"num_images": num, **provenance})


def reconstructions(source: Source, codec: Codec, device: torch.device) -> Source:
    """What the autoencoder makes of a source: no model on its latents comes closer to it."""

    def batches(indices: Tensor, batch_size: int) -> Iterator[ImageBatch]:
        for batch in source.batches(indices, batch_size):
            yield replace(batch, images=codec.decode(codec.encode(batch.images.to(device))).cpu())

    provenance = {**source.provenance, "kind": "reconstructions", "autoencoder": codec.provenance}
    return Source("reconstructions", source.num_images, batches, provenance)


def read_samples(path: str, image_size: int, num: int | None) -> Source:
    """A folder or zip of images, or `arr_0` [n h w 3] of an npz (ADM's format).

    Raises:
        ValueError: when the file is neither, or its images have another size than the reference's.
    """
    if Path(path).suffix != ".npz":
        dataset = open_dataset(path, split="all", image_size=image_size)
        return from_images(dataset, Path(path).name, num, kind="folder", **dataset.describe())
    try:
        with np.load(path, allow_pickle=False) as file:
            array = file["arr_0"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"--samples {path}: not an npz with images in arr_0 ({error})") from error
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1:] != (image_size, image_size, 3):
        raise ValueError(
            f"--samples {path}: arr_0 is {array.dtype} {list(array.shape)}, the reference needs uint8 "
            f"[n, {image_size}, {image_size}, 3]"
        )
    images = torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()
    return from_images(images, Path(path).name, num, kind="npz", path=path)


def from_checkpoint(
    checkpoint: Checkpoint,
    settings: list[SamplingConfig],
    evaluation: EvaluationConfig,
    codec: Codec,
    accelerator: Accelerator,
    *,
    num_trials: int,
    num_reference: int,
    reference_labels: Tensor | None,
) -> list[list[Source]]:
    """Samples of a checkpoint's averaged weights: for each sampling configuration a list of trials.

    Trial `k` has the seed `evaluation.seed + k`. All share one model.

    Raises:
        ValueError: for a configuration that the process does not allow, before anything is drawn.
    """
    process, num_classes = checkpoint.build_process(), len(checkpoint.classes)
    settings = [check_sampling(sampling, process, num_classes) for sampling in settings]
    model, diffusion = checkpoint.load_model(accelerator.device), checkpoint.config.diffusion
    provenance = {
        "checkpoint": checkpoint.path.as_posix(),
        "model": checkpoint.spec.name,
        "step": checkpoint.step,
        "trained_at_commit": checkpoint.commit,
        "labels": evaluation.labels,
    }

    def trial(sampling: SamplingConfig, number: int) -> Source:
        labels = sample_labels(evaluation, num_reference, num_classes, reference_labels, number)
        seed = evaluation.seed + number
        where = (checkpoint.image_size, seed, accelerator)
        guide_model = load_guide_model(sampling, diffusion, checkpoint.spec, accelerator.device)
        generator = Generator(model, process, codec, labels, sampling, *where, guide_model=guide_model)
        return from_generator(generator, checkpoint.spec.name, **provenance)

    return [[trial(sampling, number) for number in range(num_trials)] for sampling in settings]


def sweep(base: SamplingConfig, **choices: list[Any]) -> list[SamplingConfig]:
    """Every combination of the choices; an empty list leaves the base's own."""
    given = {name: values for name, values in choices.items() if values}
    return [replace(base, **dict(zip(given, combination, strict=True))) for combination in product(*given.values())]
