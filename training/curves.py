"""Pictures of a run (its losses, and the progress of its samples) and of a benchmark."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from machine.checkpoint_folder import paths_by_step
from training.log import errors_as_warnings, read_log

MOST_FRAMES, WIDEST = 50, 1000  # grids in progress.gif, and their width in pixels: all are redrawn with each grid


@errors_as_warnings("loss.png")
def draw_curve(run: Path) -> None:
    """Plot training and validation loss over the steps as `loss.png`, with a panel for each score."""
    from matplotlib.figure import Figure

    from metrics.scores import METRICS, column_title, find_metric

    events = read_log(run / "log.jsonl")
    names = dict.fromkeys(name for event in events for name in event if "halves" not in name)
    scores = [name for name in names if find_metric(name)[0] in METRICS]
    width = 6 + 3 * len(scores)
    figure = Figure(figsize=(width, 3.5))
    axes = figure.add_axes((0.96 / width, 0.14, 4.86 / width, 0.77))  # fixed: a layout would double the time
    lowest = 1.0
    for name, label in (("loss", "training"), ("validation_loss", "held-out images, EMA weights")):
        points = _points(events, name)
        if points:
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1, marker="o" if len(points) < 20 else "")
            lowest = min(lowest, *(loss for _, loss in points))
    axes.set(xlabel="step", ylabel="loss")
    if lowest > 0:  # an autoencoder's loss may be negative
        axes.set_yscale("log")
        label_by_numbers(axes.yaxis)
    axes.set_title(run.name, y=1.0, parse_math=False)  # a fixed position, as finding one measures all tick labels
    if axes.lines:
        axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    for number, score in enumerate(scores):
        panel = figure.add_axes(((6.6 + 3 * number) / width, 0.14, 2.2 / width, 0.77))
        panel.plot(*zip(*_points(events, score), strict=True), linewidth=1, marker="o", markersize=3)
        panel.set(xlabel="step")
        panel.set_title(column_title(score), y=1.0, fontsize=8, parse_math=False)
        panel.grid(alpha=0.3)
    figure.savefig(run / "loss.png", dpi=150)


def _points(events: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(event["step"], event[name]) for event in events if name in event]


def label_by_numbers(axis: Any) -> None:
    """Label a logarithmic axis by plain numbers of three digits. Typesetting powers of ten would double the time of a
    plot, and a single digit would label the ticks of a loss between 0.31 and 0.34 alike."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:.3g}" if super().__call__(x, pos) else ""

    for set_formatter in (axis.set_major_formatter, axis.set_minor_formatter):
        set_formatter(Plain())


@errors_as_warnings("progress.png")
def draw_progress(run: Path, at_most: int = 10) -> None:
    """Combine up to `MOST_FRAMES` of a run's sample grids in `progress.gif`, and up to `at_most` in `progress.png`."""
    from PIL import Image, ImageDraw, ImageFont

    font, left = ImageFont.load_default(size=11), 80
    frames = []
    for step, path in _spread([*paths_by_step(run / "samples", ".png").items()], MOST_FRAMES):
        with errors_as_warnings(path), Image.open(path, formats=("PNG",)) as grid:
            grid.thumbnail((WIDEST, grid.height))
            frame = Image.new("RGB", (grid.width + left, grid.height), "white")
            frame.paste(grid, (left, 0))
            ImageDraw.Draw(frame).text((6, frame.height // 2), f"step {step}", fill="black", font=font)
            frames.append(frame)

    durations = [500] * (len(frames) - 1) + [2000]  # in milliseconds; the last frame stays longer
    frames[0].save(run / "progress.gif", save_all=True, append_images=frames[1:], duration=durations, loop=0)

    shown = _spread(frames, at_most)
    canvas = Image.new("RGB", (max(frame.width for frame in shown), sum(frame.height for frame in shown)), "white")
    top = 0
    for frame in shown:
        canvas.paste(frame, (0, top))
        top += frame.height
    canvas.save(run / "progress.png")


def _spread(items: Sequence[Any], at_most: int) -> list[Any]:
    """Up to so many of the items, evenly spaced, including the first and the last."""
    num = min(at_most, len(items))
    return [items[round(index * (len(items) - 1) / max(1, num - 1))] for index in range(num)]


def draw_scaling(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot time and memory per latent pixel against the side of the latent, a line for each model."""
    from matplotlib.figure import Figure

    figure, sides = Figure(figsize=(8, 3.2), layout="constrained"), sorted({row["latent"] for row in rows})
    axes = figure.subplots(1, 2)
    for axis, key, label in zip(axes, ("us/pixel", "kB/pixel"), ("time, µs", "memory, kB"), strict=True):
        for name in dict.fromkeys(row["model"] for row in rows):
            points = [(row["latent"], row[key]) for row in rows if row["model"] == name]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.2, label=name)
        axis.set(xlabel="side of the latent", ylabel=f"{label} a latent pixel", xscale="log", ylim=(0, None))
        axis.set_xticks(sides, labels=list(map(str, sides)))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)
