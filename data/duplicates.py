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
    plain, mirrored = [], []
    for name in tqdm(names, desc="looking for near-duplicates", leave=False):
        grey = read(name).convert("L").resize((SIDE + 1, SIDE), Image.Resampling.LANCZOS)
        small = torch.from_numpy(np.array(grey)).int()
        for hashes, pixels in ((plain, small), (mirrored, small.flip(-1))):
            hashes.append(torch.where(pixels.diff(dim=-1) > 0, 1.0, -1.0).flatten())
    hashes, both = torch.stack(plain), torch.cat([torch.stack(plain), torch.stack(mirrored)])
    least_product = SIDE**2 * (1 - 2 * MOST_DIFFERENT)  # of two hashes of 1 and -1
    first = list(range(len(names)))  # a forest: of each image an earlier one of its group, or itself

    def root(image: int) -> int:
        while first[image] != image:
            first[image] = image = first[first[image]]
        return image

    for start in range(0, len(names), 1024):
        for one, other in (hashes[start : start + 1024] @ both.T >= least_product).nonzero().tolist():
            low, high = sorted((root(start + one), root(other % len(names))))
            first[high] = low
    roots = [root(image) for image in range(len(names))]
    shared = {parent for image, parent in enumerate(roots) if parent != image}
    return {name: names[parent] for name, parent in zip(names, roots, strict=True) if parent in shared}
