"""Pictures from several checkpoints, step by step, and the command that draws each again: what scripts/app.py shows."""

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
from metrics.manifold import nearest
from sampling.generation import Generator, generate
from sampling.interpolation import interpolate
from sampling.labels import resolve_classes
from sampling.pipeline import Pipeline

MOST_IMAGES, MOST_STEPS, MOST_MOMENTS = 8, 250, 12
MODELS_KEPT = 3
LENGTH = 21  # pictures of a walk that is followed one by one
LAYOUT = 16  # pixels a side that nearest training images are looked for by


@dataclass(frozen=True)
class Request:
    """What to draw: `num_images` of a class, or on the way to another class or seed."""

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
    """Checkpoints by path, opened at the start: no other file is ever read for a visitor."""

    def __init__(self, paths: list[str], precision: str = "auto", autoencoder: str | None = None) -> None:
        self.checkpoints: dict[str, Checkpoint] = {path: open_checkpoint(path) for path in paths}
        self.precision, self.autoencoder = precision, autoencoder
        self.accelerator = open_accelerator(precision)
        self.pipelines: dict[str, Pipeline] = {}
        self.layouts = {}

    def classes(self, run: str) -> list[str]:
        return self.checkpoint(run).classes

    def checkpoint(self, run: str) -> Checkpoint:
        """Of those that were opened. Raises ValueError for any other."""
        if run not in self.checkpoints:
            raise ValueError(f"checkpoint {run}: not one of {', '.join(self.checkpoints)}")
        return self.checkpoints[run]

    def label(self, run: str, name: str) -> int:
        """Of a class by its name. Raises ValueError naming near matches."""
        return resolve_classes([name] if self.classes(run) else [], self.classes(run))[0]

    def draw(self, request: Request) -> Iterator[tuple[int, UInt8[Tensor, "n 3 h w"]]]:
        """(steps done, pictures): some moments of predicted `x_0` on the way, and at last the pictures themselves."""
        generator = self.generator(request)

        def work(callback: Callable[[int, Tensor, Tensor], None]) -> Tensor:
            watched = replace(generator, callback=callback)
            if request.interpolates:
                return interpolate(watched, *self.ends(request), request.num_images)
            return generate(watched, batch_size=64)

        num_steps = generator.num_steps
        kept = torch.linspace(0, num_steps - 1, min(num_steps, MOST_MOMENTS)).round().long().tolist()[:-1]
        for step, x_0 in _watch(work, set(kept), num_steps):
            yield step, x_0 if step == num_steps else generator.codec.decode(x_0).cpu()

    def draws_at_once(self, run: str) -> bool:
        """Whether its own sampler takes one call, or a few, so that pictures can follow a slider."""
        return self.checkpoint(run).build_diffusion().default_sampler in AVERAGES

    def on_the_way(self, request: Request, place: int) -> UInt8[Tensor, "1 3 h w"]:
        """The picture at this place, from 0, of a walk of `LENGTH`, alone."""
        return interpolate(self.generator(replace(request, num_images=1)), *self.ends(request), LENGTH, only=place)

    def ends(self, request: Request) -> tuple[tuple[int, int], tuple[int, int]]:
        first = self.label(request.run, request.of_class)
        last = self.label(request.run, request.to_class or request.of_class)
        return (first, last), (request.seed, request.seed if request.to_seed is None else request.to_seed)

    def generator(self, request: Request) -> Generator:
        if not 1 <= request.num_images <= MOST_IMAGES or not 1 <= request.num_steps <= MOST_STEPS:
            raise ValueError(f"1 to {MOST_IMAGES} pictures of 1 to {MOST_STEPS} steps, not {request}")
        pipeline = self.pipeline(request.run)
        sampling: dict[str, Any] = {"sampler": request.sampler, "num_steps": request.num_steps}
        sampling |= {"guidance_scale": request.guidance_scale} if pipeline.checkpoint.num_guided else {}
        asked = [request.of_class] if pipeline.classes else []
        return pipeline.generator(asked, request.num_images, seed=request.seed, **sampling)

    def pipeline(self, run: str) -> Pipeline:
        """With its model and autoencoder, loaded on first use; the one used longest ago gives way."""
        made = self.pipelines.pop(run, None) or Pipeline(self.checkpoint(run), self.accelerator, self.autoencoder)
        self.pipelines[run] = made
        if len(self.pipelines) > MODELS_KEPT:
            del self.pipelines[next(iter(self.pipelines))]
        return made

    def command(self, request: Request, output: str = "picture.png") -> str:
        """The line of shell that writes the same file."""
        checkpoint = self.checkpoint(request.run)
        classes = checkpoint.classes
        ends = [request.of_class, *filter(None, [request.to_class])] if classes else []
        words = [spelled(self.label(request.run, name), classes) for name in ends]
        flags: dict[str, object] = {
            "checkpoint": request.run,
            "classes": f"[{', '.join(words)}]" if len(words) > 1 else words[0] if words else None,
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

    def nearest(self, run: str, pictures: UInt8[Tensor, "n 3 h w"]) -> tuple[UInt8[Tensor, "n 3 h w"], list[float]]:
        """For each picture the training image of the closest colours and layout (16x16 pixels), and their distance."""
        for _ in self.read_layouts(run):
            pass
        images, layouts = self.layouts[run]
        distances, indices = nearest(_layout(pictures), layouts)
        closest = torch.stack([images[index][0] for index in indices.tolist()])
        return closest, (distances / layouts.shape[1] ** 0.5).tolist()

    def read_layouts(self, run: str) -> Iterator[int]:
        """Read the training images that `nearest` looks among, once; now and then says how many. A ValueError where
        they are not those of the training."""
        if run not in self.layouts:
            images, layouts = open_split(self.checkpoint(run).config.data, "train"), []
            self.checkpoint(run).check_identity(train=images.describe())
            for index in range(len(images)):
                layouts.append(_layout(images[index][0][None]))
                if index % 200 == 0:
                    yield index
            self.layouts[run] = images, torch.cat(layouts)


def spelled(label: int, classes: list[str]) -> str:
    """How to name a class on a command line so that YAML reads it right."""
    for word in (classes[label], str(label)):
        try:
            read = yaml.load(f"[{word}]", yaml.BaseLoader)
            if len(read) == 1 and isinstance(read[0], str) and resolve_classes(read, classes) == [label]:
                return word
        except (yaml.YAMLError, ValueError):
            continue
    raise ValueError(f"class {classes[label]}: neither its name nor its number means it on a command line")


def find_runs(folder: Path) -> list[str]:
    """Runs with a checkpoint in a folder, the newest first, and the embedded one."""
    runs = [path.parent for path in folder.glob("*/checkpoints") if any(path.glob("[0-9]*/ema.safetensors"))]
    runs += [path.parent for path in folder.glob("*/ema.safetensors")]
    return [*(run.as_posix() for run in sorted(runs, key=lambda run: run.stat().st_mtime, reverse=True)), EMBEDDED]


class _Stopped(Exception):
    """Raised in the sampler where nobody looks any more."""


def _watch(
    work: Callable[[Callable[[int, Tensor, Tensor], None]], Tensor], kept: set[int], num_steps: int
) -> Iterator[tuple[int, Tensor]]:
    """What the work's callback is shown at the kept steps, and then what it returns, as they come."""
    shown: queue.Queue[tuple[int, Tensor] | BaseException] = queue.Queue()
    stopped = threading.Event()

    def callback(step: int, x_t: Tensor, x_0: Tensor) -> None:
        if stopped.is_set():
            raise _Stopped
        if step in kept:
            shown.put((step + 1, x_0))

    def run() -> None:
        try:
            shown.put((num_steps, work(callback)))
        except BaseException as error:
            shown.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        while True:
            item = shown.get()
            if isinstance(item, BaseException):
                raise item
            yield item
            if item[0] == num_steps:
                return
    finally:
        stopped.set()


def _layout(images: UInt8[Tensor, "n 3 h w"]) -> Tensor:
    return torch.nn.functional.adaptive_avg_pool2d(images.float(), LAYOUT).flatten(1)
