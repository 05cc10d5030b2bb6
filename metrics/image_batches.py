"""Sets of uint8 images, read in batches by index."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset, default_collate

Images = Dataset | UInt8[Tensor, "_ 3 _ _"]
"""Map-style, of uint8 RGB images [3 h w]; what stands beside an image (its label) is passed over."""


@dataclass(frozen=True)
class ImageBatch:
    indices: Int64[Tensor, " b"]
    images: Tensor  # [b 3 h w]; that they are uint8 is for the extractor to say, in words
    labels: Int64[Tensor, " b"] | None = None


def in_batches(indices: Int64[Tensor, " n"], batch_size: int) -> Sequence[Tensor]:
    """Parts of so many; of none, as a process's share of few images may be, no part."""
    return indices.split(batch_size) if len(indices) else ()


def image_batches(
    images: Images, batch_size: int = 64, *, indices: Int64[Tensor, " n"] | None = None
) -> Iterator[ImageBatch]:
    """A tensor's or dataset's images, or those at `indices`, in batches."""
    data: Any = images
    indices = torch.arange(len(data)) if indices is None else indices
    for part in in_batches(indices, batch_size):
        if isinstance(images, Tensor):
            yield ImageBatch(part, images[part])
            continue
        items = [data[index] for index in part.tolist()]
        if isinstance(items[0], tuple | list):
            labels = torch.tensor([int(item[1]) for item in items])
            yield ImageBatch(part, default_collate([item[0] for item in items]), labels)
        else:
            yield ImageBatch(part, default_collate(items))
