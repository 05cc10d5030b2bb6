"""Batches of images for an autoencoder's training, loaded on demand: the dataset may be larger than memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from autoencoder_training.autoencoder_config import AutoencodingConfig
from data import open_dataset
from data.shapes import DIFFICULTIES
from experiment.build import open_split
from machine.randomness import generator_for
from training.batches import positions

NUM_SHAPES = 6000  # per difficulty


@dataclass(frozen=True)
class ImageBatches:
    """Training batches with a fixed number of images from each source.

    Each source is read in epochs, each a permutation of it. The content of a step is a function of (seed, step,
    position in the global batch), whatever the number of processes; each process loads its share.
    """

    sources: Sequence[Any]  # datasets of `data`, or concatenations of them
    sizes: Sequence[int]  # images of each source in a global batch
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
        """Yield this process's share of all batches from a step on; another `order` gives other permutations."""
        share = slice(self.rank, None, self.num_ranks)
        batch_sampler = (self.indices(later, order)[share] for later in count(step))
        loader = DataLoader(ConcatDataset(self.sources), batch_sampler=batch_sampler, num_workers=self.num_workers)
        for number, (images, _) in enumerate(loader, start=step):
            generator = generator_for(self.seed, "mirrored", number)
            is_mirrored = torch.rand(self.batch_size, generator=generator)[share] < 0.5 * self.mirrors
            yield torch.where(is_mirrored[:, None, None, None], images.flip(-1), images)

    def indices(self, step: int, order: int = 0) -> list[int]:
        """Indices of the images of a step's global batch, in the concatenation of all sources."""
        indices, offset = [], 0
        for number, (source, size) in enumerate(zip(self.sources, self.sizes, strict=True)):
            length = len(source)
            indices += (offset + positions(length, step * size, size, self.seed, f"source {number}", order)).tolist()
            offset += length
        return indices

    def noise(self, step: int, shape: tuple[int, ...], device: torch.device) -> Float[Tensor, "b c h w"]:
        """Draw this process's share of the noise for a step's posterior samples; `shape` is that of one latent."""
        generator = generator_for(self.seed, "posterior", step, device=device)
        return torch.randn(self.batch_size, *shape, generator=generator, device=device)[self.rank :: self.num_ranks]


def open_batches(config: AutoencodingConfig, accelerator: Accelerator) -> ImageBatches:
    """Open the training images, and procedural shapes where `shapes_share` asks for them."""
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
    """Open the held-out images by name: the test split, and shapes of each difficulty where they are trained on."""
    shapes = open_shapes(config, "test") if config.shapes_share else {}
    return {"images": open_split(config.data, "test", accelerator), **shapes}


def open_shapes(config: AutoencodingConfig, split: str) -> dict[str, Dataset]:
    """Open procedural shapes of each difficulty, by name."""
    settings: dict[str, Any] = {"split": split, "image_size": config.data.image_size, "num_images": NUM_SHAPES}
    return {f"shapes_{kind}": open_dataset("shapes", difficulty=kind, **settings) for kind in DIFFICULTIES}
