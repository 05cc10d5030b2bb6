"""Figures of a report: SVG for the HTML page, PDF and PNG for a paper."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.ticker import EngFormatter

from ablation.results import Results, RunResult, VariantResult, mean_and_interval, sample_std
from evaluation.plots import INK, STYLE, WIDTH, color, figure_to_svg, make_figure, marker
from metrics.scores import METRICS, column_title, find_metric

MAX_POINTS = 400
Panel = Callable[[Results, Any], bool]  # draws on matplotlib axes; False: there was nothing to draw


def draw_panels(results: Results) -> dict[str, tuple[str, str]]:
    """Draw all panels that have data: returns SVG and caption by panel name, and writes PDF and PNG to `figures/`."""
    panels = {}
    for name, (panel, caption) in (PANELS | _panels_by_setting(results)).items():
        if (figure := make_figure(lambda axes, panel=panel: panel(results, axes))) is not None:
            path = results.folder / "figures" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with mpl.rc_context(STYLE):
                figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
                figure.savefig(path.with_suffix(".png"), dpi=200)
            panels[name] = (figure_to_svg(figure, name), caption)
    return panels


def plot_loss(results: Results, axes: Any) -> bool:
    """Training loss by step, with its running mean; the y-axis leaves out the first 2% of steps and outliers."""
    curves = []
    for number, run, label in _runs_of(results):
        steps, values = run.series("loss")
        if not steps:
            continue
        smooth = running_mean(np.array(values))
        thinned = slice(None, None, max(1, len(steps) // MAX_POINTS))
        axes.plot(steps[thinned], values[thinned], color=color(number), alpha=0.18, linewidth=0.7)
        axes.plot(steps[thinned], smooth[thinned], color=color(number), linewidth=1.5, label=label)
        curves.append(smooth[len(smooth) // 50 :])
    if not curves:
        return False
    losses = np.concatenate(curves)
    low, high = losses.min(), np.quantile(losses, 0.99)
    margin = 0.08 * max(high - low, 1e-9)
    axes.set(xlabel="step", ylabel="training loss", ylim=(low - margin, high + 2 * margin))
    return True


def plot_validation(results: Results, axes: Any) -> bool:
    axes.set(xlabel="step", ylabel="loss on held-out images")
    return _lines(results, axes, "validation_loss", lambda run, step: step)


def plot_score_by_compute(results: Results, axes: Any) -> bool:
    """Score by training FLOPs: the first metric with at least two points in some training, else the final scores."""
    axes.set(xlabel="arithmetic of training")
    axes.xaxis.set_major_formatter(EngFormatter("FLOP"))
    scores = [metric for metric in results.metrics if find_metric(metric)[0] in METRICS]
    if metric := next((m for m in scores if any(len(run.series(m)[0]) > 1 for run in results.runs)), None):
        axes.set_ylabel(column_title(metric))
        return _lines(results, axes, metric, training_flops)
    return _final_scores(results, axes, results.metrics[0], lambda v: training_flops(v.runs[0], v.plan["num_steps"]))


def plot_score_by_parameters(results: Results, axes: Any) -> bool:
    """Final score by parameter count: KID where available, whose bias does not depend on the number of samples."""
    if len({variant.plan["parameters"] for variant in results.variants}) == 1:
        return False
    metric = next((metric for metric in results.metrics if find_metric(metric)[0] == "kid"), results.metrics[0])
    axes.set(xlabel="parameters")
    axes.xaxis.set_major_formatter(EngFormatter())
    return _final_scores(results, axes, metric, lambda variant: variant.plan["parameters"])


def plot_per_class(results: Results, axes: Any) -> bool:
    """Fréchet distance per class relative to the baseline, for the 16 classes that are hardest for the baseline."""
    distances = {variant.name: class_distances(variant) for variant in results.variants}
    baseline = distances[results.baseline.name]
    others = {i: variant.name for i, variant in enumerate(results.variants) if variant is not results.baseline}
    classes = [name for name in baseline if any(name in distances[other] for other in others.values())]
    if not classes:
        return False
    classes = sorted(classes, key=lambda name: baseline[name])[-16:]
    axes.figure.set_size_inches(WIDTH, max(3.3, 1.4 + 0.24 * len(classes)))
    for number, other in others.items():
        own = distances[other]
        points = [(own[name] - baseline[name], row) for row, name in enumerate(classes) if name in own]
        style: Any = {"linestyle": "", "marker": marker(number), "markersize": 5, "color": color(number)}
        axes.plot(*zip(*points, strict=True), label=other, **style)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set(xlabel=f"Fréchet distance less that of {results.baseline.name} (left: better)")
    axes.set_yticks(range(len(classes)), [name.replace("_", " ") for name in classes])
    return True


def plot_score_by_setting(results: Results, axes: Any, metric: str, setting: str) -> bool:
    """Final score by a numeric setting of the grid: mean and 95% interval over training seeds, with a line for each
    combination of the other settings; on a logarithmic axis where the values span a factor of ten."""
    lines: dict[str, list[tuple[float, VariantResult]]] = defaultdict(list)
    for variant in results.variants:
        others = {key: value for key, value in variant.plan["point"].items() if key != setting}
        lines[", ".join(map(str, others.values()))].append((variant.plan["point"][setting], variant))
    positions = sorted({x for points in lines.values() for x, _ in points})
    if positions[0] > 0 and positions[-1] >= 10 * positions[0]:
        axes.set_xscale("log")
    axes.set_xticks(positions, [f"{x:g}" for x in positions])
    axes.minorticks_off()
    for number, (label, points) in enumerate(lines.items()):
        scores = {x: variant.by_seed(metric).values() for x, variant in points if variant.values(metric)}
        bars = [(x, *mean_and_interval([*scores[x]])) for x in sorted(scores)]
        style: Any = {"fmt": f"{marker(number)}-", "color": color(number), "capsize": 3, "markersize": 4}
        axes.errorbar(*zip(*bars, strict=True), label=label, **style)
    axes.set(xlabel=setting, ylabel=column_title(metric))
    return True


def class_distances(variant: VariantResult) -> dict[str, float]:
    """Fréchet distance by class, averaged over seeds; classes with too few images are left out."""
    values: dict[str, list[float]] = defaultdict(list)
    for run in variant.runs:
        for name, score in run.record.get("per_class", {}).items():
            if score["value"] is not None:
                values[name].append(score["value"])
    return {name: float(np.mean(scores)) for name, scores in values.items()}


def training_flops(run: RunResult, step: int) -> float:
    """FLOPs of a training's backbone up to a step; a backward pass counts as two forward passes."""
    num_forward_passes = run.plan.get("num_forward_passes", 3)  # plans before 30 November 2026 do not count them
    return 1e9 * num_forward_passes * run.plan["gflops"] * run.plan["batch_size"] * step


