"""Pictures of a training: its losses over the steps, its grids one after the other."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def warns_only(what: object) -> Iterator[None]:
    """For pictures of a training: one that cannot be drawn is spoken of, and training goes on."""
    try:
        yield
    except Exception as error:  # of fonts, of texts, of files that others left there
        print(f"warning: {what} is left out: {error}", flush=True)


@warns_only("loss.png")
def draw_curve(run: Path) -> None:
    """`loss.png` beside the log: training and validation loss over the steps."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(6, 3.5))
    axes = figure.add_axes((0.16, 0.14, 0.81, 0.77))  # a layout that is computed takes as long again
    least = 1.0
    for name, label in (("loss", "training"), ("validation_loss", "held-out images, averaged weights")):
        points = [(event["step"], event[name]) for event in events if name in event]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1, marker="o" if len(points) < 20 else "")
            least = min(least, *(loss for _, loss in points))
    axes.set(xlabel="step", ylabel="loss")
    if least > 0:  # an autoencoder's may be negative
        axes.set_yscale("log")
        for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            set_formatter(LogFormatter())  # plain numbers: typesetting powers of ten takes as long as the rest
    axes.set_title(run.name, parse_math=False)
    if axes.lines:
        axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(run / "loss.png", dpi=150)


@warns_only("progress.png")
def draw_progress(run: Path, at_most: int = 10) -> None:
    """`progress.gif` of a run's grids, which all start from the same noise, and `progress.png`: evenly spread ones, one
    below the other."""
    from PIL import Image, ImageDraw, ImageFont

    font, left = ImageFont.load_default(size=11), 80
    frames = []
    for path in sorted((run / "samples").glob("[0-9]*.png")):
        with warns_only(path), Image.open(path, formats=("PNG",)) as grid:
            frame = Image.new("RGB", (grid.width + left, grid.height), "white")
            frame.paste(grid, (left, 0))
            ImageDraw.Draw(frame).text((6, frame.height // 2), f"step {int(path.stem)}", fill="black", font=font)
            frames.append(frame)

    durations = [500] * (len(frames) - 1) + [2000]  # milliseconds; the last one stays
    frames[0].save(run / "progress.gif", save_all=True, append_images=frames[1:], duration=durations, loop=0)

    num = min(at_most, len(frames))
    shown = [frames[round(number * (len(frames) - 1) / max(1, num - 1))] for number in range(num)]
    canvas = Image.new("RGB", (max(frame.width for frame in shown), sum(frame.height for frame in shown)), "white")
    top = 0
    for frame in shown:
        canvas.paste(frame, (0, top))
        top += frame.height
    canvas.save(run / "progress.png")
