"""Backend of scripts/app.py: draws pictures from several checkpoints step by step, and gives the same as a command."""

import queue
import shlex
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from jaxtyping import UInt8
from torch import Tensor

from checkpoints.checkpoint import Checkpoint, open_checkpoint
from checkpoints.hub import EMBEDDED
from diffusion.samplers import AVERAGES
from experiment.build import open_split
from machine.accelerator import open_accelerator
from metrics.extractors import load_extractor
from metrics.manifold import nearest_neighbours
from metrics.programs import class_names
from sampling.generation import Generator, generate
from sampling.interpolation import interpolate
from sampling.labels import resolve_classes
from sampling.pipeline import Pipeline

MOST_IMAGES, MOST_STEPS, MOST_MOMENTS = 8, 250, 12
MODELS_KEPT = 3
LENGTH = 21  # pictures of an interpolation that a slider moves through
LAYOUT = 16  # nearest training images are found at this resolution


@dataclass(frozen=True)
class Request:
    """What to draw: `num_images` samples of a class, or an interpolation to another class or seed of that length."""

    run: str
    of_class: str
    seed: int
    num_images: int
    sampler: str
    num_steps: int
    guidance_scale: float
    to_class: str | None = None
    to_seed: int | None = None

    @property
    def interpolates(self) -> bool:
        return self.to_class is not None or self.to_seed is not None


class Studio:
    """The checkpoints that visitors can draw from, by path. No other file is ever opened for a visitor."""

    def __init__(
        self, paths: list[str], precision: str = "auto", autoencoder: str | None = None, classifier: Path | None = None
    ) -> None:
        self.checkpoints: dict[str, Checkpoint] = {path: open_checkpoint(path) for path in paths}
        self.precision, self.autoencoder = precision, autoencoder
        self.accelerator = open_accelerator(precision)
        self.pipelines: dict[str, Pipeline] = {}
        self.classifier = load_extractor(str(classifier))[0] if classifier else None
        self.distinguished = class_names(classifier) if classifier else []
        self.layouts = {}

    def classes(self, run: str) -> list[str]:
        """Class names of a checkpoint; empty if it is unconditional."""
        return self.checkpoint(run).classes

    def checkpoint(self, run: str) -> Checkpoint:
        """Return an open checkpoint by its path. Raises ValueError for any other path."""
        if run not in self.checkpoints:
            raise ValueError(f"checkpoint {run}: not one of {', '.join(self.checkpoints)}")
        return self.checkpoints[run]

    def label(self, run: str, name: str) -> int:
        """Label of a class by its name. Raises ValueError with the closest names for an unknown one."""
        return resolve_classes([name] if self.classes(run) else [], self.classes(run))[0]

    def draw(self, request: Request) -> Iterator[tuple[int, UInt8[Tensor, "n 3 h w"]]]:
        """Yield (steps done, images): the decoded prediction of `x_0` at some steps, and at the end the samples."""
        generator = self.generator(request)

        def sample(callback: Callable[[int, Tensor, Tensor], None]) -> Tensor:
            with_callback = replace(generator, callback=callback)
            if request.interpolates:
                return interpolate(with_callback, *self.endpoints(request), request.num_images)
            return generate(with_callback, batch_size=64)

        num_steps = generator.num_steps
        shown_steps = torch.linspace(0, num_steps - 1, min(num_steps, MOST_MOMENTS)).round().long().tolist()[:-1]
        for step, x_0 in _stream(sample, set(shown_steps), num_steps):
            yield step, x_0 if step == num_steps else generator.codec.decode(x_0).cpu()

    def draws_at_once(self, run: str) -> bool:
        """Whether the checkpoint samples in one or a few steps, so that pictures can follow a slider."""
        return self.checkpoint(run).build_diffusion().default_sampler in AVERAGES

    def draw_position(self, request: Request, position: int) -> UInt8[Tensor, "1 3 h w"]:
        """Draw only the picture at a position, counted from 0, of an interpolation of `LENGTH` pictures."""
        return interpolate(
            self.generator(replace(request, num_images=1)), *self.endpoints(request), LENGTH, only=position
        )

    def endpoints(self, request: Request) -> tuple[tuple[int, int], tuple[int, int]]:
        """First and last label, and first and last seed, of an interpolation."""
        first = self.label(request.run, request.of_class)
        last = self.label(request.run, request.to_class or request.of_class)
        return (first, last), (request.seed, request.seed if request.to_seed is None else request.to_seed)

    def generator(self, request: Request) -> Generator:
        """Set up the sampling of a request. Raises ValueError where it asks for too much or does not fit the model."""
        if not 1 <= request.num_images <= MOST_IMAGES or not 1 <= request.num_steps <= MOST_STEPS:
            raise ValueError(f"1 to {MOST_IMAGES} pictures of 1 to {MOST_STEPS} steps, not {request}")
        pipeline = self.pipeline(request.run)
        sampling: dict[str, Any] = {"sampler": request.sampler, "num_steps": request.num_steps}
        sampling |= {"guidance_scale": request.guidance_scale} if pipeline.checkpoint.num_guided else {}
        classes = [request.of_class] if pipeline.classes else []
        return pipeline.generator(classes, request.num_images, seed=request.seed, **sampling)

    def pipeline(self, run: str) -> Pipeline:
        """Load a checkpoint's model and autoencoder, or return them from a cache of the least recently used kind."""
        pipeline = self.pipelines.pop(run, None) or Pipeline(self.checkpoint(run), self.accelerator, self.autoencoder)
        self.pipelines[run] = pipeline
        if len(self.pipelines) > MODELS_KEPT:
            del self.pipelines[next(iter(self.pipelines))]
        return pipeline

    def command(self, request: Request, output: str = "picture.png") -> str:
        """Shell command that writes the same picture."""
        checkpoint = self.checkpoint(request.run)
        classes = checkpoint.classes
        ends = [request.of_class, *filter(None, [request.to_class])] if classes else []
        names = [class_argument(self.label(request.run, name), classes) for name in ends]
        flags: dict[str, object] = {
            "checkpoint": request.run,
            "classes": f"[{', '.join(names)}]" if len(names) > 1 else names[0] if names else None,
            "interpolate" if request.interpolates else "num_per_class": request.num_images,
            "seed": request.seed,
            "to_seed": request.to_seed,
            "sampler": request.sampler,
            "num_steps": request.num_steps,
            "guidance_scale": request.guidance_scale if checkpoint.num_guided else None,
            "precision": None if self.precision == "auto" else self.precision,
            "autoencoder": self.autoencoder,
            "output": output,
        }
        words = [f"--{name} {shlex.quote(str(value))}" for name, value in flags.items() if value is not None]
        return "python sample.py " + " ".join(words)

    def num_recognised(self, request: Request, pictures: UInt8[Tensor, "n 3 h w"]) -> int | None:
        """Count the pictures that the classifier assigns to the requested class. None without a classifier that knows
        it, and for an interpolation, whose pictures have no single class. A classifier whose file names no classes is
        taken to distinguish the checkpoint's, if these are as many."""
        classes = self.classes(request.run)
        if self.classifier is None or request.interpolates or not classes:
            return None
        _, logits = self.classifier(pictures)
        known, wanted = self.distinguished or classes, classes[self.label(request.run, request.of_class)]
        if len(known) != logits.shape[1] or wanted not in known:
            return None
        return int((logits.argmax(dim=1) == known.index(wanted)).sum())

    def nearest(self, run: str, pictures: UInt8[Tensor, "n 3 h w"]) -> tuple[UInt8[Tensor, "n 3 h w"], list[float]]:
        """Find the nearest training image of each picture at 16x16 pixels, and their distance per value."""
        for _ in self.read_layouts(run):
            pass
        images, layouts = self.layouts[run]
        distances, indices = nearest_neighbours(_layout(pictures), layouts)
        closest = torch.stack([images[index][0] for index in indices.tolist()])
        return closest, (distances / layouts.shape[1] ** 0.5).tolist()

    def read_layouts(self, run: str) -> Iterator[int]:
        """Read the training images for `nearest`, once per checkpoint; yields the index of every 200th. Raises
        ValueError where they are not the images that the checkpoint was trained on."""
        if run not in self.layouts:
            images, layouts = open_split(self.checkpoint(run).config.data, "train"), []
            self.checkpoint(run).check_identity(train=images.describe())
            for index in range(len(images)):
                layouts.append(_layout(images[index][0][None]))
                if index % 200 == 0:
                    yield index
            self.layouts[run] = images, torch.cat(layouts)


