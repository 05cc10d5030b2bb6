"""Subsets of labelled images, and labels translated to another list of classes."""

from collections.abc import Sequence

import torch
from jaxtyping import Int64
from torch import Tensor


def stratified(labels: Int64[Tensor, " n"], count: int, seed: int) -> Int64[Tensor, " count"]:
    """Sample `count` indices, in ascending order, with each class in proportion to its size.

    This is a systematic sample: the images are sorted by class, in random order within and between classes, and taken
    at even distances from a random start. If `count` exceeds the number of images, indices repeat, and their counts
    differ by at most one.
    """
    generator, num = torch.Generator().manual_seed(seed), len(labels)
    shuffled = torch.randperm(num, generator=generator)
    classes, class_index = labels[shuffled].unique(return_inverse=True)
    by_class = shuffled[torch.randperm(len(classes), generator=generator)[class_index].argsort(stable=True)]
    start = torch.randint(max(1, num), (1,), generator=generator)
    return by_class[(torch.arange(count) * num + start) // max(1, count)].sort().values


def map_labels(labels: Int64[Tensor, " n"], of: Sequence[str], into: Sequence[str], flag: str) -> Int64[Tensor, " n"]:
    """Translate labels from the class list `of` to the class list `into`, by class name."""
    if not of:
        raise ValueError(f"{flag}: the images have no classes by name")
    index_of = {name: index for index, name in enumerate(into)}
    missing = [of[label] for label in labels.unique().tolist() if of[label] not in index_of]
    if missing:
        raise ValueError(
            f"{flag}: the class {missing[0]} ({len(missing)} such) has no namesake among {', '.join(into[:5])}"
        )
    return torch.tensor([index_of.get(name, -1) for name in of], dtype=torch.int64)[labels]
