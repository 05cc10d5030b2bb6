"""Checks of metrics and extractor on this machine, by inputs with known results."""

import math

import torch
from torch import Tensor

from metrics.features import Extractor
from metrics.fidelity import classifier_score, kernel_distance
from metrics.frechet import frechet_distance, moments_of
from metrics.image_batches import image_batches
from metrics.manifold import count_neighbours
from metrics.scores import INCEPTION


def self_check(extractor: Extractor) -> str:
    """Run all checks; return a line for each, and one on which scores compare with the literature. Raises ValueError if
    one fails, as scores computed on this machine are then meaningless."""
    few, line = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), _line(*range(40))
    half_near = count_neighbours(_line(*range(20), *range(100, 120)), line)
    first_ten = count_neighbours(_line(*range(10)), line)  # their balls reach to 12, three beyond the last point
    # Two points each: means (1, 0) and (0, 0), standard deviations (8, 0)^(1/2) and (0, 2)^(1/2).
    pair = torch.tensor([[3.0, 0.0], [-1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, -1.0]])
    checks = [
        ("Fréchet distance of two Gaussians", frechet_distance(*map(moments_of, pair)), 1.0 + 8.0 + 2.0),
        ("Fréchet distance with fewer images than features", frechet_distance(moments_of(few), moments_of(few)), 0.0),
        ("precision", half_near["precision"].value, 0.5),
        ("recall", first_ten["recall"].value, 13 / 40),
        ("coverage", first_ten["coverage"].value, 12 / 40),
        # Constant features 1 against 0: (1 + 1)^3 + 1 - 2.
        ("kernel distance", kernel_distance(torch.ones(20, 1), torch.zeros(20, 1)).value, 7.0),
        # Confident predictions of four equally frequent classes have a score of four.
        ("inception score", classifier_score(1000 * torch.eye(4).repeat(10, 1), splits=1).value, 4.0),
    ]
    lines = [_verdict(*check, tolerance=1e-6) for check in checks]
    lines.append(_verdict("extraction in batches", _batch_dependence(extractor), 0.0, tolerance=1e-3))
    return "\n".join([*lines, _comparable(extractor)])


def _comparable(extractor: Extractor) -> str:
    """Say which scores of this extractor compare with published ones."""
    if extractor.kind != INCEPTION:
        return (
            f"Extractor {extractor.name} (sha256 {extractor.sha256[:12]}): its distances compare with others on the "
            "same file only, never with published FID, sFID, IS or KID."
        )
    if not extractor.published_weights:
        return (
            "These are not the weights that torch-fidelity publishes for Inception: the scores compare with nothing in "
            "the literature."
        )
    return (
        "Inception with torch-fidelity's published weights, converted from the graph of 2015 that ADM and EDM2 run: "
        "FID, IS and KID compare with theirs at equal samples, reference and number of images (docs/evaluation.md)."
    )


def _verdict(name: str, value: float | None, expected: float, *, tolerance: float) -> str:
    value = math.nan if value is None else value
    if not math.isclose(value, expected, rel_tol=tolerance, abs_tol=tolerance):
        raise ValueError(f"--self_check: {name} gave {value:.6g}, the known answer is {expected:.6g}")
    return f"ok  {name}: {value:.6g} (known answer {expected:.6g})"


def _batch_dependence(extractor: Extractor) -> float:
    """Return the relative difference of features between extraction in one batch and image by image."""
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = [extractor(image_batches(images, size), 5, progress=False).features for size in (5, 1)]
    batched, single = (torch.zeros(0) if rows is None else rows for rows in features)
    return ((batched - single).norm() / batched.norm().clamp(min=1e-12)).item()


def _line(*numbers: int) -> Tensor:
    return torch.tensor(numbers).double()[:, None]
