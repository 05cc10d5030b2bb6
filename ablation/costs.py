"""What backbones cost: counted on the meta device, timed for a few steps; and at which width two cost the same."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from autoencoders.codec import Codec
from diffusion import Diffusion
from experiment.build import build_diffusion
from experiment.config import ExperimentConfig
from machine.precision import precision_of
from machine.whole_files import write_whole
from metrics.cost import Cost, cost, throughput
from models import ModelSpec, model_arguments
from training.speed import autocasting, training_step

TIMED_BATCH = {"cpu": 16, "cuda": 128}


class Speed(NamedTuple):
    """Images a second of a training step, of one call of the model without gradients, and of the decoder."""

    training: float
    calls: float
    decoding: float


class Measured:
    """Numbers that were measured on this machine, by what they are of, in a file."""

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        self.path, self.accelerator = path, accelerator
        self.counted: dict[str, Cost] = {}
        self.known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def get(self, key: dict[str, Any], measure: Callable[[], Any]) -> Any:
        name = json.dumps(key, sort_keys=True, default=str)
        if name not in self.known:
            self.known[name] = measure()
            write_whole(self.path, json.dumps(self.known, indent=1) + "\n")
        return self.known[name]

    def cost(self, spec: ModelSpec) -> Cost:
        key = repr(spec)
        if key not in self.counted:
            self.counted[key] = count(spec)
        return self.counted[key]

    def speed(self, spec: ModelSpec, config: ExperimentConfig, codec: Codec) -> Speed:
        """Of a backbone under a run's diffusion, precision and batch size, and of its autoencoder."""
        device = self.accelerator.device
        batch_size = min(config.train.batch_size, TIMED_BATCH.get(device.type, 16))
        key = {"speed": asdict(spec), "diffusion": asdict(config.diffusion), "device": device.type}
        key |= {"precision": precision_of(self.accelerator), "batch": batch_size}
        diffusion = build_diffusion(config.diffusion)
        training, calls = self.get(key, lambda: _time(spec, diffusion, self.accelerator, batch_size))

        shape = (spec.in_channels, *spec.input_size)
        key = {"decoding": config.autoencoder, "shape": shape, "device": device.type}
        return Speed(training, calls, self.get(key, lambda: _time_decoder(codec, shape, device)))


def count(spec: ModelSpec) -> Cost:
    """Parameters and arithmetic, on the meta device."""
    model = spec.build_on_meta()
    return cost(model, latent_shape=(spec.in_channels, *spec.input_size), num_classes=spec.num_classes)


def _time(spec: ModelSpec, diffusion: Diffusion, accelerator: Accelerator, batch_size: int) -> tuple[float, float]:
    """A few steps and calls on random latents: enough to tell an hour from three."""
    device, precision = accelerator.device, precision_of(accelerator)
    timed: dict[str, Any] = {"batch_size": batch_size, "num_repeats": 3, "device": device}
    model = spec.build().to(device)
    x_0 = torch.randn(batch_size, spec.in_channels, *spec.input_size, device=device)
    t, y = torch.zeros(batch_size, device=device), torch.zeros(batch_size, dtype=torch.int64, device=device)
    calls = throughput(torch.no_grad()(autocasting(precision, partial(model.eval(), x_0, t, y))), **timed)
    step = training_step(model.train(), precision, lambda: (x_0, y), diffusion=diffusion)
    return throughput(step, **timed), calls


def _time_decoder(codec: Codec, shape: tuple[int, ...], device: torch.device) -> float:
    codec, x_0 = codec.to(device), torch.zeros(4, *shape, device=device)
    return throughput(lambda: codec.decode(x_0), batch_size=len(x_0), num_repeats=3, device=device)


# Equal cost.


class Resized(NamedTuple):
    """A backbone at another width: `unlike` says how little its heads are like the original's."""

    spec: ModelSpec
    unlike: float


def resized(spec: ModelSpec, target: float, cost_of: Callable[[ModelSpec], float], tolerance: float) -> ModelSpec:
    """The same backbone at a cost within `tolerance` of `target`: of the widths that do, the one whose heads are most
    like the original's; depth stays. Raises ValueError for a backbone without a width, or where none comes so near."""
    if abs(cost_of(spec) / target - 1) <= tolerance:
        return spec
    # The cost goes about as the square of the width: two guesses, then all widths near the second.
    guess = float(_width(spec))
    for _ in range(2):
        near = at_width(spec, 4 * round(guess / 4)) or at_width(spec, 8 * round(guess / 8))
        guess *= math.sqrt(target / cost_of(near.spec)) if near else 1.0
    reach = 2 + math.ceil(guess * tolerance)

    nearest = (math.inf, 0)
    fitting: list[tuple[float, float, ModelSpec]] = []
    for width in range(2 * round((guess - reach) / 2), round(guess + reach) + 1, 2):
        choice = at_width(spec, width)
        try:
            off = abs(cost_of(choice.spec) / target - 1) if choice else math.inf
        except ValueError:  # of no legal width
            continue
        nearest = min(nearest, (off, width))
        if choice and off <= tolerance:
            fitting.append((choice.unlike, off, choice.spec))
    if not fitting:
        raise ValueError(
            f"match: no width of {spec.name} comes within {tolerance:g} of the cost; the nearest, dim={nearest[1]}, is "
            f"{nearest[0]:.3f} off; raise match.tolerance"
        )
    return min(fitting, key=lambda choice: choice[:2])[2]


def at_width(spec: ModelSpec, width: int) -> Resized | None:
    """The backbone at this width, with heads as like its own as divide it (of half to twice their size); or None."""
    heads: Any = model_arguments(spec.name, **spec.args)["num_heads"]
    many = isinstance(heads, list | tuple)
    first = heads[0] if many else heads
    size = _width(spec) / first

    def unlike(head_width: int) -> float:
        """By the ratio of the sizes of heads, and more so where 8 does not divide them."""
        return abs(math.log(head_width / size)) + (0.5 if head_width % 8 else 0.0)

    legal = [width // n for n in range(1, width // 2) if width % n == 0 and size / 2 <= width / n <= 2 * size]
    if not legal:
        return None
    best = min(legal, key=unlike)
    number = width // best
    args = {"dim": width, "num_heads": [number * count // first for count in heads] if many else number}
    return Resized(replace(spec, args={**spec.args, **args}), unlike(best))


def _width(spec: ModelSpec) -> int:
    arguments: Any = model_arguments(spec.name, **spec.args)
    if "dim" not in arguments or "num_heads" not in arguments:
        raise ValueError(f"match: {spec.name} has no width (dim) to change; leave it out of an ablation with match")
    return arguments["dim"]
