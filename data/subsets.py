"""Which images stand for all of them: seeded, and fair to every class."""

from collections.abc import Sequence

import torch
from jaxtyping import Int64
from torch import Tensor


def stratified(labels: Int64[Tensor, " n"], count: int, seed: int) -> Int64[Tensor, " count"]:
    """Positions, ascending, of `count` images, of each class its share: a systematic sample of the images laid out by
    class in random order. Of more images than there are, each comes as often as any other, or once more."""
    draw, num = torch.Generator().manual_seed(seed), len(labels)
    shuffled = torch.randperm(num, generator=draw)
    classes, of_class = labels[shuffled].unique(return_inverse=True)
    by_class = shuffled[torch.randperm(len(classes), generator=draw)[of_class].argsort(stable=True)]
    start = torch.randint(max(1, num), (1,), generator=draw)
    return by_class[(torch.arange(count) * num + start) // max(1, count)].sort().values


def by_name(labels: Int64[Tensor, " n"], of: Sequence[str], into: Sequence[str], flag: str) -> Int64[Tensor, " n"]:
    """Labels of some class names, as the numbers that another list of names has for them."""
    if not of:
        raise ValueError(f"{flag}: the images have no classes by name")
    known = {*into}
    lacking = [of[label] for label in labels.unique().tolist() if of[label] not in known]
    if lacking:
        raise ValueError(
            f"{flag}: the class {lacking[0]} ({len(lacking)} such) has no namesake among {', '.join(into[:5])}"
        )
    numbers = {name: number for number, name in enumerate(into)}
    return torch.tensor([numbers.get(name, -1) for name in of], dtype=torch.int64)[labels]
