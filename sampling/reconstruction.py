"""What a model makes of noised held-out images: predicted in one step, and by the whole chain."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from checkpoints.checkpoint import Checkpoint
from data.subsets import by_name
from diffusion.samplers import randn_like
from machine.randomness import generator_for
from sampling.generation import Generator
from sampling.image_files import save_grid


def draw_reconstructions(
    generator: Generator,
    checkpoint: Checkpoint,
    held_out: Any,
    classes: list[int],
    num_per_class: int,
    t: int | float,
    path: Path,
) -> None:
    """The checkpoint's held-out images of these classes, noised to `t` and denoised, four pictures each, as one."""
    if "test" in checkpoint.identity:
        checkpoint.check_identity(test=held_out.describe())
    labels = torch.zeros_like(held_out.labels)
    if checkpoint.classes:
        labels = by_name(held_out.labels, held_out.classes, checkpoint.classes, "--reconstruct")
    chosen = spread_over_classes(labels, classes, num_per_class)
    images = torch.stack([held_out[index][0] for index in chosen.tolist()])
    pictures, time = reconstruct(generator, images, labels[chosen], t)
    if generator.accelerator.is_main_process:
        names = ["original", f"t={time:.4g}", "one step", "chain"] * 3
        save_grid(pictures.flatten(0, 1), path, columns=len(names), column_names=names)
        print(f"{len(chosen)} held-out images, noised and denoised: {path}")


def reconstruct(
    generator: Generator, images: UInt8[Tensor, "n 3 h w"], labels: Int64[Tensor, " n"], t: int | float
) -> tuple[UInt8[Tensor, "n kinds 3 h w"], int | float]:
    """For each image: itself, noised, `x_0` predicted from there in one step, and by the rest of the sampler's chain;
    and the time, the last that the chain visits up to `t`. Image `i` is a function of (seed, i, image, label) alone."""
    diffusion, codec, sampling = generator.diffusion, generator.codec, generator.sampling
    times = [time for time, _ in diffusion.reverse_steps(generator.num_steps, sampling.spacing)]
    if not times[-1] <= t <= times[0]:
        raise ValueError(f"--reconstruct {t:g} must lie in {times[-1]:g}..{times[0]:g}, times of the sampler")
    start = next(time for time in times if time <= t)
    streams = [generator_for(generator.seed, "reconstruct", index) for index in range(len(images))]
    y, x_0 = labels.to(generator.accelerator.device), codec.encode(images.to(generator.accelerator.device))
    x_t = diffusion.q_sample(x_0, torch.full_like(y, start, dtype=torch.tensor(start).dtype), randn_like(x_0, streams))

    predicted: list[Tensor] = []  # at each step of the chain
    kept = replace(generator, callback=lambda step, x_t, x_0: predicted.append(x_0))
    chain = kept.denoise(x_t, y, streams, start)
    return torch.stack([images, codec.decode(x_t).cpu(), codec.decode(predicted[0]).cpu(), chain.cpu()], dim=1), start


def spread_over_classes(labels: Int64[Tensor, " m"], classes: list[int], num_per_class: int) -> Int64[Tensor, " n"]:
    """Positions of `num_per_class` evenly spread images of each class, or of as many as it has."""
    positions = []
    for label in classes:
        of_class = (labels == label).nonzero().flatten()
        num = min(num_per_class, len(of_class))
        positions.append(of_class[torch.arange(num) * len(of_class) // max(1, num)])
    return torch.cat(positions)
