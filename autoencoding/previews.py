"""What an autoencoder's training looks at on the way: reconstructions of held-out images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor
from tqdm import tqdm

from data.subsets import stratified
from metrics.image_batches import image_batches
from metrics.pixelwise import psnr
from sampling.image_files import save_grid

COLUMNS = 12


def pick(images: Any, at_most: int | None = None) -> UInt8[Tensor, "n 3 h w"]:
    """Of a dataset of `data`, all or so many, of each class its share."""
    chosen = stratified(images.labels, min(at_most or len(images), len(images)), seed=0)
    return torch.cat([batch.images for batch in image_batches(images, 256, indices=chosen)])


@torch.inference_mode()
def reconstruct(autoencoder: Any, images: UInt8[Tensor, "n 3 h w"], batch_size: int) -> UInt8[Tensor, "n 3 h w"]:
    """From the posterior's mean, rounded to 256 levels."""
    parts = []
    for batch in tqdm(images.split(batch_size), desc="reconstructing", unit="batch", leave=False):
        mean = autoencoder.encode(batch.to(autoencoder.device).float() / 127.5 - 1).latent_dist.mean
        parts.append((autoencoder.decode(mean).sample * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).cpu())
    return torch.cat(parts)


def mean_psnr(autoencoder: Any, images: UInt8[Tensor, "n 3 h w"], batch_size: int) -> float:
    """Peak signal-to-noise ratio of reconstructions in dB, the mean over images."""
    return psnr(images, reconstruct(autoencoder, images, batch_size)).clamp(max=100).mean().item()


def draw_reconstructions(autoencoder: Any, held_out: Mapping[str, UInt8[Tensor, "_ 3 h w"]], path: Path) -> None:
    """A row of each kind of held-out images, and below it their reconstructions."""
    rows = []
    for images in held_out.values():
        chosen = images[stratified(torch.zeros(len(images)).long(), min(COLUMNS, len(images)), seed=0)]
        rows += [chosen, reconstruct(autoencoder, chosen, COLUMNS)]
    save_grid(torch.cat(rows), path, columns=len(rows[0]))
