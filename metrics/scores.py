"""The table of metrics, `METRICS`, used by help texts, checks, tables and `log.best`. It imports nothing heavy."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from inspect import Parameter, signature
from pkgutil import resolve_name
from typing import Any

INCEPTION = "inception"  # the extractor with which scores have the names of the literature
PER_IMAGE = {"features", "logits", "images", "labelled"}  # needs whose memory grows with the number of images
MISSING = {  # the possible needs of a metric, and the reason to give if they are missing
    "features": "the reference holds moments, not the features of each image",
    "logits": "{extractor} has no class probabilities",
    "images": "the reference holds no images",
    "labelled": "it needs samples, held-out images and training images of the same classes",
    "moments": "there are no moments of the features",
    "spatial": "{extractor} has no spatial features; Inception has",
}


@dataclass(frozen=True)
class Score:
    """A score, or the reason why there is none."""

    value: float | None
    std: float | None = None
    reason: str | None = None  # why `value` is None
    spread: str | None = None  # what `std` is, such as a standard error over so many images


def too_few(num_images: int, needed: int) -> Score:
    return Score(None, reason=f"too few images: {num_images}, and it needs {needed}")


@dataclass(frozen=True)
class Metric:
    """A score of samples against a reference.

    Args:
        compute: a function, or its place as "module:function". Its arguments are what `needs` names, for the samples
            and (with `reference`) for the reference. It returns a number, a `Score`, or a dictionary with the scores of
            several metrics, for which it is called once. Its keyword arguments are recorded; one named `seed` is set to
            the evaluation's seed
        better: "lower" or "higher"
        needs: "features" ([n d] in float64, on the extractor's device if that supports it), "logits" ([n k]), "images"
            (uint8 [n 3 h w], all in memory), "moments" or "spatial" (`metrics.frechet.Moments` of the features, or of
            Inception's spatial features), or "labelled" (`metrics.agreement.Labelled`: features and classes; for the
            reference, also a probe of the training images)
        title: heading of its column; by default its name
        elsewhere: name and title with extractors other than Inception, where the literature's would mislead
        bounds: a value outside is treated as no score
        digits: decimals to print; by default 4 for values below 10, otherwise 2
        reference: whether it uses the reference
        teaches: whether it trains on the samples and tests on the reference; then these must not be the same images
        summary: a phrase for help texts
    """

    compute: Callable[..., float | Score | dict[str, Score]] | str
    better: str
    needs: str = "features"
    title: str = ""
    elsewhere: tuple[str, str] | None = None
    bounds: tuple[float, float] = (-math.inf, math.inf)
    digits: int | None = None
    reference: bool = True
    teaches: bool = False
    summary: str = ""

    def __post_init__(self) -> None:
        for fact, choices in {"better": ("lower", "higher"), "needs": MISSING}.items():
            if (value := getattr(self, fact)) not in choices:
                raise ValueError(f"a metric's {fact} is one of {', '.join(choices)}, not {value}")

    def call(self, inputs: Iterable[object], seed: int) -> tuple[Any, dict[str, Any]]:
        """Call the function; return its result and the keyword arguments that it was called with."""
        function = resolve_name(self.compute) if isinstance(self.compute, str) else self.compute
        parameters = signature(function).parameters.values()
        keyword_only = [parameter for parameter in parameters if parameter.kind is Parameter.KEYWORD_ONLY]
        settings = {parameter.name: parameter.default for parameter in keyword_only}
        settings |= {"seed": seed} if "seed" in settings else {}
        return function(*inputs, **settings), settings

    def checked(self, result: Any) -> Score:
        """Convert a result to a score; a number that is not finite or out of bounds becomes None, with a reason."""
        score = result if isinstance(result, Score) else Score(float(result))
        low, high = self.bounds
        if score.value is None or (math.isfinite(score.value) and low <= score.value <= high):
            return score
        return Score(None, reason=f"it came out as {score.value}")


SHARE, POSITIVE = (0.0, 1.0), (0.0, math.inf)
FRECHET, NEIGHBOURS = "metrics.frechet:frechet_score", "metrics.manifold:count_neighbours"
CLASSIFIER, KERNEL = "metrics.fidelity:classifier_score", "metrics.fidelity:kernel_distance"
EXTRAPOLATED = "metrics.frechet:extrapolated_distance"
PROBE, TAUGHT = "metrics.agreement:class_agreement", "metrics.agreement:classification_accuracy"
INFINITY, CLASSES = ("frechet_distance_infinity", "Fréchet∞"), {"needs": "labelled", "bounds": SHARE, "digits": 4}
SUMMARIES = {
    "fid": "Fréchet distance of Gaussians fitted to the features (Heusel et al. 2017)",
    "sfid": "the same on Inception's spatial features (Nash et al. 2021)",
    "is": "Inception Score, exp of the mean KL divergence of class predictions from their mean (Salimans et al. 2016)",
    "kid": "unbiased squared MMD with a cubic kernel (Bińkowski et al. 2018)",
    "precision": "fraction of samples inside the manifold of real images, by k nearest neighbours",
    "recall": "fraction of real images inside the manifold of samples (Kynkäänniemi et al. 2019)",
    "density": "mean number of real images' neighbourhoods that hold a sample, divided by k",
    "coverage": "fraction of real images whose neighbourhood holds a sample (Naeem et al. 2020)",
    "fid_infinity": "FID extrapolated to infinitely many samples (Chong and Forsyth 2020)",
    "agreement": "accuracy on samples of a linear probe that was trained on real images",
    "agreement_top5": "its top-5 accuracy",
    "cas": "accuracy on real images of a linear probe that was trained on samples (Ravuri and Vinyals 2019)",
}
METRICS: dict[str, Metric] = {
    "fid": Metric(FRECHET, "lower", "moments", "FID", ("frechet_distance", "Fréchet"), POSITIVE),
    "sfid": Metric(FRECHET, "lower", "spatial", "sFID", ("spatial_frechet_distance", "spatial Fréchet"), POSITIVE),
    "is": Metric(CLASSIFIER, "higher", "logits", "IS", ("classifier_score", "classifier score"), POSITIVE, None, False),
    "kid": Metric(KERNEL, "lower", title="KID", elsewhere=("kernel_distance", "kernel distance")),
    "precision": Metric(NEIGHBOURS, "higher", bounds=SHARE, digits=4),
    "recall": Metric(NEIGHBOURS, "higher", bounds=SHARE, digits=4),
    "density": Metric(NEIGHBOURS, "higher", bounds=POSITIVE, digits=4),
    "coverage": Metric(NEIGHBOURS, "higher", bounds=SHARE, digits=4),
    "fid_infinity": Metric(EXTRAPOLATED, "lower", title="FID∞", elsewhere=INFINITY, bounds=POSITIVE),
    **{name: Metric(PROBE, "higher", elsewhere=(name, name), **CLASSES) for name in ("agreement", "agreement_top5")},
    "cas": Metric(TAUGHT, "higher", elsewhere=("cas", "cas"), teaches=True, **CLASSES),
}
METRICS = {name: replace(row, summary=SUMMARIES[name]) for name, row in METRICS.items()}
OTHER_SCORES = {  # not of samples: a training's loss on held-out images, and how an autoencoder reconstructs them
    "validation_loss": Metric("training.inspection:Inspections.validate", "lower", title="held-out loss", digits=4),
    "psnr": Metric("metrics.pixelwise:psnr", "higher"),
    "lpips": Metric("metrics.perceptual:LPIPSFeatures", "lower"),
}
DEFAULT = tuple(METRICS)[:8]  # without metrics that are slow, need classes, or are registered from outside
HELP = "; ".join(f"{name} ({row.better} is better): {row.summary}" for name, row in METRICS.items())


def check_metrics(names: Iterable[str]) -> None:
    """Raise `ValueError` for names that are not in `METRICS`, or if there are no names."""
    unknown = [name for name in names if name not in METRICS]
    if unknown or not list(names):
        raise ValueError(f"--metrics {','.join(unknown) or '(none)'}: choose from {', '.join(METRICS)}")


def check_per_image(flag: str, names: Iterable[str]) -> None:
    """Raise `ValueError`, naming a flag that needs each image's features, if no metric of these names keeps them."""
    if not required_features(names) & PER_IMAGE:
        raise ValueError(f"{flag}: it looks at images one by one; give --metrics one that does, such as kid")


def required_features(names: Iterable[str]) -> set[str]:
    names = list(names)
    check_metrics(names)
    return {METRICS[name].needs for name in names}


def metric_name(metric: str, kind: str, extractor: str) -> str:
    """Return the name of a score with an extractor, such as `fid` with Inception, and `frechet_distance[vgg16]`."""
    elsewhere = METRICS[metric].elsewhere
    return metric if kind == INCEPTION or elsewhere is None else f"{elsewhere[0]}[{extractor}]"


def find_metric(score: str) -> tuple[str, Metric | None]:
    """Return name and row, None if unknown, of the metric of a score such as "frechet_distance[vgg16]"."""
    name = score.partition("[")[0].partition(",")[0]
    for metric, row in {**METRICS, **OTHER_SCORES}.items():
        if name == metric or (row.elsewhere and name == row.elsewhere[0]):
            return metric, row
    return name, None


def is_lower_better(score: str) -> bool | None:
    """Whether lower is better for a score, with any extractor; None if unknown."""
    row = find_metric(score)[1]
    return None if row is None else row.better == "lower"


def column_title(score: str) -> str:
    """Return the heading of a score's column, with an arrow that points to better values."""
    name, row = find_metric(score)
    if row is None:
        return name
    title = row.elsewhere[1] if row.elsewhere and name != score.partition(",")[0] else row.title or name
    return f"{title} {'↓' if row.better == 'lower' else '↑'}"


def num_digits(score: str) -> int | None:
    row = find_metric(score)[1]
    return None if row is None else row.digits
