"""What a model makes of noised held-out images: predicted in one step, and by the whole chain."""

from __future__ import annotations

from copy import copy
from dataclasses import replace

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from diffusion import GaussianDiffusion
from diffusion.samplers import randn_like
from experiment.batches import generator_for
from experiment.generation import Generator


def reconstruct(
    generator: Generator, images: UInt8[Tensor, "n 3 h w"], labels: Int64[Tensor, " n"], t: int
) -> UInt8[Tensor, "n kinds 3 h w"]:
    """For each image: itself, noised to `t`, `x_0` predicted from there in one step, and by the sampler's own chain.

    The chain is as dense as the sampler's on all timesteps. Image `i` is a function of (seed, i, image, label) alone.

    Raises:
        ValueError: for a time that the process does not have.
    """
    process, codec, sampling = generator.process, generator.codec, generator.sampling
    if not 0 <= t < process.num_timesteps:
        raise ValueError(f"--reconstruct {t} must lie in 0..{process.num_timesteps - 1}, the timesteps")
    streams = [generator_for(generator.seed, "reconstruct", index) for index in range(len(images))]
    device = generator.accelerator.device
    y, x_0 = labels.to(device), codec.encode(images.to(device))
    x_t = process.q_sample(x_0, torch.full_like(y, t), randn_like(x_0, streams))

    def denoised(num_steps: int) -> UInt8[Tensor, "n 3 h w"]:
        shorter = replace(sampling, num_steps=num_steps)
        return replace(generator, process=_up_to(process, t), sampling=shorter).denoise(x_t, y, streams).cpu()

    chain = max(1, round(sampling.num_steps * (t + 1) / process.num_timesteps))
    return torch.stack([images, codec.decode(x_t).cpu(), denoised(1), denoised(chain)], dim=1)


def _up_to(process: GaussianDiffusion, t: int) -> GaussianDiffusion:
    """The process as if `t` were its last timestep: a sampler then starts from `x_t`."""
    shorter = copy(process)
    shorter.num_timesteps = t + 1
    shorter.betas, shorter.alphas_cumprod = process.betas[: t + 1], process.alphas_cumprod[: t + 1]
    return shorter


def spread_over_classes(labels: Int64[Tensor, " m"], classes: list[int], num_per_class: int) -> Int64[Tensor, " n"]:
    """Positions of `num_per_class` evenly spread images of each class, or of as many as it has."""
    found = []
    for label in classes:
        of_class = (labels == label).nonzero().flatten()
        num = min(num_per_class, len(of_class))
        found.append(of_class[torch.arange(num) * len(of_class) // max(1, num)])
    return torch.cat(found)
