"""Metrics by nearest neighbours: precision, recall, density, coverage, and the nearest training image of a sample."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from machine.precision import to_float64
from metrics.scores import Score, too_few

ROWS, AT_ONCE = 1024, 65536  # size of the blocks in which matrices of distances are computed: rows, columns
TIE = 1e-7  # distances are equal if they differ by less, relatively: rounding depends on an image's place in its block


def count_neighbours(
    samples: Float[Tensor, "n d"],
    reference: Float[Tensor, "m d"],
    *,
    neighbourhood: int = 3,
    density_neighbourhood: int = 5,
) -> dict[str, Score]:
    """Compute precision, recall, density and coverage by balls around images, whose radius is the distance to the k-th
    neighbour.

    Precision is the fraction of samples inside any ball around a reference image, recall the reverse (Kynkäänniemi et
    al. 2019; k = `neighbourhood`). Density is the mean number of balls around reference images that contain a sample,
    over k; coverage is the fraction of these balls that contain a sample (Naeem et al. 2020, eqs. 3 and 4; k =
    `density_neighbourhood`).
    """
    num, num_reference = len(samples), len(reference)
    scores: dict[str, Score] = {}
    ks = [k for k in (neighbourhood, density_neighbourhood) if k < num_reference]
    radii = dict(zip(ks, neighbour_distances(reference, ks), strict=True))
    enough_for_precision, enough_for_density = min(num, num_reference) > neighbourhood, density_neighbourhood in radii
    sample_radius = neighbour_distances(samples, [neighbourhood])[0] if enough_for_precision else samples.new_zeros(num)
    num_precise = num_inside = 0
    is_recalled, is_covered = torch.zeros(2, num_reference, dtype=torch.bool, device=reference.device)
    for start, distances in zip(range(0, num, ROWS), _distance_blocks(samples, reference), strict=True):
        if enough_for_precision:
            num_precise += int((distances <= (1 + TIE) * radii[neighbourhood]).any(dim=1).sum())
            is_recalled |= (distances <= (1 + TIE) * sample_radius[start : start + ROWS, None]).any(dim=0)
        if enough_for_density:
            is_inside = distances < (1 - TIE) * radii[density_neighbourhood]
            num_inside += int(is_inside.sum())
            is_covered |= is_inside.any(dim=0)
    recall, coverage = (mask.double().mean().item() for mask in (is_recalled, is_covered))
    if enough_for_precision:
        scores |= {"precision": Score(num_precise / num), "recall": Score(recall)}
    else:
        scores |= dict.fromkeys(("precision", "recall"), too_few(min(num, num_reference), neighbourhood + 1))
    if enough_for_density:
        return scores | {"density": Score(num_inside / (density_neighbourhood * num)), "coverage": Score(coverage)}
    return scores | dict.fromkeys(("density", "coverage"), too_few(num_reference, density_neighbourhood + 1))


def neighbour_distances(x: Float[Tensor, "n d"], ks: list[int]) -> list[Float[Tensor, " n"]]:
    """Return the distance from each point to its k-th nearest neighbour, for each k."""
    if not ks:
        return []
    # The smallest distance is that of a point to itself.
    blocks = [torch.stack([block.kthvalue(k + 1, dim=1).values for k in ks]) for block in _distance_blocks(x, x)]
    return list(torch.cat(blocks, dim=1))


def nearest_neighbours(
    x: Float[Tensor, "n d"], others: Float[Tensor, "m d"]
) -> tuple[Float[Tensor, " n"], Int64[Tensor, " n"]]:
    """Return distance and index of the nearest of `others`, which are moved to the device of `x` in parts."""
    best, index = torch.full((len(x),), torch.inf), torch.zeros(len(x), dtype=torch.int64)
    for number, part in enumerate(others.split(AT_ONCE)):
        minima = [block.min(dim=1) for block in _distance_blocks(x, part.to(x.device))]
        distances = torch.cat([minimum.values for minimum in minima]).cpu()
        indices = torch.cat([minimum.indices for minimum in minima]).cpu()
        index = torch.where(distances < best, indices + number * AT_ONCE, index)
        best = torch.minimum(distances, best)
    return best, index


def probability_closer(a: Float[Tensor, " n"], b: Float[Tensor, " m"]) -> float:
    """Return the probability that a random element of `a` is smaller than one of `b`, with ties counted half. It is the
    Mann-Whitney statistic over n m, and 0.5 for equal distributions."""
    from scipy.stats import mannwhitneyu  # not at the top: it takes a second

    return float(mannwhitneyu(b, a, method="asymptotic").statistic) / (len(a) * len(b))


def _distance_blocks(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Compute the matrix of Euclidean distances in float64, in blocks of `ROWS` rows."""
    y = to_float64(y)
    for block in to_float64(x).split(ROWS):
        yield torch.cdist(block, y)