def class_argument(label: int, classes: list[str]) -> str:
    """Return a class's name, or else its number, whichever the command line's YAML reads as this class."""
    for text in (classes[label], str(label)):
        try:
            parsed = yaml.load(f"[{text}]", yaml.BaseLoader)
            if len(parsed) == 1 and isinstance(parsed[0], str) and resolve_classes(parsed, classes) == [label]:
                return text
        except (yaml.YAMLError, ValueError):
            continue
    raise ValueError(f"class {classes[label]}: neither its name nor its number means it on a command line")


def find_runs(folder: Path) -> list[str]:
    """List the runs with a checkpoint in a folder, newest first, and the embedded checkpoint."""
    runs = [path.parent for path in folder.glob("*/checkpoints") if any(path.glob("[0-9]*/ema.safetensors"))]
    runs += [path.parent for path in folder.glob("*/ema.safetensors")]
    return [*(run.as_posix() for run in sorted(runs, key=lambda run: run.stat().st_mtime, reverse=True)), EMBEDDED]


class _Stopped(Exception):
    """Raised in the sampler to end it, when nobody waits for its samples any more."""


def _stream(
    sample: Callable[[Callable[[int, Tensor, Tensor], None]], Tensor], shown_steps: set[int], num_steps: int
) -> Iterator[tuple[int, Tensor]]:
    """Run a sampler in a thread; yield (steps done, `x_0`) at the given steps, and at the end its samples."""
    results: queue.Queue[tuple[int, Tensor] | BaseException] = queue.Queue()
    stopped = threading.Event()

    def callback(step: int, x_t: Tensor, x_0: Tensor) -> None:
        if stopped.is_set():
            raise _Stopped
        if step in shown_steps:
            results.put((step + 1, x_0))

    def run() -> None:
        try:
            results.put((num_steps, sample(callback)))
        except BaseException as error:
            results.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        while True:
            item = results.get()
            if isinstance(item, BaseException):
                raise item
            yield item
            if item[0] == num_steps:
                return
    finally:
        stopped.set()


def _layout(images: UInt8[Tensor, "n 3 h w"]) -> Tensor:
    """Colours and layout of images: their values at 16x16 pixels, flattened."""
    return torch.nn.functional.adaptive_avg_pool2d(images.float(), LAYOUT).flatten(1)
