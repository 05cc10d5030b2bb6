"""Loss on held-out images: the same images, timesteps and noise at every call, so that curves compare."""

from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from autoencoders.codec import Codec
from data.latents import LatentCache
from data.subsets import stratified
from experiment.config import TrainConfig
from machine.randomness import generator_for
from training.batches import Batch
from training.objective import Objective


@torch.no_grad()
def validation_loss(
    model: nn.Module,
    objective: Objective,
    codec: Codec,
    cache: LatentCache,
    accelerator: Accelerator,
    num_images: int,
    config: TrainConfig,
) -> dict[str, float]:
    """Mean loss terms over held-out images, of each class its share, divided among the processes."""
    device = accelerator.device
    num_images = min(num_images, len(cache))
    index = stratified(cache.labels, num_images, config.seed)
    draw = generator_for(config.seed, "validation")
    shape = (num_images, *codec.latent_shape(*cache.image_size))
    posterior_noise, noise = torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)
    t = objective.diffusion.sample_timesteps(num_images, generator=draw)
    more = objective.draw_more(shape, draw)

    bf16 = accelerator.mixed_precision == "bf16"
    sums: dict[str, torch.Tensor] = {}
    mine = torch.arange(num_images)[accelerator.process_index :: accelerator.num_processes]
    for part in mine.split(config.batch_size):
        stored = cache.read(index[part], torch.zeros_like(part)).to(device)
        batch = Batch(
            codec.draw(stored, posterior_noise[part].to(device)),
            cache.labels[index[part]].to(device),
            t[part].to(device),
            torch.ones(len(part), device=device),
            noise[part].to(device),
            {name: values[part].to(device) for name, values in more.items()},
        )
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            terms = objective(model, batch)
        for name, values in terms.items():
            sums[name] = sums.get(name, torch.zeros((), device=device)) + values.sum()
    totals: Any = accelerator.reduce(sums, "sum")
    return {name: total.item() / num_images for name, total in totals.items()}
