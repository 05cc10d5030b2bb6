"""How long an epoch takes, said before a training begins."""

import time

import torch
from accelerate import Accelerator
from torch import nn

from diffusion import Diffusion
from models.spec import ModelSpec

LONG = 600  # seconds of an epoch


def forecast(
    model: nn.Module,
    spec: ModelSpec,
    diffusion: Diffusion,
    accelerator: Accelerator,
    num_images: int,
    batch_size: int = 8,
) -> str:
    """An epoch's time on a CPU, in words: a batch's loss is computed and timed, and its gradients taken for twice as
    much. Model and random state stay as they are.
    """
    x_0, y = torch.zeros(batch_size, spec.in_channels, *spec.input_size), torch.zeros(batch_size, dtype=torch.int64)
    times = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]), accelerator.autocast():
        model.eval()
        for _ in range(2):  # the first one warms up
            begun = time.perf_counter()
            diffusion.training_loss(model, x_0, y)
            times.append(time.perf_counter() - begun)
        model.train()
    seconds = 3 * times[-1] / batch_size * num_images / accelerator.num_processes
    long = f"{seconds / 60:.0f} minutes" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} hours"
    words = f"an epoch takes about {long if seconds > 90 else f'{seconds:.0f} seconds'} on this CPU"
    if seconds > LONG:
        words += "; made for CPUs are --config configs/quickstart.yaml and --model XSwin-S"
    return words
