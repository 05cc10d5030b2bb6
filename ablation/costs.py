"""Cost of backbones (counted on the meta device, timed for a few steps), and the width that gives two equal cost."""

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
from machine.atomic_files import write_atomic
from machine.precision import precision_of
from metrics.cost import Cost, cost, throughput
from models import ModelSpec, model_arguments
from training.speed import autocasting, training_step

TIMED_BATCH = {"cpu": 16, "cuda": 128}


class Speed(NamedTuple):
    """Throughput in images per second."""

    training: float  # of a full training step
    calls: float  # of one forward pass without gradients
    decoding: float  # of the autoencoder's decoder


class Measurements:
    """Costs and speeds of backbones on this machine, cached in a file so that a later plan sees the same numbers."""

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        self.path, self.accelerator = path, accelerator
        self.costs: dict[str, Cost] = {}
        self.stored: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def get(self, key: dict[str, Any], measure: Callable[[], Any]) -> Any:
        """Return the stored value of a key; measure and store it first where there is none."""
        name = json.dumps(key, sort_keys=True, default=str)
        if name not in self.stored:
            self.stored[name] = measure()
            write_atomic(self.path, json.dumps(self.stored, indent=1) + "\n")
        return self.stored[name]

    def cost(self, spec: ModelSpec) -> Cost:
        key = repr(spec)
        if key not in self.costs:
            self.costs[key] = count_cost(spec)
        return self.costs[key]

    def speed(self, spec: ModelSpec, config: ExperimentConfig, codec: Codec) -> Speed:
        """Time a backbone under a run's diffusion, precision and batch size, and the decoder of its autoencoder."""
        device = self.accelerator.device
        batch_size = min(config.train.batch_size, TIMED_BATCH.get(device.type, 16))
        key = {"speed": asdict(spec), "diffusion": asdict(config.diffusion), "device": device.type}
        key |= {"precision": precision_of(self.accelerator), "batch": batch_size}
        diffusion = build_diffusion(config.diffusion)
        training, calls = self.get(key, lambda: _time(spec, diffusion, self.accelerator, batch_size))

        shape = (spec.in_channels, *spec.input_size)
        key = {"decoding": config.autoencoder, "shape": shape, "device": device.type}
        return Speed(training, calls, self.get(key, lambda: _time_decoder(codec, shape, device)))


def count_cost(spec: ModelSpec) -> Cost:
    """Count parameters and FLOPs of a forward pass, on the meta device."""
    model = spec.build_on_meta()
    return cost(model, latent_shape=(spec.in_channels, *spec.input_size), num_classes=spec.num_classes)


def _time(spec: ModelSpec, diffusion: Diffusion, accelerator: Accelerator, batch_size: int) -> tuple[float, float]:
    """Images per second of training steps and of forward passes, from a few of each on random latents. This is a rough
    estimate: enough to tell a training of an hour from one of three."""
    device, precision = accelerator.device, precision_of(accelerator)
    options: dict[str, Any] = {"batch_size": batch_size, "num_repeats": 3, "device": device}
    model = spec.build().to(device)
    x_0 = torch.randn(batch_size, spec.in_channels, *spec.input_size, device=device)
    t, y = torch.zeros(batch_size, device=device), torch.zeros(batch_size, dtype=torch.int64, device=device)
    calls = throughput(torch.no_grad()(autocasting(precision, partial(model.eval(), x_0, t, y))), **options)
    step = training_step(model.train(), precision, lambda: (x_0, y), diffusion=diffusion)
    return throughput(step, **options), calls


def _time_decoder(codec: Codec, shape: tuple[int, ...], device: torch.device) -> float:
    codec, x_0 = codec.to(device), torch.zeros(4, *shape, device=device)
    return throughput(lambda: codec.decode(x_0), batch_size=len(x_0), num_repeats=3, device=device)


# Equal cost.


class Resized(NamedTuple):
    """A backbone at another width, and by how much the size of its attention heads differs from the original's."""

    spec: ModelSpec
    head_mismatch: float


def resize_to_cost(
    spec: ModelSpec, target: float, cost_of: Callable[[ModelSpec], float], tolerance: float
) -> ModelSpec:
    """Change a backbone's width so that its cost comes within `tolerance` (relative) of `target`; the depth stays.

    Among the widths that fit, the one whose attention heads are closest in size to the original's is chosen. Raises
    ValueError for a backbone without a width, and where no width comes close enough.
    """
    if abs(cost_of(spec) / target - 1) <= tolerance:
        return spec
    # Cost grows roughly with the square of the width: make two guesses, then search all widths near the second.
    guess = float(_width(spec))
    for _ in range(2):
        candidate = with_width(spec, 4 * round(guess / 4)) or with_width(spec, 8 * round(guess / 8))
        guess *= math.sqrt(target / cost_of(candidate.spec)) if candidate else 1.0
    radius = 2 + math.ceil(guess * tolerance)

    nearest = (math.inf, 0)
    candidates: list[tuple[float, float, ModelSpec]] = []
    widths = range(2 * round((guess - radius) / 2), round(guess + radius) + 1, 2)
    choices = [(width, choice) for width in widths if (choice := with_width(spec, width))]
    for width, choice in sorted(choices, key=lambda item: item[1].head_mismatch):
        if candidates and choice.head_mismatch > candidates[-1][0]:
            break
        try:
            error = abs(cost_of(choice.spec) / target - 1)
        except ValueError:  # the backbone cannot be built at this width
            continue
        nearest = min(nearest, (error, width))
        if error <= tolerance:
            candidates.append((choice.head_mismatch, error, choice.spec))
    if not candidates:
        raise ValueError(
            f"match: no width of {spec.name} comes within {tolerance:g} of the cost; the nearest, dim={nearest[1]}, is "
            f"{nearest[0]:.3f} off; raise match.tolerance"
        )
    return min(candidates, key=lambda candidate: candidate[:2])[2]


def with_width(spec: ModelSpec, width: int) -> Resized | None:
    """Return the backbone at this width, or None where no head size from half to twice its own divides the width. Of
    the head sizes that do, the one closest to the original's is chosen."""
    heads: Any = model_arguments(spec.name, **spec.args)["num_heads"]
    per_stage = isinstance(heads, list | tuple)
    first = heads[0] if per_stage else heads
    original = _width(spec) / first

    def mismatch(head_dim: int) -> float:
        """Absolute log-ratio of head sizes, plus a penalty where 8 does not divide the new one."""
        return abs(math.log(head_dim / original)) + (0.5 if head_dim % 8 else 0.0)

    divisors = [n for n in range(1, width // 2) if width % n == 0]
    head_dims = [width // n for n in divisors if original / 2 <= width / n <= 2 * original]
    if not head_dims:
        return None
    head_dim = min(head_dims, key=mismatch)
    num_heads = width // head_dim
    args = {"dim": width, "num_heads": [num_heads * n // first for n in heads] if per_stage else num_heads}
    return Resized(replace(spec, args={**spec.args, **args}), mismatch(head_dim))


def _width(spec: ModelSpec) -> int:
    arguments: Any = model_arguments(spec.name, **spec.args)
    if "dim" not in arguments or "num_heads" not in arguments:
        raise ValueError(f"match: {spec.name} has no width (dim) to change; leave it out of an ablation with match")
    return arguments["dim"]
