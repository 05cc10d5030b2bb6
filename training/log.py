"""The log of a run: `log.jsonl`, Accelerate's trackers, and plots of losses and sample grids."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import WandBTracker

from experiment.mappings import flatten
from machine.atomic_files import write_atomic
from machine.checkpoint_folder import by_step


def is_due(step: int, every: int) -> bool:
    """Whether `step` is a multiple of `every`; never if that is 0."""
    return every > 0 and step % every == 0


class Log:
    """Writes events as lines of JSON and sends them to the trackers.

    Args:
        folder: the run's folder
        config: the run's settings, for the trackers
        step: where the run continues; later events are removed

    Raises:
        ValueError: if a tracker cannot be started
    """

    def __init__(self, folder: Path, accelerator: Accelerator, config: dict, step: int = 0) -> None:
        self.path, self.accelerator = folder / "log.jsonl", accelerator
        wandb = WandBTracker("latent-diffusion-backbones", name=folder.name)  # names of the project and of the run
        accelerator.log_with = [wandb if str(tracker) == "wandb" else tracker for tracker in accelerator.log_with]
        simple = (int, float, str, bool)
        settings = {flag: value if isinstance(value, simple) else str(value) for flag, value in flatten(config).items()}
        try:
            options = {"tensorboard": {"purge_step": step + 1}}
            accelerator.init_trackers("tracking", config=settings, init_kwargs=options)
        except Exception as error:  # each tracker raises its own errors
            remedy = "wandb login, set WANDB_MODE=offline, or leave it out"
            raise ValueError(f"--log.trackers {config['log']['trackers']}: {error}; {remedy}") from error
        self._truncate(step)

    def write(self, step: int, **values: int | float | list[int]) -> None:
        """Log values at an optimizer step. Lists are written to the file only."""
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        self.accelerator.log({name: value for name, value in values.items() if not isinstance(value, list)}, step=step)

    def picture(self, step: int, path: Path) -> None:
        """Send a grid to the trackers that accept images."""
        import numpy as np
        from PIL import Image

        with Image.open(path, formats=("PNG",)) as image:
            pixels = np.asarray(image.convert("RGB"))[None]
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": pixels}, step=step, **layout)

    def _truncate(self, step: int) -> None:
        """Remove events after `step`, and broken lines with a warning."""
        if not self.accelerator.is_main_process:
            return
        lines, kept = self.path.read_text(errors="replace").splitlines() if self.path.exists() else [], []
        for number, line in enumerate(lines, start=1):
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                print(f"warning: {self.path}: line {number} is broken and left out: {line[:60]}", flush=True)
        write_atomic(self.path, "".join(f"{line}\n" for line in kept))


@contextmanager
def errors_as_warnings(what: object) -> Iterator[None]:
    """Context that turns an error into a warning, so that a plot that fails does not stop a training."""
    try:
        yield
    except Exception as error:  # fonts, texts and foreign files fail in many ways
        print(f"warning: {what} is left out: {error}", flush=True)


@errors_as_warnings("loss.png")
def draw_curve(run: Path) -> None:
    """Plot training and validation loss over the steps as `loss.png`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(6, 3.5))
    axes = figure.add_axes((0.16, 0.14, 0.81, 0.77))  # fixed, as an automatic layout would double the time
    lowest = 1.0
    for name, label in (("loss", "training"), ("validation_loss", "held-out images, averaged weights")):
        points = [(event["step"], event[name]) for event in events if name in event]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1, marker="o" if len(points) < 20 else "")
            lowest = min(lowest, *(loss for _, loss in points))
    axes.set(xlabel="step", ylabel="loss")
    if lowest > 0:  # an autoencoder's loss may be negative
        axes.set_yscale("log")
        for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            set_formatter(LogFormatter())  # plain numbers, as typesetting powers of ten would double the time
    axes.set_title(run.name, y=1.0, parse_math=False)  # a fixed position, as finding one measures all tick labels
    if axes.lines:
        axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(run / "loss.png", dpi=150)


@errors_as_warnings("progress.png")
def draw_progress(run: Path, at_most: int = 10) -> None:
    """Combine a run's sample grids, which share their noise, in `progress.gif`, and up to `at_most` of them in
    `progress.png`."""
    from PIL import Image, ImageDraw, ImageFont

    font, left = ImageFont.load_default(size=11), 80
    frames = []
    for step, path in by_step(run / "samples", ".png").items():
        with errors_as_warnings(path), Image.open(path, formats=("PNG",)) as grid:
            frame = Image.new("RGB", (grid.width + left, grid.height), "white")
            frame.paste(grid, (left, 0))
            ImageDraw.Draw(frame).text((6, frame.height // 2), f"step {step}", fill="black", font=font)
            frames.append(frame)

    durations = [500] * (len(frames) - 1) + [2000]  # in milliseconds; the last frame stays longer
    frames[0].save(run / "progress.gif", save_all=True, append_images=frames[1:], duration=durations, loop=0)

    num = min(at_most, len(frames))
    shown = [frames[round(index * (len(frames) - 1) / max(1, num - 1))] for index in range(num)]
    canvas = Image.new("RGB", (max(frame.width for frame in shown), sum(frame.height for frame in shown)), "white")
    top = 0
    for frame in shown:
        canvas.paste(frame, (0, top))
        top += frame.height
    canvas.save(run / "progress.png")
