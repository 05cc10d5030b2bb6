"""Near-duplicates, found by a perceptual hash, so that a split can keep them on the same side."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int16
from PIL import Image
from torch import Tensor
from tqdm import tqdm

SIDE = 16  # the hash has SIDE x SIDE bits; with 8 x 8, photographs of one kind of object chain into large groups
MAX_DIFFERENCE = 0.1  # near-duplicates differ in at most this fraction of the bits
MAX_GREY_DISTANCE = 5.0  # largest mean difference of the greys, in levels of 255, where the hash is not meaningful


def near_duplicates(names: Sequence[str], read: Callable[[str], Image.Image]) -> dict[str, str]:
    """Group near-duplicates, mirrored ones included; return the first name of its group for each grouped image.

    Images are compared by a difference hash (dHash): a bit says whether a pixel of a small grey version is lighter than
    its left neighbour. The bits of even areas, such as margins, have no meaning; mostly even images are also compared
    by their greys. Groups are the connected components of images that are alike.
    """
    from scipy.sparse import coo_array  # takes half a second to import
    from scipy.sparse.csgraph import connected_components

    greys = []
    for name in tqdm(names, desc="looking for near-duplicates", leave=False):
        grey = read(name).convert("L").resize((SIDE + 1, SIDE), Image.Resampling.LANCZOS)
        greys.append(torch.from_numpy(np.array(grey)).short())
    originals, num = torch.stack(greys), len(names)
    images = torch.cat([originals, originals.flip(-1)])
    hashes = torch.where(images.diff(dim=-1) > 0, 1.0, -1.0).flatten(1)
    min_product = SIDE**2 * (1 - 2 * MAX_DIFFERENCE)  # as bits are 1 and -1
    pairs = []
    for start in range(0, num, 1024):
        rows, columns = (hashes[start : min(start + 1024, num)] @ hashes.T >= min_product).nonzero().T
        rows = start + rows
        parts = zip(rows.split(8192), columns.split(8192), strict=True)
        is_alike = torch.cat([_are_duplicates(images[row], images[column]) for row, column in parts])
        pairs.append(torch.stack([rows, columns % num])[:, is_alike])
    rows, columns = torch.cat(pairs, dim=1).numpy()
    adjacency = coo_array((np.ones(len(rows)), (rows, columns)), shape=(num, num))
    _, groups = connected_components(adjacency, directed=False)
    _, first, sizes = np.unique(groups, return_index=True, return_counts=True)
    return {name: names[int(first[group])] for name, group in zip(names, groups, strict=True) if sizes[group] > 1}


def _are_duplicates(a: Int16[Tensor, "n h w"], b: Int16[Tensor, "n h w"]) -> Bool[Tensor, " n"]:
    """Whether pairs of small grey images with similar hashes are near-duplicates: either both are uneven in at least
    half of their pixels, or their greys are close wherever one of them is uneven."""
    is_uneven_a, is_uneven_b = (image.diff(dim=-1).flatten(1) != 0 for image in (a, b))
    has_meaningful_hash = torch.minimum(is_uneven_a.sum(dim=1), is_uneven_b.sum(dim=1)) >= SIDE**2 / 2
    mask = is_uneven_a | is_uneven_b
    mask = mask | ~mask.any(dim=1, keepdim=True)  # compare plain images everywhere
    distance = (a - b).abs().unfold(-1, 2, 1).float().mean(dim=-1).flatten(1)
    return has_meaningful_hash | ((distance * mask).sum(dim=1) <= MAX_GREY_DISTANCE * mask.sum(dim=1))
