"""Metrics as rows of one table, `METRICS`, for help, checks, tables and `log.best`. Nothing heavy is imported here."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from inspect import Parameter, signature
from pkgutil import resolve_name
from typing import Any

INCEPTION = "inception"  # the extractor on which alone scores bear the literature's names
PER_IMAGE = {"features", "logits", "images", "labelled"}  # needs that memory grows with
MISSING = {  # what a metric may need, and why its number cannot be had where that is not there
    "features": "the reference holds moments, not the features of each image",
    "logits": "{extractor} has no class probabilities",
    "images": "the reference holds no images",
    "labelled": "it needs samples, held-out images and training images of the same classes",
    "moments": "there are no moments of the features",
    "spatial": "{extractor} has no spatial features; Inception has",
}


@dataclass(frozen=True)
class Score:
    """One number, its spread where it has one and what that is, or the reason why there is no number."""

    value: float | None
    std: float | None = None
    reason: str | None = None
    spread: str | None = None


def too_few(num_images: int, needed: int) -> Score:
    return Score(None, reason=f"too few images: {num_images}, and it needs {needed}")


@dataclass(frozen=True)
class Metric:
    """A score of samples against a reference.

    Args:
        compute: what `needs` names, of the samples and (with `reference`) of the reference, to a number, a `Score`, or
            the scores of several metrics by name, which it is then called for once; or where it lies, as
            "module:function". Its keyword arguments are recorded; one called `seed` is given the evaluation's
        better: "lower" or "higher"
        needs: "features" (an extractor's [n d] in float64, on its device where that has it), "logits" (the classes'
            [n k]; their softmax are probabilities), "images" (uint8 [n 3 h w]; all in memory), "moments" or "spatial"
            (`metrics.frechet.Moments` of the features, or of Inception's spatial ones), or "labelled"
            (`metrics.agreement.Labelled`: features and classes; the reference's with a probe of the training images)
        title: at the head of a column; by default its name
        elsewhere: name and title on any extractor but Inception, where the literature's would mislead
        bounds: no number outside of these is printed
        digits: printed after the point; by default 4 below 10, else 2
        reference: whether it looks at the reference
        teaches: whether it learns from the samples what it asks of the reference's images, which they then must not be
        summary: what it is, in a phrase
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
        """What the function says of its inputs, and its keyword arguments."""
        function = resolve_name(self.compute) if isinstance(self.compute, str) else self.compute
        parameters = signature(function).parameters.values()
        settings = {one.name: one.default for one in parameters if one.kind is Parameter.KEYWORD_ONLY}
        settings |= {"seed": seed} if "seed" in settings else {}
        return function(*inputs, **settings), settings

    def checked(self, result: Any) -> Score:
        """As a score; a number that is not finite or out of bounds is none."""
        score = result if isinstance(result, Score) else Score(float(result))
        low, high = self.bounds
        if score.value is None or (math.isfinite(score.value) and low <= score.value <= high):
            return score
        return Score(None, reason=f"it came out as {score.value}")


SHARE, POSITIVE = (0.0, 1.0), (0.0, math.inf)
FRECHET, NEIGHBOURS = "metrics.frechet:frechet_score", "metrics.manifold:count_neighbours"
CLASSIFIER, KERNEL = "metrics.fidelity:classifier_score", "metrics.fidelity:kernel_distance"
EXTRAPOLATED, PROBE = "metrics.frechet:extrapolated_distance", "metrics.agreement:class_agreement"
INFINITY, CLASSES = ("frechet_distance_infinity", "Fréchet∞"), {"needs": "labelled", "bounds": SHARE, "digits": 4}
SUMMARIES = {
    "fid": "Fréchet distance of Gaussians fitted to the features",
    "sfid": "the same on Inception's spatial features",
    "is": "sure of each image, and of all classes as often",
    "kid": "unbiased squared MMD with a cubic kernel",
    "precision": "share of the samples in the reference's manifold",
    "recall": "share of the reference in the samples' manifold",
    "density": "how many balls around reference images hold a sample",
    "coverage": "share of these balls that hold any sample",
    "fid_infinity": "the Fréchet distance that endlessly many samples would have",
    "agreement": "share of the samples that a linear probe of the training images takes for their class",
    "agreement_top5": "share whose class is among its five best guesses",
    "cas": "share of the held-out images that a linear probe of the samples takes for their class",
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
    "cas": Metric(PROBE, "higher", elsewhere=("cas", "cas"), teaches=True, **CLASSES),
}
METRICS = {name: replace(row, summary=SUMMARIES[name]) for name, row in METRICS.items()}
DEFAULT = tuple(METRICS)[:8]  # without what takes long or needs classes, and rows that are added from outside
HELP = "of " + "; ".join(f"{name} ({row.better} is better): {row.summary}" for name, row in METRICS.items())


def check_metrics(names: Iterable[str]) -> None:
    """Raises: ValueError, naming what is no metric, and those that there are."""
    unknown = [name for name in names if name not in METRICS]
    if unknown or not list(names):
        raise ValueError(f"--metrics {','.join(unknown) or '(none)'}: choose from {', '.join(METRICS)}")


def needs_of(names: Iterable[str]) -> set[str]:
    names = list(names)
    check_metrics(names)
    return {METRICS[name].needs for name in names}


def metric_name(metric: str, kind: str, extractor: str) -> str:
    """What a metric's score is called on an extractor: FID, IS and KID are Inception's, precision is anyone's."""
    elsewhere = METRICS[metric].elsewhere
    return metric if kind == INCEPTION or elsewhere is None else f"{elsewhere[0]}[{extractor}]"


def row_of(score: str) -> tuple[str, Metric | None]:
    """Name and row of the metric of a score, such as "frechet_distance[vgg16]" or "fid, halves"; None if unknown."""
    name = score.partition("[")[0].partition(",")[0]
    for metric, row in METRICS.items():
        if name == metric or (row.elsewhere and name == row.elsewhere[0]):
            return metric, row
    return name, None


def is_lower_better(score: str) -> bool | None:
    """Of a score, whatever extractor it is on, or of a loss; None where nobody knows."""
    if score.startswith("validation_"):
        return True
    row = row_of(score)[1]
    return None if row is None else row.better == "lower"


def title_of(score: str) -> str:
    """For the head of a column, with an arrow to where it is better."""
    name, row = row_of(score)
    if row is None:
        return name
    title = row.elsewhere[1] if row.elsewhere and name != score.partition(",")[0] else row.title or name
    return f"{title} {'↓' if row.better == 'lower' else '↑'}"


def digits_of(score: str) -> int | None:
    row = row_of(score)[1]
    return row.digits if row else None