def running_mean(values: np.ndarray) -> np.ndarray:
    """Centred moving average over a thirtieth of the points; the window is cut off at both ends."""
    width = max(1, len(values) // 30) | 1
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _runs_of(results: Results) -> Iterator[tuple[int, RunResult, str | None]]:
    """Yield (index of the variant, run, legend label) of all runs; only a variant's first run has a label."""
    for number, variant in enumerate(results.variants):
        for run in variant.runs:
            yield number, run, variant.name if run is variant.runs[0] else None


def _lines(results: Results, axes: Any, name: str, x: Callable[[RunResult, int], float]) -> bool:
    """Draw a line per run: a series of its log, over `x` of the run and step."""
    for number, run, label in _runs_of(results):
        steps, values = run.series(name)
        if steps:
            style: Any = {"marker": marker(number) if len(steps) < 30 else "", "color": color(number)}
            axes.plot([x(run, step) for step in steps], values, markersize=3.5, linewidth=1.4, label=label, **style)
    return bool(axes.lines)


def _final_scores(results: Results, axes: Any, metric: str, x: Callable[[VariantResult], float]) -> bool:
    axes.set(ylabel=column_title(metric))
    for number, variant in enumerate(results.variants):
        if values := variant.values(metric):
            style: Any = {"fmt": marker(number), "color": color(number), "capsize": 3}
            axes.errorbar(x(variant), np.mean(values), sample_std(values) or 0.0, label=variant.name, **style)
    return True


def _panels_by_setting(results: Results) -> dict[str, tuple[Panel, str]]:
    """A panel for each metric if one setting of the grid takes three or more numbers."""
    points = [variant.plan.get("point", {}) for variant in results.variants]
    values = {key: {point[key] for point in points} for key in points[0] if all(key in point for point in points)}
    numeric = [key for key, taken in values.items() if len(taken) > 2 and {int, float}.issuperset(map(type, taken))]
    if len(numeric) != 1:
        return {}
    caption = f"Final score by {numeric[0]}: mean and 95% interval over training seeds."
    return {
        f"{find_metric(metric)[0].replace(' ', '-')}-by-setting": (
            partial(plot_score_by_setting, metric=metric, setting=numeric[0]),
            caption,
        )
        for metric in results.metrics
    }


PANELS: dict[str, tuple[Panel, str]] = {  # with captions
    "loss": (plot_loss, "Training loss: every log interval (pale), and its running mean."),
    "validation": (plot_validation, "Loss of the EMA weights on held-out images, with the same times and noise."),
    "score-by-compute": (
        plot_score_by_compute,
        "Score against training FLOPs: three forward passes per image, plus those for its target.",
    ),
    "score-by-parameters": (plot_score_by_parameters, "Final score against the number of parameters."),
    "per-class": (plot_per_class, "Fréchet distance within each class of at least 50 images, minus the baseline's."),
}
