"""What backbones cost: counted on the meta device, timed for a few steps, remembered in a file."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ablation.variants import Run
from autoencoders.codec import Codec
from diffusion import Diffusion
from experiment.diffusions import build_diffusion
from machine.precision import precision_of
from machine.whole_files import write_whole
from metrics.cost import Cost, cost, throughput
from models import ModelSpec

TIMED_BATCH = {"cpu": 16, "cuda": 128}


@dataclass(frozen=True)
class Speed:
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
        """What is known, or else what measuring gives."""
        name = json.dumps(key, sort_keys=True, default=str)
        if name not in self.known:
            self.known[name] = measure()
            write_whole(self.path, json.dumps(self.known, indent=1) + "\n")
        return self.known[name]

    def cost(self, spec: ModelSpec) -> Cost:
        """Of a backbone, counted once."""
        key = repr(spec)
        if key not in self.counted:
            self.counted[key] = count(spec)
        return self.counted[key]

    def speed(self, spec: ModelSpec, run: Run, codec: Codec) -> Speed:
        """Of a backbone under a run's diffusion, precision and batch size, and of its autoencoder."""
        device = self.accelerator.device
        batch_size = min(run.config.train.batch_size, TIMED_BATCH.get(device.type, 16))
        key = {"speed": asdict(spec), "diffusion": asdict(run.config.diffusion), "device": device.type}
        key |= {"precision": precision_of(self.accelerator), "batch": batch_size}
        diffusion = build_diffusion(run.config.diffusion)
        training, calls = self.get(key, lambda: _time(spec, diffusion, self.accelerator, batch_size))
        shape = (spec.in_channels, *spec.input_size)
        key = {"decoding": run.config.autoencoder, "shape": shape, "device": device.type}
        return Speed(training, calls, self.get(key, lambda: _time_decoder(codec, shape, device)))


def _time(spec: ModelSpec, diffusion: Diffusion, accelerator: Accelerator, batch_size: int) -> tuple[float, float]:
    """A few steps on random latents: enough to tell an hour from three."""
    device = accelerator.device
    model = spec.build().to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    draw = torch.Generator().manual_seed(0)
    x_0 = torch.randn(batch_size, spec.in_channels, *spec.input_size, generator=draw).to(device)
    y = torch.zeros(batch_size, dtype=torch.int64, device=device)
    t = diffusion.sample_timesteps(batch_size, generator=draw).to(device)

    def train() -> None:
        with accelerator.autocast():
            loss = diffusion.training_loss(model, x_0, y, t=t, noise=x_0)["loss"].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def call() -> None:
        with accelerator.autocast():
            model(x_0, torch.zeros(batch_size, device=device), y)

    training = throughput(train, batch_size=batch_size, num_repeats=3, device=device)
    model.eval()
    return training, throughput(call, batch_size=batch_size, num_repeats=3, device=device)


def _time_decoder(codec: Codec, shape: tuple[int, ...], device: torch.device) -> float:
    """Images that the codec decodes in a second."""
    codec, x_0 = codec.to(device), torch.zeros(4, *shape, device=device)
    return throughput(lambda: codec.decode(x_0), batch_size=len(x_0), num_repeats=3, device=device)


def count(spec: ModelSpec) -> Cost:
    """Parameters and arithmetic, on the meta device."""
    model = spec.build_on_meta()
    return cost(model, latent_shape=(spec.in_channels, *spec.input_size), num_classes=spec.num_classes)
