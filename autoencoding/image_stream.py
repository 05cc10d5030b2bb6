"""Batches of images for an autoencoder, read as they are wanted: the set may be larger than memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from autoencoding.autoencoder_config import AutoencodingConfig
from data import open_dataset
from data.shapes import DIFFICULTIES
from experiment.build import open_split
from machine.randomness import generator_for
from training.batches import positions

NUM_SHAPES = 6000  # of each difficulty


@dataclass(frozen=True)
class ImageBatches:
    """Steps of `sizes[i]` images of source `i`, each source in epochs that are permutations, laid end to end; half of
    them mirrored, where `mirrors` is set. What a step holds is a function of (seed, step, position in the global
    batch), of which each process has its share."""

    sources: Sequence[Any]  # of datasets of `data`, or several of them one after the other
    sizes: Sequence[int]
    seed: int
    rank: int = 0
    num_ranks: int = 1
    num_workers: int = 0
    mirrors: bool = True

    def __post_init__(self) -> None:
        if self.batch_size % self.num_ranks:
            raise ValueError(f"--train.batch_size {self.batch_size} must be a multiple of {self.num_ranks} processes")

    @property
    def batch_size(self) -> int:
        return sum(self.sizes)

    def __call__(self, step: int, order: int = 0) -> Iterator[UInt8[Tensor, "b 3 h w"]]:
        """This process's share of the batches from a step on, without end; `order` numbers the permutations."""
        share = slice(self.rank, None, self.num_ranks)
        steps = (self.indices(number, order)[share] for number in count(step))
        loader = DataLoader(ConcatDataset(self.sources), batch_sampler=steps, num_workers=self.num_workers)
        for number, (images, _) in enumerate(loader, start=step):
            draw = generator_for(self.seed, "mirrored", number)
            mirrored = torch.rand(self.batch_size, generator=draw)[share] < 0.5 * self.mirrors
            yield torch.where(mirrored[:, None, None, None], images.flip(-1), images)

    def indices(self, step: int, order: int = 0) -> list[int]:
        """The images of a step's global batch, counted through all sources."""
        indices, first = [], 0
        for number, (source, size) in enumerate(zip(self.sources, self.sizes, strict=True)):
            length = len(source)
            indices += (first + positions(length, step * size, size, self.seed, f"source {number}", order)).tolist()
            first += length
        return indices

    def noise(self, step: int, shape: tuple[int, ...], device: torch.device) -> Float[Tensor, "b c h w"]:
        """This process's share of the step's posterior noise, of `shape` an image."""
        draw = generator_for(self.seed, "posterior", step, device=device)
        return torch.randn(self.batch_size, *shape, generator=draw, device=device)[self.rank :: self.num_ranks]


def open_batches(config: AutoencodingConfig, accelerator: Accelerator) -> ImageBatches:
    """The training images, joined by procedural shapes where a share of them is asked for."""
    batch_size = config.train.batch_size
    num_shapes = round(config.shapes_share * batch_size)
    if num_shapes == batch_size:
        raise ValueError(f"--shapes_share {config.shapes_share}: leaves no images in a batch of {batch_size}")
    sources: list[Any] = [open_split(config.data, "train", accelerator)]
    if num_shapes:
        sources.append(ConcatDataset(list(open_shapes(config, "train").values())))
    sizes = [batch_size - num_shapes, num_shapes][: len(sources)]
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    return ImageBatches(sources, sizes, config.train.seed, rank, num_ranks, config.train.num_workers, config.data.flip)


def open_held_out(config: AutoencodingConfig, accelerator: Accelerator) -> dict[str, Any]:
    """Images to measure on, by name: the test split, and shapes of each difficulty where they were trained on."""
    shapes = open_shapes(config, "test") if config.shapes_share else {}
    return {"images": open_split(config.data, "test", accelerator), **shapes}


def open_shapes(config: AutoencodingConfig, split: str) -> dict[str, Dataset]:
    settings: dict[str, Any] = {"split": split, "image_size": config.data.image_size, "num_images": NUM_SHAPES}
    return {f"shapes_{kind}": open_dataset("shapes", difficulty=kind, **settings) for kind in DIFFICULTIES}
