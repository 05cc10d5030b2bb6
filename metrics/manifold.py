"""What neighbours say: precision, recall, density, coverage, and the nearest training image of each sample."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from machine.precision import exact
from metrics.scores import Score, too_few

ROWS, AT_ONCE = 1024, 65536  # rows of a matrix of distances held at a time, and of its columns where all may be many


def count_neighbours(
    samples: Float[Tensor, "n d"],
    reference: Float[Tensor, "m d"],
    *,
    neighbourhood: int = 3,
    density_neighbourhood: int = 5,
) -> dict[str, Score]:
    """Precision, recall, density and coverage, counted in balls around images that reach to their k-th neighbour.

    Precision: share of the samples in any ball around a reference image; recall: the reverse (Kynkäänniemi et al. 2019;
    k = `neighbourhood`). Density: how many balls around reference images hold a sample, over k; coverage: share of
    these balls that hold any (Naeem et al. 2020, eqs. 3 and 4; k = `density_neighbourhood`).
    """
    num, num_reference = len(samples), len(reference)
    scores: dict[str, Score] = {}
    reach = [k for k in (neighbourhood, density_neighbourhood) if k < num_reference]
    radii = dict(zip(reach, neighbour_distances(reference, reach), strict=True))
    has_manifolds, has_balls = min(num, num_reference) > neighbourhood, density_neighbourhood in radii
    sample_radius = neighbour_distances(samples, [neighbourhood])[0] if has_manifolds else samples.new_zeros(num)
    inside, precise, balls = 0, 0, torch.zeros(2, num_reference, dtype=torch.bool, device=reference.device)
    for start, distances in zip(range(0, num, ROWS), _rows(samples, reference), strict=True):
        if has_manifolds:
            precise += int((distances <= radii[neighbourhood]).any(dim=1).sum())
            balls[0] |= (distances <= sample_radius[start : start + ROWS, None]).any(dim=0)
        if has_balls:
            held = distances < radii[density_neighbourhood]
            inside += int(held.sum())
            balls[1] |= held.any(dim=0)
    recalled, covered = balls.double().mean(dim=1).tolist()
    if has_manifolds:
        scores |= {"precision": Score(precise / num), "recall": Score(recalled)}
    else:
        scores |= dict.fromkeys(("precision", "recall"), too_few(min(num, num_reference), neighbourhood + 1))
    if has_balls:
        return scores | {"density": Score(inside / (density_neighbourhood * num)), "coverage": Score(covered)}
    return scores | dict.fromkeys(("density", "coverage"), too_few(num_reference, density_neighbourhood + 1))


def neighbour_distances(x: Float[Tensor, "n d"], ks: list[int]) -> list[Float[Tensor, " n"]]:
    """From each point to its k-th nearest other one, for each k."""
    rows = [torch.stack([rows.kthvalue(k + 1, dim=1).values for k in ks]) for rows in _rows(x, x)] if ks else []
    return list(torch.cat(rows, dim=1)) if ks else []  # its own distance, 0, comes first


def nearest(x: Float[Tensor, "n d"], others: Float[Tensor, "m d"]) -> tuple[Float[Tensor, " n"], Int64[Tensor, " n"]]:
    """Distance to, and index of, the nearest of `others`, which come to the device of `x` a part at a time."""
    least, index = torch.full((len(x),), torch.inf), torch.zeros(len(x), dtype=torch.int64)
    for number, part in enumerate(others.split(AT_ONCE)):
        found = [rows.min(dim=1) for rows in _rows(x, part.to(x.device))]
        distances, places = (torch.cat([getattr(rows, name) for rows in found]).cpu() for name in ("values", "indices"))
        index = torch.where(distances < least, places + number * AT_ONCE, index)
        least = torch.minimum(distances, least)
    return least, index


def share_of_pairs_closer(a: Float[Tensor, " n"], b: Float[Tensor, " m"]) -> float:
    """The chance that a random one of `a` is smaller than a random one of `b`, ties counted half: 0.5 where they
    are alike (the Mann-Whitney statistic over n m)."""
    from scipy.stats import mannwhitneyu  # a second to import

    return float(mannwhitneyu(b, a, method="asymptotic").statistic) / (len(a) * len(b))


def _rows(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """The matrix of Euclidean distances, some rows at a time, in float64."""
    y = exact(y)
    for part in exact(x).split(ROWS):
        yield torch.cdist(part, y)
