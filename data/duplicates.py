"""Near-duplicates by a perceptual hash, so that a split need not tear them apart."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

SIDE = 16  # of the hash, in bits: with 8, photographs of one kind of thing already chain into large groups
MOST_DIFFERENT = 0.1  # share of bits in which near-duplicates differ at most


def near_duplicates(names: Sequence[str], read: Callable[[str], Image.Image]) -> dict[str, str]:
    """The first name of each image's group, for images that have near-duplicates, mirrored ones included, by a hash of
    differences (dHash): whether each pixel of a small grey version is lighter than its left neighbour."""
    from scipy.sparse import coo_array  # half a second to import
    from scipy.sparse.csgraph import connected_components

    plain, mirrored = [], []
    for name in tqdm(names, desc="looking for near-duplicates", leave=False):
        grey = read(name).convert("L").resize((SIDE + 1, SIDE), Image.Resampling.LANCZOS)
        small = torch.from_numpy(np.array(grey)).int()
        for hashes, pixels in ((plain, small), (mirrored, small.flip(-1))):
            hashes.append(torch.where(pixels.diff(dim=-1) > 0, 1.0, -1.0).flatten())
    both, num = torch.stack([*plain, *mirrored]), len(names)
    least_product = SIDE**2 * (1 - 2 * MOST_DIFFERENT)  # of two hashes of 1 and -1
    pairs = []
    for start in range(0, num, 1024):
        ones, others = (both[start : min(start + 1024, num)] @ both.T >= least_product).nonzero().T
        pairs.append(torch.stack([start + ones, others % num]))
    ones, others = torch.cat(pairs, dim=1).numpy()
    alike = coo_array((np.ones(len(ones)), (ones, others)), shape=(num, num))
    _, groups = connected_components(alike, directed=False)
    _, first, sizes = np.unique(groups, return_index=True, return_counts=True)
    return {name: names[int(first[group])] for name, group in zip(names, groups, strict=True) if sizes[group] > 1}
