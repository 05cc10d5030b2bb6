"""What a run leaves to look at: `log.jsonl`, Accelerate's trackers, and labelled grids of images."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import WandBTracker
from jaxtyping import UInt8
from torch import Tensor

from experiment.files import inside, whole, write_whole
from experiment.settings import flatten

PROJECT = "latent-diffusion-backbones"  # of W&B; a run there has the name of the run here
TRACKER_OPTIONS = {"tensorboard": {"dataformats": "NHWC"}}


def is_due(step: int, every: int) -> bool:
    """What is wanted every so many steps, and never with 0."""
    return every > 0 and step % every == 0


class Log:
    """One line of JSON an event, mirrored to TensorBoard or W&B; written by the main process alone.

    Raises:
        ValueError: where a tracker cannot be started.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, config: dict) -> None:
        self.path, self.accelerator = folder / "log.jsonl", accelerator
        wandb = WandBTracker(PROJECT, name=folder.name)
        accelerator.log_with = [wandb if str(each) == "wandb" else each for each in accelerator.log_with]
        try:
            accelerator.init_trackers("tracking", config=_plain(config))
        except Exception as error:  # each service has its own kinds
            remedy = "wandb login, set WANDB_MODE=offline, or leave it out"
            raise ValueError(f"--log.trackers {config['log']['trackers']}: {error}; {remedy}") from error

    def write(self, step: int, **values: float | list[int]) -> None:
        """Add an event at an optimizer step; lists are for the file alone."""
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        self.accelerator.log({name: value for name, value in values.items() if not isinstance(value, list)}, step=step)

    def picture(self, step: int, path: Path) -> None:
        """Show a grid in the trackers that can."""
        import numpy as np
        from PIL import Image

        with Image.open(path, formats=("PNG",)) as image:
            pixels = np.asarray(image.convert("RGB"))[None]
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                tracker.log_images({"samples": pixels}, step=step, **TRACKER_OPTIONS.get(tracker.name, {}))

    def truncate(self, step: int) -> None:
        """Drop events after `step`: a resumed run writes them again. A broken line is named, and left out."""
        if not self.accelerator.is_main_process:
            return
        written, kept = self.path.read_text(errors="replace").splitlines() if self.path.exists() else [], []
        for number, line in enumerate(written, start=1):
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                print(f"warning: {self.path}: line {number} is broken and left out: {line[:60]}", flush=True)
        write_whole(self.path, "".join(f"{line}\n" for line in kept))


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

    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(6, 3.5))
    axes = figure.add_axes((0.16, 0.14, 0.81, 0.77))  # a layout that is computed takes as long again
    for name, label in (("loss", "training"), ("validation_loss", "held-out images, averaged weights")):
        points = [(event["step"], event[name]) for event in events if name in event]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1, marker="o" if len(points) < 20 else "")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.set_title(run.name, parse_math=False)
    if axes.lines:
        axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(run / "loss.png", dpi=150)


def save_grid(
    images: UInt8[Tensor, "n 3 h w"],
    path: Path,
    *,
    columns: int,
    column_names: list[str] | None = None,
    captions: list[str] | None = None,
) -> None:
    """A grid as PNG or PDF, row by row, with a name above each column or a caption under each image."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = images.shape[-2:]
    scale = max(1, 64 // width)
    height, width = height * scale, width * scale
    columns = min(columns, len(images))
    font = ImageFont.load_default(size=9)
    head = 14 if column_names else 0
    foot = 12 if captions else 0
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (columns * (width + 2) + 2, rows * (height + foot + 2) + head + 2), "white")
    draw = ImageDraw.Draw(canvas)
    for column, name in enumerate(column_names or []):
        draw.text((column * (width + 2) + 4, 2), name, fill="black", font=font)
    for number, image in enumerate(images):
        left = 2 + number % columns * (width + 2)
        top = 2 + head + number // columns * (height + foot + 2)
        tile = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.NEAREST)
        canvas.paste(tile, (left, top))
        if captions:
            draw.text((left, top + height), _fit(captions[number], width, font), fill="black", font=font)
    kind = Image.registered_extensions().get(path.suffix.lower())
    with whole(path) as partial:
        canvas.save(partial, format=kind, optimize=True, quality=95, subsampling=0)  # a PDF holds a JPEG


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
    canvas.save(run / "progress.png", optimize=True)


def save_folder(batches: Iterable[UInt8[Tensor, "b 3 h w"]], class_names: list[str], folder: Path) -> None:
    """`class/000123.png`, numbered by the image's index; whole or not there.

    Raises:
        FileExistsError: when the folder holds files already, so that two draws are never mixed.
        ValueError: for the name of a class that leads out of the folder.
    """
    from PIL import Image

    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"--output {folder} is not empty; give another folder or delete it")
    with whole(folder) as partial:
        paths = [inside(partial, f"./{name}/{number:06d}.png", "--output") for number, name in enumerate(class_names)]
        for path, image in zip(paths, (image for images in batches for image in images), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


def save_npz(batches: Iterable[UInt8[Tensor, "b 3 h w"]], labels: Tensor, classes: list[str], path: Path) -> None:
    """`arr_0` [n h w 3] and `arr_1` [n], as ADM's evaluation reads them (Dhariwal and Nichol 2021), and the names of
    the `classes` that the labels number; whole or not there. What comes is written at once: memory holds a batch."""
    import numpy as np

    with whole(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            for number, images in enumerate(batches):
                pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
                if number == 0:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *pixels.shape[1:])}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(pixels.data)
        for name, array in {"arr_1": labels.numpy(), "classes": np.array(classes)}.items():
            if array.size:
                with archive.open(f"{name}.npy", "w") as file:
                    np.lib.format.write_array(file, array)


def _fit(text: str, width: int, font) -> str:
    while font.getlength(text) > width:
        text = text[:-1]
    return text


def _plain(config: dict) -> dict:
    """As trackers take it."""
    plain = (int, float, str, bool)
    return {flag: value if isinstance(value, plain) else str(value) for flag, value in flatten(config).items()}
