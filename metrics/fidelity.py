"""Features to scores: the only caller of torch-fidelity's metrics.

`compare` scores features (`metrics.features.Extractor`); `score` does both steps. Only on Inception do scores bear the
names FID, sFID, IS and KID, under which the literature prints them. On anything else they are named by their extractor
and compare with each other alone. docs/evaluation.md tells what each is worth.

Nothing is cached: torch-fidelity keys its cache by the name that a caller gives, which outlives what the name
meant.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch_fidelity
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from metrics.extractors import INCEPTION
from metrics.features import METRICS, Extractor, Features
from metrics.frechet import frechet_distance, moments_of
from metrics.image_batches import Images, image_batches
from metrics.manifold import density_and_coverage


@dataclass(frozen=True)
class Score:
    """One number, its spread where it has one and what that is, or the reason why there is no number."""

    value: float | None
    std: float | None = None
    reason: str | None = None
    spread: str | None = None

    def __str__(self) -> str:
        if self.value is None:
            return f"none: {self.reason}"
        return f"{self.value:.4f}" + ("" if self.std is None else f" ± {self.std:.4f}")


@dataclass(frozen=True)
class Scores:
    """Scores by name, and all that it takes to derive them again from the same images.

    `extractor_sha256` is of a program's file, else of the loaded weights, wherever they came from.
    """

    scores: dict[str, Score]
    extractor: str
    extractor_sha256: str
    num_samples: int
    num_reference: int
    num_features: int
    settings: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(
        default_factory=lambda: {
            "torch_fidelity": torch_fidelity.__version__,
            "torch": str(torch.__version__),
        }
    )

    def to_dict(self) -> dict[str, object]:
        """Plain containers, as JSON takes them."""
        return asdict(self)

    def to_json(self) -> str:
        """Strict JSON: no NaN, `null` where there is no value."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False)

    def table(self) -> str:
        """A Markdown table that is also aligned for the terminal, a score a row."""
        rows = [(name, str(score), self.extractor) for name, score in self.scores.items()]
        rows = [("metric", "value", "extractor"), *rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
        rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
        return "\n".join([lines[0], rule, *lines[1:]])


def score(
    samples: Images,
    reference: Images,
    *,
    extractor: str | Path | Extractor = INCEPTION,
    metrics: Sequence[str] = METRICS,
    batch_size: int = 64,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    weights_path: str | Path | None = None,
    neighbourhood: int = 3,
    kid_subsets: int = 100,
    kid_subset_size: int = 1000,
    is_splits: int = 10,
    seed: int = 0,
    progress: bool = True,
) -> Scores:
    """Score samples against a reference: `Extractor` on both, then `compare`, whose arguments are told there.

    Raises:
        ExtractorError: for an extractor that cannot be had or used.
        ValueError: for an unknown metric, an empty set, or images that are not uint8 RGB.
    """
    check_metrics(metrics)
    if not isinstance(extractor, Extractor):
        extractor = Extractor(extractor, weights_path=weights_path, device=device)

    def extract(images: Images, desc: str) -> Features:
        batches = image_batches(images, batch_size, num_workers=num_workers)
        num_images = len(images)  # pyright: ignore[reportArgumentType]
        return extractor(batches, num_images, metrics=metrics, progress=progress, desc=desc)

    return compare(
        extract(samples, "samples"),
        extract(reference, "reference"),
        extractor,
        metrics=metrics,
        neighbourhood=neighbourhood,
        kid_subsets=kid_subsets,
        kid_subset_size=kid_subset_size,
        is_splits=is_splits,
        seed=seed,
    )


NAEEM_NEIGHBOURHOOD = 5


def compare(
    samples: Features,
    reference: Features,
    extractor: Extractor,
    *,
    metrics: Sequence[str] = METRICS,
    neighbourhood: int = 3,
    kid_subsets: int = 100,
    kid_subset_size: int = 1000,
    is_splits: int = 10,
    seed: int = 0,
) -> Scores:
    """Scores of features, in float64. What too few images do not allow is None, with the reason.

    - `fid`: Fréchet distance of the Gaussians fitted to both sets, >= 0, lower is better (Heusel et al.
      2017). With fewer images than features their covariances are singular: compare only scores of as many
      images. `sfid`: the same of Inception's spatial features (Nash et al. 2021).
    - `is`: exp of the mean divergence between a sample's class probabilities and their average, from 1 to the
      number of classes, over `is_splits` parts of the shuffled samples (Salimans et al. 2016). Blind to the
      reference, and low by a bias that falls with the images of a part: compare equal counts and splits alone.
    - `kid`: unbiased squared MMD with a cubic kernel, near 0 and even below it for equal distributions, over
      `kid_subsets` random subsets of `kid_subset_size`, cut to the smaller set (Bińkowski et al. 2018).
    - `precision`: share of the samples that lie within the reference's manifold, the union of balls that
      reach to each image's k-th neighbour, k = `neighbourhood`; `recall`: share of the reference within the
      samples' manifold (Kynkäänniemi et al. 2019). Both in [0, 1].
    - `density`, `coverage`: see `metrics.manifold`; their neighbourhood is 5, its authors' (Naeem et al. 2020).

    `settings` records what was used: the subset size after the cut, one subset where the subset is the whole
    of both sets (and no standard deviation: there is nothing to vary).

    Raises:
        ValueError: for an unknown metric or a setting out of range.
    """
    check_metrics(metrics)
    if min(neighbourhood, kid_subsets, kid_subset_size, is_splits) < 1:
        raise ValueError("neighbourhood, kid_subsets, kid_subset_size and is_splits: each must be at least 1")
    smaller, larger = sorted((samples.num, reference.num))
    kid_subset_size = min(kid_subset_size, smaller)
    kid_subsets = kid_subsets if kid_subset_size < larger else 1
    x = y = None
    if samples.features is not None and reference.features is not None:
        x, y = samples.features.double(), reference.features.double()
    no_features = Score(None, reason="the reference holds moments, not the features of each image")

    def frechet() -> dict[str, Score]:
        if samples.num < 2:
            return {"fid": _too_few(samples.num, 2)}
        return {"fid": _score(frechet_distance(samples.moments, reference.moments))}

    def spatial_frechet() -> dict[str, Score]:
        if samples.spatial is None or reference.spatial is None:
            return {"sfid": Score(None, reason=f"{extractor.name} has no spatial features; Inception has")}
        if samples.num < 2:
            return {"sfid": _too_few(samples.num, 2)}
        return {"sfid": _score(frechet_distance(samples.spatial, reference.spatial))}

    def inception_score() -> dict[str, Score]:
        if samples.logits is None:
            return {"is": Score(None, reason=f"{extractor.name} has no class probabilities")}
        if samples.num < 2 * is_splits:  # a part of one image scores 1, whatever the image
            return {"is": _too_few(samples.num, 2 * is_splits)}
        value = isc_features_to_metric(samples.logits, splits=is_splits, rng_seed=seed)
        std = value["inception_score_std"] if is_splits > 1 else None
        return {"is": _score(value["inception_score_mean"], std, f"standard deviation over {is_splits} splits")}

    def kernel_distance() -> dict[str, Score]:
        if x is None or y is None:
            return {"kid": no_features}
        if kid_subset_size < 2:
            return {"kid": _too_few(kid_subset_size, 2)}
        sizes = {"kid_subsets": kid_subsets, "kid_subset_size": kid_subset_size}
        value = kid_features_to_metric(x, y, **sizes, rng_seed=seed, verbose=False)
        std = value["kernel_inception_distance_std"] if kid_subsets > 1 else None
        over = f"standard deviation over {kid_subsets} subsets of {kid_subset_size} images, no standard error"
        return {"kid": _score(value["kernel_inception_distance_mean"], std, over)}

    def precision_recall() -> dict[str, Score]:
        if x is None or y is None:
            return dict.fromkeys(("precision", "recall"), no_features)
        if smaller <= neighbourhood:
            return dict.fromkeys(("precision", "recall"), _too_few(smaller, neighbourhood + 1))
        # torch-fidelity takes the generated features first.
        value = prc_features_to_metric(
            x, y, prc_neighborhood=neighbourhood, prc_batch_size=2048, save_cpu_ram=True, verbose=False
        )
        return {name: _score(value[name]) for name in ("precision", "recall")}

    def density_coverage() -> dict[str, Score]:
        if x is None or y is None:
            return dict.fromkeys(("density", "coverage"), no_features)
        if reference.num <= NAEEM_NEIGHBOURHOOD:
            return dict.fromkeys(("density", "coverage"), _too_few(reference.num, NAEEM_NEIGHBOURHOOD + 1))
        density, coverage = density_and_coverage(x, y, NAEEM_NEIGHBOURHOOD)
        return {"density": _score(density), "coverage": _score(coverage)}

    families: dict[tuple[str, ...], Callable[[], dict[str, Score]]] = {
        ("fid",): frechet,
        ("sfid",): spatial_frechet,
        ("is",): inception_score,
        ("kid",): kernel_distance,
        ("precision", "recall"): precision_recall,
        ("density", "coverage"): density_coverage,
    }
    scores = {}
    for names, family in families.items():
        if wanted := set(names) & set(metrics):
            scores |= {
                metric_name(name, extractor.kind, extractor.name): one
                for name, one in family().items()
                if name in wanted
            }

    settings = {
        "neighbourhood": neighbourhood,
        "density_neighbourhood": NAEEM_NEIGHBOURHOOD,
        "kid_subsets": kid_subsets,
        "kid_subset_size": kid_subset_size,
        "is_splits": is_splits,
        "seed": seed,
    }
    dim = len(samples.moments.mean)
    return Scores(scores, extractor.name, extractor.sha256, samples.num, reference.num, dim, settings)


ELSEWHERE = {
    "fid": "frechet_distance",
    "sfid": "spatial_frechet_distance",
    "is": "classifier_score",
    "kid": "kernel_distance",
}
LOWER_IS_BETTER = {"fid", "sfid", "kid", "frechet_distance", "spatial_frechet_distance", "kernel_distance"}


def metric_name(metric: str, kind: str, name: str) -> str:
    """What a metric may be called on an extractor of this kind and name: FID, IS and KID are Inception's, precision and
    recall are anyone's."""
    return metric if kind == INCEPTION or metric not in ELSEWHERE else f"{ELSEWHERE[metric]}[{name}]"


def is_lower_better(metric: str) -> bool:
    """Of a metric, whatever extractor it is on, or of a loss."""
    return metric.partition("[")[0] in LOWER_IS_BETTER or metric.startswith("validation_")


def class_distances(samples: Features, reference: Features, min_images: int = 50) -> dict[int, Score]:
    """Fréchet distance within each class of the reference; None, with the reason, where either has too few images.

    Raises:
        ValueError: when either set has no labels.
    """
    if samples.features is None or reference.features is None or samples.labels is None or reference.labels is None:
        raise ValueError("--per_class: it needs samples and reference with a class each")
    scores = {}
    for label in reference.labels.unique().tolist():
        pair = [each.features[each.labels == label] for each in (samples, reference)]  # pyright: ignore
        fewest = min(map(len, pair))
        enough = fewest >= max(2, min_images)
        scores[label] = (
            _score(frechet_distance(*(moments_of(rows) for rows in pair)))
            if enough
            else _too_few(fewest, max(2, min_images))
        )
    return scores


def _score(value: float, std: float | None = None, spread: str | None = None) -> Score:
    if not math.isfinite(value):
        return Score(None, reason=f"it came out as {value}")
    return Score(float(value), std, spread=None if std is None else spread)


def _too_few(num_images: int, needed: int) -> Score:
    return Score(None, reason=f"too few images: {num_images}, and it needs {needed}")


def check_metrics(metrics: Sequence[str]) -> None:
    """Fail in words for a metric that there is not.

    Raises:
        ValueError: naming it.
    """
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise ValueError(f"--metrics {','.join(unknown) or '(none)'}: choose from {', '.join(METRICS)}")
