"""Sets of uint8 images, read in batches by index."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

Images = Dataset | UInt8[Tensor, "_ 3 _ _"]
"""Map-style, of uint8 RGB images [3 h w]; what stands beside an image (its label) is passed over."""


@dataclass(frozen=True)
class ImageBatch:
    """Some images of a set, by their indices in it."""

    indices: Int64[Tensor, " b"]
    images: Tensor  # [b 3 h w]; that they are uint8 is for the extractor to say, in words
    labels: Int64[Tensor, " b"] | None = None


def image_batches(
    images: Images, batch_size: int = 64, *, indices: Int64[Tensor, " n"] | None = None, num_workers: int = 0
) -> Iterator[ImageBatch]:
    """A tensor's or dataset's images, or those at `indices`, in batches; `num_workers` processes read a dataset."""
    num_images = len(images)  # pyright: ignore[reportArgumentType]
    indices = torch.arange(num_images) if indices is None else indices
    if len(indices) == 0:
        return
    if isinstance(images, Tensor):
        for part in indices.split(batch_size):
            yield ImageBatch(part, images[part])
        return
    subset = Subset(images, indices.tolist())
    loader = DataLoader(subset, batch_size, num_workers=num_workers, collate_fn=_collate)
    for part, (pictures, labels) in zip(indices.split(batch_size), loader, strict=True):
        yield ImageBatch(part, pictures, labels)


def _collate(items: list) -> tuple[Tensor, Tensor | None]:
    if isinstance(items[0], tuple | list):
        images, labels = zip(*items, strict=True)
        return default_collate([*images]), torch.tensor(list(map(int, labels)))
    return default_collate(items), None
