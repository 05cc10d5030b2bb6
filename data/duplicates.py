"""Near-duplicates by a perceptual hash, so that a split need not tear them apart."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int16
from PIL import Image
from torch import Tensor
from tqdm import tqdm

SIDE = 16  # of the hash, in bits: with 8, photographs of one kind of thing already chain into large groups
MOST_DIFFERENT = 0.1  # share of bits in which near-duplicates differ at most
FARTHEST = 5.0  # levels of 255 that greys of near-duplicates on even ground lie apart, their mean


def near_duplicates(names: Sequence[str], read: Callable[[str], Image.Image]) -> dict[str, str]:
    """The first name of each image's group, for images that have near-duplicates, mirrored ones included, by a hash of
    differences (dHash): whether each pixel of a small grey version is lighter than its left neighbour. Where most of
    that is even, ground or margin, its bits say nothing, and greys are compared where it is not."""
    from scipy.sparse import coo_array  # half a second to import
    from scipy.sparse.csgraph import connected_components

    plain = []
    for name in tqdm(names, desc="looking for near-duplicates", leave=False):
        grey = read(name).convert("L").resize((SIDE + 1, SIDE), Image.Resampling.LANCZOS)
        plain.append(torch.from_numpy(np.array(grey)).short())
    small, num = torch.stack(plain), len(names)
    both = torch.cat([small, small.flip(-1)])
    hashes = torch.where(both.diff(dim=-1) > 0, 1.0, -1.0).flatten(1)
    least_product = SIDE**2 * (1 - 2 * MOST_DIFFERENT)  # of two hashes of 1 and -1
    pairs = []
    for start in range(0, num, 1024):
        ones, others = (hashes[start : min(start + 1024, num)] @ hashes.T >= least_product).nonzero().T
        ones = start + ones
        parts = zip(ones.split(8192), others.split(8192), strict=True)
        alike = torch.cat([_alike(both[one], both[other]) for one, other in parts])
        pairs.append(torch.stack([ones, others % num])[:, alike])
    ones, others = torch.cat(pairs, dim=1).numpy()
    graph = coo_array((np.ones(len(ones)), (ones, others)), shape=(num, num))
    _, groups = connected_components(graph, directed=False)
    _, first, sizes = np.unique(groups, return_index=True, return_counts=True)
    return {name: names[int(first[group])] for name, group in zip(names, groups, strict=True) if sizes[group] > 1}


def _alike(one: Int16[Tensor, "n h w"], other: Int16[Tensor, "n h w"]) -> Bool[Tensor, " n"]:
    """Of pairs of small grey images with like hashes: whether, where either is mostly even, their greys are near
    wherever one of them is not."""
    is_uneven, others = (image.diff(dim=-1).flatten(1) != 0 for image in (one, other))
    is_told = torch.minimum(is_uneven.sum(dim=1), others.sum(dim=1)) >= SIDE**2 / 2
    counts = is_uneven | others
    counts = counts | ~counts.any(dim=1, keepdim=True)  # of plain images all
    gap = (one - other).abs().unfold(-1, 2, 1).float().mean(dim=-1).flatten(1)
    return is_told | ((gap * counts).sum(dim=1) <= FARTHEST * counts.sum(dim=1))
