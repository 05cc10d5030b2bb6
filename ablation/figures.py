"""Figures of a report: each as SVG for the page, and as PDF and PNG for a paper."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.ticker import EngFormatter

from ablation.results import Results, RunResult, VariantResult, spread
from evaluation.plots import INK, STYLE, WIDTH, color, draw, marker, svg_of
from metrics.scores import row_of, title_of

MAX_POINTS = 400
Panel = Callable[[Results, Any], bool]  # draws on matplotlib's axes; returns whether there was anything to draw


def draw_panels(results: Results) -> dict[str, str]:
    """SVG by name, of the panels that there is data for; PDF and PNG are written to `figures/`."""
    panels = {}
    for name, (panel, _) in PANELS.items():
        if (figure := draw(lambda axes, panel=panel: panel(results, axes))) is not None:
            path = results.folder / "figures" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with mpl.rc_context(STYLE):
                figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
                figure.savefig(path.with_suffix(".png"), dpi=200)
            panels[name] = svg_of(figure, name)
    return panels


def loss(results: Results, axes: Any) -> bool:
    shown = []
    for number, run, label in _runs_of(results):
        steps, values = run.series("loss")
        if not steps:
            continue
        smooth = running_mean(np.array(values))
        thin = slice(None, None, max(1, len(steps) // MAX_POINTS))
        axes.plot(steps[thin], values[thin], color=color(number), alpha=0.18, linewidth=0.7)
        axes.plot(steps[thin], smooth[thin], color=color(number), linewidth=1.5, label=label)
        shown.append(smooth[len(smooth) // 50 :])
    if not shown:
        return False
    together = np.concatenate(shown)
    low, high = together.min(), np.quantile(together, 0.99)
    margin = 0.08 * max(high - low, 1e-9)
    axes.set(xlabel="step", ylabel="training loss", ylim=(low - margin, high + 2 * margin))
    return True


def validation(results: Results, axes: Any) -> bool:
    axes.set(xlabel="step", ylabel="loss on held-out images")
    return _lines(results, axes, "validation_loss", lambda run, step: step)


def score_by_compute(results: Results, axes: Any) -> bool:
    """By the first metric that was scored at two steps or more of a training; else the final scores."""
    axes.set(xlabel="arithmetic of training")
    axes.xaxis.set_major_formatter(EngFormatter("FLOP"))
    if metric := next((m for m in results.metrics if any(len(run.series(m)[0]) > 1 for run in results.runs)), None):
        axes.set_ylabel(title_of(metric))
        return _lines(results, axes, metric, arithmetic)
    return _final_scores(results, axes, results.metrics[0], lambda v: arithmetic(v.runs[0], v.plan["num_steps"]))


def score_by_parameters(results: Results, axes: Any) -> bool:
    """KID where there is one, as it has no bias that depends on the number of samples."""
    if len({variant.plan["parameters"] for variant in results.variants}) == 1:
        return False
    metric = next((metric for metric in results.metrics if row_of(metric)[0] == "kid"), results.metrics[0])
    axes.set(xlabel="parameters")
    axes.xaxis.set_major_formatter(EngFormatter())
    return _final_scores(results, axes, metric, lambda variant: variant.plan["parameters"])


def per_class(results: Results, axes: Any) -> bool:
    """Of the 16 classes that are hardest for the baseline."""
    distances = {variant.name: class_distances(variant) for variant in results.variants}
    baseline = distances[results.baseline.name]
    others = {number: one.name for number, one in enumerate(results.variants) if one is not results.baseline}
    classes = [name for name in baseline if any(name in distances[other] for other in others.values())]
    if not classes:
        return False
    classes = sorted(classes, key=lambda name: baseline[name])[-16:]
    axes.figure.set_size_inches(WIDTH, max(3.3, 1.4 + 0.24 * len(classes)))
    for number, other in others.items():
        of_other = distances[other]
        points = [(of_other[name] - baseline[name], row) for row, name in enumerate(classes) if name in of_other]
        look: Any = {"linestyle": "", "marker": marker(number), "markersize": 5, "color": color(number)}
        axes.plot(*zip(*points, strict=True), label=other, **look)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set(xlabel=f"Fréchet distance less that of {results.baseline.name} (left: better)")
    axes.set_yticks(range(len(classes)), [name.replace("_", " ") for name in classes])
    return True


def class_distances(variant: VariantResult) -> dict[str, float]:
    """Means over seeds, of the classes that had enough images."""
    values: dict[str, list[float]] = defaultdict(list)
    for run in variant.runs:
        for name, score in run.record.get("per_class", {}).items():
            if score["value"] is not None:
                values[name].append(score["value"])
    return {name: float(np.mean(of_class)) for name, of_class in values.items()}


def arithmetic(run: RunResult, step: int) -> float:
    """Operations of a training up to a step: a backward pass costs about two forward ones."""
    return 3e9 * run.plan["gflops"] * run.plan["batch_size"] * step


def running_mean(values: np.ndarray) -> np.ndarray:
    """Centred, over a thirtieth of the points; narrower at both ends."""
    width = max(1, len(values) // 30) | 1
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _runs_of(results: Results) -> Iterator[tuple[int, RunResult, str | None]]:
    """All runs, each with its variant's place and, the first of a variant, with its name for the legend."""
    for number, variant in enumerate(results.variants):
        for run in variant.runs:
            yield number, run, variant.name if run is variant.runs[0] else None


def _lines(results: Results, axes: Any, name: str, x: Callable[[RunResult, int], float]) -> bool:
    for number, run, label in _runs_of(results):
        steps, values = run.series(name)
        if steps:
            look: Any = {"marker": marker(number) if len(steps) < 30 else "", "color": color(number)}
            axes.plot([x(run, step) for step in steps], values, markersize=3.5, linewidth=1.4, label=label, **look)
    return bool(axes.lines)


def _final_scores(results: Results, axes: Any, metric: str, x: Callable[[VariantResult], float]) -> bool:
    axes.set(ylabel=title_of(metric))
    for number, variant in enumerate(results.variants):
        if values := variant.values(metric):
            look: Any = {"fmt": marker(number), "color": color(number), "capsize": 3}
            axes.errorbar(x(variant), np.mean(values), spread(values) or 0.0, label=variant.name, **look)
    return True


PANELS: dict[str, tuple[Panel, str]] = {  # and their captions
    "loss": (loss, "Training loss: every interval of the log, pale, and its running mean."),
    "validation": (validation, "Loss of the averaged weights on held-out images, times and noise that all share."),
    "score-by-compute": (score_by_compute, "Score against the training's arithmetic (three forward passes an image)."),
    "score-by-parameters": (score_by_parameters, "Final score against the number of parameters."),
    "per-class": (per_class, "Fréchet distance within each class that has 50 images, less the baseline's."),
}
