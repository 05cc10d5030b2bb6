"""Iteration over sets of uint8 images in batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset, default_collate

Images = Dataset | UInt8[Tensor, "_ 3 _ _"]
"""A tensor, or a map-style dataset of uint8 RGB images [3 h w] or pairs (image, label)."""


@dataclass(frozen=True)
class ImageBatch:
    indices: Int64[Tensor, " b"]
    images: Tensor  # [b 3 h w]; the extractor checks that they are uint8
    labels: Int64[Tensor, " b"] | None = None


def split_into_batches(indices: Int64[Tensor, " n"], batch_size: int) -> Sequence[Tensor]:
    """Split indices into batches; of no indices there is no batch, where `Tensor.split` would return an empty one."""
    return indices.split(batch_size) if len(indices) else ()


def image_batches(
    images: Images, batch_size: int = 64, *, indices: Int64[Tensor, " n"] | None = None
) -> Iterator[ImageBatch]:
    """Iterate over all images, or those at `indices`, in batches."""
    data: Any = images
    indices = torch.arange(len(data)) if indices is None else indices
    for batch in split_into_batches(indices, batch_size):
        if isinstance(images, Tensor):
            yield ImageBatch(batch, images[batch])
            continue
        items = [data[index] for index in batch.tolist()]
        if isinstance(items[0], tuple | list):
            labels = torch.tensor([int(item[1]) for item in items])
            yield ImageBatch(batch, default_collate([item[0] for item in items]), labels)
        else:
            yield ImageBatch(batch, default_collate(items))
