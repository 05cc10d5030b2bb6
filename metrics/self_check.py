"""Are the metrics and the extractor on this machine what they should be? Inputs with known answers tell."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from metrics.extractors import INCEPTION
from metrics.features import Extractor, Features
from metrics.fidelity import compare
from metrics.image_batches import image_batches


class SelfCheckError(ValueError):
    """A check that failed: scores of this machine mean nothing until it is mended."""


def self_check(extractor: Extractor) -> str:
    """Run every check; what each found, a line each, and what may be compared with the literature.

    Raises:
        SelfCheckError: naming the check that failed, what it should give and what it gave.
    """
    lines = []
    for name, check in CHECKS.items():
        got, expected, tolerance = check(extractor)
        if not math.isclose(got, expected, rel_tol=tolerance, abs_tol=tolerance):
            raise SelfCheckError(f"--self_check: {name} gave {got:.6g}, the known answer is {expected:.6g}")
        lines.append(f"ok  {name}: {got:.6g} (known answer {expected:.6g})")
    return "\n".join([*lines, comparable(extractor)])


def comparable(extractor: Extractor) -> str:
    """Which numbers compare with published ones."""
    if extractor.kind != INCEPTION:
        return (
            f"Extractor {extractor.name} (sha256 {extractor.sha256[:12]}): its distances compare with others on the "
            "same file alone, never with published FID, sFID, IS or KID."
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


def _identity(features: torch.Tensor, logits: torch.Tensor | None = None) -> Features:
    return Features.of(features.double(), logits)


def _gaussians(extractor: Extractor) -> tuple[float, float, float]:
    """Diagonal Gaussians: |m_a - m_b|^2 + sum (s_a - s_b)^2."""
    a, b = torch.tensor([[3.0, 0.0], [-1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, -1.0]])
    # Two points each: means (1, 0) and (0, 0), standard deviations (8, 0)^(1/2) and (0, 2)^(1/2).
    scores = compare(_identity(a), _identity(b), extractor, metrics=["fid"])
    return _first(scores), 1.0 + 8.0 + 2.0, 1e-6


def _fewer_images_than_features(extractor: Extractor) -> tuple[float, float, float]:
    """Equal sets of 8 images with 64 features: singular covariances, distance 0."""
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    return _first(compare(_identity(x), _identity(x), extractor, metrics=["fid"])), 0.0, 1e-6


def _line(start: int, stop: int) -> Features:
    return _identity(torch.arange(start, stop).double()[:, None])


def _precision(extractor: Extractor) -> tuple[float, float, float]:
    """Samples 0..19 and 100..119 against 0..39: half of them are near."""
    samples = _identity(torch.cat([torch.arange(20), torch.arange(100, 120)])[:, None])
    return _first(compare(samples, _line(0, 40), extractor, metrics=["precision"])), 0.5, 1e-6


def _recall(extractor: Extractor) -> tuple[float, float, float]:
    """Samples 0..9 against 0..39: they reach to 12, three neighbours beyond their edge."""
    return _first(compare(_line(0, 10), _line(0, 40), extractor, metrics=["recall"])), 13 / 40, 1e-6


def _coverage(extractor: Extractor) -> tuple[float, float, float]:
    """Samples 0..9 against 0..39: balls within 5 neighbours of a sample are covered."""
    return _first(compare(_line(0, 10), _line(0, 40), extractor, metrics=["coverage"])), 12 / 40, 1e-6


def _kernel(extractor: Extractor) -> tuple[float, float, float]:
    """Constant features 1 against 0: (1 + 1)^3 + 1 - 2."""
    ones, zeros = torch.ones(20, 1), torch.zeros(20, 1)
    return _first(compare(_identity(ones), _identity(zeros), extractor, metrics=["kid"])), 7.0, 1e-6


def _inception(extractor: Extractor) -> tuple[float, float, float]:
    """Sure of each image, four classes as often: the score is four."""
    logits = 1000 * torch.eye(4).repeat(10, 1)
    features = _identity(torch.zeros(40, 1), logits)
    return _first(compare(features, features, extractor, metrics=["is"], is_splits=1)), 4.0, 1e-6


def _extraction(extractor: Extractor) -> tuple[float, float, float]:
    """Features of an image do not depend on the images beside it."""
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    together = extractor(image_batches(images, 5), 5, progress=False, metrics=["kid"]).features
    alone = extractor(image_batches(images, 1), 5, progress=False, metrics=["kid"]).features
    assert together is not None  # kid keeps them
    assert alone is not None
    return ((together - alone).norm() / together.norm().clamp(min=1e-12)).item(), 0.0, 1e-3


def _first(scores) -> float:
    score = next(iter(scores.scores.values()))
    return float("nan") if score.value is None else score.value


CHECKS: dict[str, Callable[[Extractor], tuple[float, float, float]]] = {
    "Fréchet distance of two Gaussians": _gaussians,
    "Fréchet distance with fewer images than features": _fewer_images_than_features,
    "precision": _precision,
    "recall": _recall,
    "coverage": _coverage,
    "kernel distance": _kernel,
    "inception score": _inception,
    "extraction in batches": _extraction,
}
