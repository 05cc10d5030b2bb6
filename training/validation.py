"""Loss on held-out images: the same images, timesteps and noise at every call, so that curves compare."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from autoencoders.codec import Codec
from data.latents import LatentCache
from data.subsets import stratified
from diffusion import Diffusion
from diffusion.diffusion import Auxiliary
from experiment.config import TrainConfig
from machine.randomness import generator_for


@torch.no_grad()
def validation_loss(
    model: nn.Module,
    diffusion: Diffusion,
    codec: Codec,
    cache: LatentCache,
    accelerator: Accelerator,
    num_images: int,
    config: TrainConfig,
    auxiliary: Sequence[Auxiliary] = (),
) -> dict[str, float]:
    """Mean loss terms over held-out images, of each class its share, divided among the processes."""
    device = accelerator.device
    num_images = min(num_images, len(cache))
    index = stratified(cache.labels, num_images, config.seed)
    draw = generator_for(config.seed, "validation")
    shape = (num_images, *codec.latent_shape(*cache.image_size))
    posterior_noise, noise = torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)
    t = diffusion.sample_timesteps(num_images, generator=draw)
    more = diffusion.draw_more(shape, generator=draw)

    bf16 = accelerator.mixed_precision == "bf16"
    sums: dict[str, torch.Tensor] = {}
    mine = torch.arange(num_images)[accelerator.process_index :: accelerator.num_processes]
    for part in mine.split(config.batch_size):
        stored = cache.read(index[part], torch.zeros_like(part)).to(device)
        x_0 = codec.draw(stored, posterior_noise[part].to(device))
        y = cache.labels[index[part]].to(device)
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            terms = diffusion.training_loss(
                model,
                x_0,
                y,
                t=t[part].to(device),
                noise=noise[part].to(device),
                auxiliary=auxiliary,
                more={name: values[part].to(device) for name, values in more.items()},
            )
        for name, values in terms.items():
            sums[name] = sums.get(name, torch.zeros((), device=device)) + values.sum()
    totals: Any = accelerator.reduce(sums, "sum")
    return {name: total.item() / num_images for name, total in totals.items()}
