"""Distributed generation: labels in, images out; each image a function of (seed, its index, its label) alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Int64, UInt8
from torch import Tensor, nn
from tqdm import tqdm

from diffusion import GaussianDiffusion, sample
from diffusion.samplers import randn_like
from experiment.batches import generator_for
from experiment.config import SamplingConfig
from models.autoencoder import Codec

Panel = Callable[[int, Tensor, Tensor], None]


def generate(
    model: nn.Module,
    process: GaussianDiffusion,
    codec: Codec,
    labels: Int64[Tensor, " n"],
    sampling: SamplingConfig,
    *,
    image_size: tuple[int, int],
    seed: int,
    batch_size: int,
    accelerator: Accelerator,
    desc: str = "sampling",
    callback: Panel | None = None,
) -> UInt8[Tensor, "n 3 h w"]:
    """Images of these labels, in order, on every process; the work is shared by all of them.

    The noise of image `i` comes from a generator of its own, seeded by (seed, i), drawn on the CPU: neither batch
    size, nor number of processes, nor device changes it. Classifier-free guidance needs a conditional model.
    """
    shape = codec.latent_shape(*image_size)
    device = accelerator.device
    mine = range(len(labels))[accelerator.process_index :: accelerator.num_processes]
    images: list[tuple[int, Tensor]] = []
    bf16 = accelerator.mixed_precision == "bf16"
    with tqdm(total=len(mine), desc=desc, unit="img", disable=not accelerator.is_main_process, leave=False) as bar:
        for start in range(0, len(mine), batch_size):
            indices = list(mine[start : start + batch_size])
            generators = [generator_for(seed, "sample", index) for index in indices]
            noise = randn_like(torch.empty(len(indices), *shape, device=device), generators)
            with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
                x_0 = sample(
                    process,
                    model,
                    noise,
                    labels[indices].to(device),
                    sampler=sampling.sampler,
                    num_steps=sampling.num_steps,
                    eta=sampling.eta,
                    guidance_scale=sampling.guidance_scale,
                    legacy_cfg_channels=sampling.legacy_cfg_channels,
                    generator=generators,
                    callback=callback,
                )
            images += zip(indices, codec.decode(x_0).cpu(), strict=True)
            bar.update(len(indices))
    everyone = dict(gather_object(images))
    return torch.stack([everyone[index] for index in range(len(labels))])


def balanced_labels(num_images: int, num_classes: int) -> Int64[Tensor, " n"]:
    """Labels in turn, so that classes differ in count by one at most; all 0 for an unconditional model."""
    return torch.arange(num_images) % max(1, num_classes)
