"""What neighbours say: density, coverage, and the nearest training image of each sample."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor

ROWS = 1024  # of a matrix of distances held at a time


def density_and_coverage(
    samples: Float[Tensor, "n d"], reference: Float[Tensor, "m d"], neighbourhood: int = 5
) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, eqs. 3 and 4), over balls that reach to the k-th neighbour of each
    reference image, k = `neighbourhood`.

    Density: how many balls hold a sample, on average, over k: >= 0, about 1 where the sets are alike. Coverage:
    share of the balls that hold any sample, in [0, 1]. Unlike precision and recall, neither is carried by a single
    outlier's huge ball around a sample.
    """
    radius = neighbour_distance(reference, neighbourhood)
    inside, covered = 0, torch.zeros(len(reference), dtype=torch.bool)
    for distances in _rows(samples, reference):
        held = distances < radius
        inside += int(held.sum())
        covered |= held.any(dim=0)
    return inside / (neighbourhood * len(samples)), covered.double().mean().item()


def neighbour_distance(x: Float[Tensor, "n d"], k: int) -> Float[Tensor, " n"]:
    """From each point to its k-th nearest other one."""
    return torch.cat([rows.kthvalue(k + 1, dim=1).values for rows in _rows(x, x)])  # its own distance, 0, comes first


def nearest(x: Float[Tensor, "n d"], others: Float[Tensor, "m d"]) -> tuple[Float[Tensor, " n"], Int64[Tensor, " n"]]:
    """Distance to, and index of, the nearest of `others`."""
    found = [rows.min(dim=1) for rows in _rows(x, others)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def share_of_pairs_closer(a: Float[Tensor, " n"], b: Float[Tensor, " m"]) -> float:
    """The chance that a random one of `a` is smaller than a random one of `b`, ties counted half: 0.5 where they
    are alike (the Mann-Whitney statistic over n m)."""
    b = b.sort().values
    below, upto = torch.searchsorted(b, a, right=False), torch.searchsorted(b, a, right=True)
    return ((len(b) - upto) + 0.5 * (upto - below)).double().mean().item() / len(b)


def _rows(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """The matrix of Euclidean distances, some rows at a time, in float64."""
    y = y.double()
    for part in x.double().split(ROWS):
        yield torch.cdist(part, y)
