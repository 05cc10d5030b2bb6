"""Features to scores: the only caller of torch-fidelity's metrics. Only on Inception do scores bear the names FID,
sFID, IS and KID; on anything else they are named by their extractor."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from machine.precision import exact
from metrics.features import Extractor, Features
from metrics.frechet import frechet_distance, moments_of
from metrics.scores import DEFAULT, METRICS, MISSING, Score, check_metrics, metric_name, too_few


@dataclass(frozen=True)
class Scores:
    """Scores by name; `settings` holds what each metric's function was told, such as the number of splits or a seed."""

    scores: dict[str, Score]
    num_samples: int
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)


def compare(
    samples: Features, reference: Features, extractor: Extractor, *, metrics: Sequence[str] = DEFAULT, seed: int = 0
) -> Scores:
    """Scores of features, in float64. What too few images do not allow is None, with the reason."""
    check_metrics(metrics)
    scores, settings, answers = {}, {}, {}
    for name in (name for name in METRICS if name in metrics):
        metric, printed = METRICS[name], metric_name(name, extractor.kind, extractor.name)
        inputs = [getattr(one, metric.needs) for one in (samples, reference)[: 1 + metric.reference]]
        if any(one is None for one in inputs):
            scores[printed] = Score(None, reason=MISSING[metric.needs].format(extractor=extractor.name))
            continue
        call = metric.compute, metric.needs  # some compute several scores at once
        if call not in answers:
            if metric.needs == "features":
                inputs = [exact(one.to(extractor.device)) for one in inputs]
            answers[call] = metric.call(inputs, seed)
        answer, settings[name] = answers[call]
        scores[printed] = metric.checked(answer[name] if isinstance(answer, dict) else answer)
    return Scores(scores, samples.num, settings)


def classifier_score(logits: Float[Tensor, "n k"], *, splits: int = 10, seed: int = 0) -> Score:
    """exp of the mean divergence between an image's class probabilities and their average, over parts of the shuffled
    samples (Salimans et al. 2016). Blind to the reference, and low by a bias that falls with the images of a part."""
    if len(logits) < 2 * splits:  # a part of one image scores 1, whatever the image
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
    """Unbiased squared MMD with a cubic kernel, near 0 and even below it for equal distributions, over random subsets,
    which are cut to the smaller set; over one, where that is the whole of both sets (Bińkowski et al. 2018)."""
    smaller, larger = sorted((len(samples), len(reference)))
    if smaller < 2:
        return too_few(smaller, 2)
    size = min(subset_size, smaller)
    subsets = subsets if size < larger else 1
    over: dict[str, Any] = {"kid_subsets": subsets, "kid_subset_size": size, "rng_seed": seed}
    result = kid_features_to_metric(samples, reference, verbose=False, **over)
    spread = f"{subsets} subsets of {size} images, no standard error"
    return _mean(result, "kernel_inception_distance", subsets, spread)


def _mean(result: dict[str, float], name: str, num: int, over: str) -> Score:
    """Of torch-fidelity's over `num` parts; of one there is no spread."""
    if num == 1:
        return Score(result[f"{name}_mean"])
    return Score(result[f"{name}_mean"], result[f"{name}_std"], spread=f"standard deviation over {over}")


def class_distances(samples: Features, reference: Features, min_images: int = 50) -> dict[int, Score]:
    """Fréchet distance within each class of the reference; None, with the reason, where either has too few images."""
    if samples.features is None or reference.features is None or samples.labels is None or reference.labels is None:
        raise ValueError("--per_class: it needs samples and reference with a class each")
    scores = {}
    for label in reference.labels.unique().tolist():
        pair = samples.features[samples.labels == label], reference.features[reference.labels == label]
        fewest = min(map(len, pair))
        enough = fewest >= min_images
        scores[label] = Score(frechet_distance(*map(moments_of, pair))) if enough else too_few(fewest, min_images)
    return scores
