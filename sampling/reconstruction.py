"""Reconstruct noised held-out images, in one step and by the rest of the sampler's chain."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from checkpoints.checkpoint import Checkpoint
from data.subsets import map_labels
from diffusion.samplers import randn_like
from machine.randomness import generator_for
from sampling.generation import Generator
from sampling.grids import check_size, save_grid


def draw_reconstructions(
    generator: Generator,
    checkpoint: Checkpoint,
    held_out: Any,
    classes: list[int],
    num_per_class: int,
    t: int | float,
    path: Path,
    *,
    keep: bool = False,
) -> None:
    """Save a grid of held-out images of some classes, noised to the time `t` and denoised; see `reconstruct`. With
    `keep`, another file of that name is kept."""
    if "test" in checkpoint.identity:
        checkpoint.check_identity(test=held_out.describe())
    labels = torch.zeros_like(held_out.labels)
    if checkpoint.classes:
        labels = map_labels(held_out.labels, held_out.classes, checkpoint.classes, "--reconstruct")
    chosen = spread_over_classes(labels, classes, num_per_class)
    if len(chosen) == 0:
        names = ", ".join(checkpoint.classes[label] for label in classes)
        raise ValueError(f"--reconstruct: there are no held-out images of {names}; give other --classes")
    images = torch.stack([held_out[index][0] for index in chosen.tolist()])
    columns = 12
    check_size(path, 4 * len(chosen), generator.image_size, columns)
    pictures, time = reconstruct(generator, images, labels[chosen], t)
    if generator.accelerator.is_main_process:
        names = ["original", f"t={time:.4g}", "one step", "chain"] * 3
        save_grid(pictures.flatten(0, 1), path, columns=columns, column_names=names, keep=keep)
        print(f"{len(chosen)} held-out images, noised and denoised: {path}")


def reconstruct(
    generator: Generator, images: UInt8[Tensor, "n 3 h w"], labels: Int64[Tensor, " n"], t: int | float
) -> tuple[UInt8[Tensor, "n kinds 3 h w"], int | float]:
    """Noise images and denoise them. The result of image `i` depends on (seed, i, image, label) only.

    Returns four versions of each image, which are the original, noised, `x_0` predicted from it in one step, and
    denoised by the rest of the sampler's chain; and the time used, the noisiest one of the chain that does not exceed
    `t`.
    """
    diffusion, codec, sampling = generator.diffusion, generator.codec, generator.sampling
    times = [time for time, _ in diffusion.reverse_steps(generator.num_steps, sampling.spacing)]
    if not times[-1] <= t <= times[0]:
        raise ValueError(f"--reconstruct {t:g} must lie in {times[-1]:g}..{times[0]:g}, times of the sampler")
    start = next(time for time in times if time <= t)
    generators = [generator_for(generator.seed, "reconstruct", index) for index in range(len(images))]
    y, x_0 = labels.to(generator.accelerator.device), codec.encode(images.to(generator.accelerator.device))
    noise = randn_like(x_0, generators)
    x_t = diffusion.q_sample(x_0, torch.full_like(y, start, dtype=torch.tensor(start).dtype), noise)

    predictions: list[Tensor] = []  # of x_0, at each step of the chain
    recording = replace(generator, callback=lambda step, x_t, x_0: predictions.append(x_0))
    denoised = recording.denoise(x_t, y, generators, start)
    versions = [images, codec.decode(x_t).cpu(), codec.decode(predictions[0]).cpu(), denoised.cpu()]
    return torch.stack(versions, dim=1), start


def spread_over_classes(labels: Int64[Tensor, " m"], classes: list[int], num_per_class: int) -> Int64[Tensor, " n"]:
    """Select indices of up to `num_per_class` evenly spaced images of each class."""
    selected = []
    for label in classes:
        of_class = (labels == label).nonzero().flatten()
        num = min(num_per_class, len(of_class))
        selected.append(of_class[torch.arange(num) * len(of_class) // max(1, num)])
    return torch.cat(selected)
