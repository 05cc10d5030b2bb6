"""Computation of scores from features, partly by torch-fidelity. Scores are called FID, sFID, IS and KID only with
Inception; with other extractors, their names include the extractor's."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from machine.precision import to_float64
from metrics.features import Extractor, Features
from metrics.frechet import frechet_distance, moments_of
from metrics.scores import DEFAULT, METRICS, MISSING, Score, check_metrics, metric_name, too_few


@dataclass(frozen=True)
class Scores:
    """Scores by name; `settings` holds each metric's keyword arguments, such as the number of splits or a seed."""

    scores: dict[str, Score]
    num_samples: int
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)


def compute_scores(
    samples: Features, reference: Features, extractor: Extractor, *, metrics: Sequence[str] = DEFAULT, seed: int = 0
) -> Scores:
    """Compute metrics from features, in float64; scores that too few images do not allow are None, with a reason."""
    check_metrics(metrics)
    scores, settings, results = {}, {}, {}
    for name in (name for name in METRICS if name in metrics):
        metric, score_name = METRICS[name], metric_name(name, extractor.kind, extractor.name)
        inputs = [getattr(features, metric.needs) for features in (samples, reference)[: 1 + metric.reference]]
        if any(value is None for value in inputs):
            scores[score_name] = Score(None, reason=MISSING[metric.needs].format(extractor=extractor.name))
            continue
        call = metric.compute, metric.needs  # metrics that share a function share its call
        if call not in results:
            if metric.needs == "features":
                inputs = [to_float64(value.to(extractor.device)) for value in inputs]
            results[call] = metric.call(inputs, seed)
        result, settings[name] = results[call]
        scores[score_name] = metric.checked(result[name] if isinstance(result, dict) else result)
    return Scores(scores, samples.num, settings)


def classifier_score(logits: Float[Tensor, "n k"], *, splits: int = 10, seed: int = 0) -> Score:
    """Inception score: exp of the mean KL divergence of class probabilities from their average, over splits of the
    shuffled samples (Salimans et al. 2016). It ignores the reference, and is biased low with few images in a split."""
    if len(logits) < 2 * splits:  # a split of one image always scores 1
        return too_few(len(logits), 2 * splits)
    result = isc_features_to_metric(logits, splits=splits, rng_seed=seed)
    return _mean(result, "inception_score", splits, f"{splits} splits")


def kernel_distance(
    samples: Float[Tensor, "n d"],
    reference: Float[Tensor, "m d"],
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> Score:
    """KID: unbiased squared MMD with a cubic kernel, averaged over random subsets (Bińkowski et al. 2018).

    Subsets are no larger than the smaller set; if a subset is the whole of both sets, there is only one. For equal
    distributions the result is near 0 and may be negative.
    """
    smaller, larger = sorted((len(samples), len(reference)))
    if smaller < 2:
        return too_few(smaller, 2)
    size = min(subset_size, smaller)
    subsets = subsets if size < larger else 1
    options: dict[str, Any] = {"kid_subsets": subsets, "kid_subset_size": size, "rng_seed": seed}
    result = kid_features_to_metric(samples, reference, verbose=False, **options)
    spread = f"{subsets} subsets of {size} images, no standard error"
    return _mean(result, "kernel_inception_distance", subsets, spread)


def _mean(result: dict[str, float], name: str, num: int, over: str) -> Score:
    """Convert torch-fidelity's mean and standard deviation over `num` parts to a score; one part has no spread."""
    if num == 1:
        return Score(result[f"{name}_mean"])
    return Score(result[f"{name}_mean"], result[f"{name}_std"], spread=f"standard deviation over {over}")


def class_distances(samples: Features, reference: Features, min_images: int = 50) -> dict[int, Score]:
    """Compute the Fréchet distance within each class; None, with a reason, for classes with too few images."""
    if samples.features is None or reference.features is None or samples.labels is None or reference.labels is None:
        raise ValueError("--per_class: it needs samples and reference with a class each")
    scores = {}
    for label in reference.labels.unique().tolist():
        pair = samples.features[samples.labels == label], reference.features[reference.labels == label]
        fewest = min(map(len, pair))
        enough = fewest >= min_images
        scores[label] = Score(frechet_distance(*map(moments_of, pair))) if enough else too_few(fewest, min_images)
    return scores
