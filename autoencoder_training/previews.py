"""Previews during an autoencoder's training: reconstructions of held-out images, and their PSNR."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm import tqdm

from autoencoder_training.autoencoder_config import AutoencodingConfig
from checkpoints.averages import EMA
from data.subsets import stratified
from metrics.image_batches import image_batches
from metrics.pixelwise import psnr
from training.log import is_due
from training.run import Run

COLUMNS = 12


def select_images(images: Any, at_most: int) -> UInt8[Tensor, "n 3 h w"]:
    """Load a fixed subset of a dataset, stratified by class."""
    indices = stratified(images.labels, min(at_most, len(images)), seed=0)
    return torch.cat([batch.images for batch in image_batches(images, 256, indices=indices)])


@torch.inference_mode()
def reconstruct(autoencoder: Any, images: UInt8[Tensor, "n 3 h w"], batch_size: int) -> UInt8[Tensor, "n 3 h w"]:
    """Reconstruct images from the mean of the posterior, rounded to 8 bits."""
    parts = []
    for batch in tqdm(images.split(batch_size), desc="reconstructing", unit="batch", leave=False):
        mean = autoencoder.encode(batch.to(autoencoder.device).float() / 127.5 - 1).latent_dist.mean
        parts.append((autoencoder.decode(mean).sample * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).cpu())
    return torch.cat(parts)


def reconstruction_psnr(autoencoder: Any, images: UInt8[Tensor, "n 3 h w"], batch_size: int) -> Float[Tensor, " n"]:
    """PSNR of each reconstruction in dB, at most 100."""
    return psnr(images, reconstruct(autoencoder, images, batch_size)).clamp(max=100)


@dataclass(frozen=True)
class Previews:
    """Reconstructions of `held_out` datasets, by name, by the averaged weights, on the main process."""

    run: Run[AutoencodingConfig]
    ema: EMA
    held_out: Mapping[str, Any]

    def due(self, step: int, num_steps: int) -> list[Callable[[int], dict[str, float]]]:
        """List what is due after a step. After the last step nothing is: the training previews once it has saved."""
        return [self.draw] if is_due(step, self.run.config.log.sample_every) and step < num_steps else []

    def draw(self, step: int) -> dict[str, float]:
        """Save a grid with a row of each kind of images above their reconstructions; returns the PSNR by kind."""
        if not self.run.is_main:
            return {}
        autoencoder, config, rows, values = self.ema.model.autoencoder, self.run.config, [], {}
        for name, dataset in self.held_out.items():
            images = select_images(dataset, config.log.num_validation)
            values[f"psnr_{name}"] = reconstruction_psnr(autoencoder, images, config.train.batch_size).mean().item()
            shown = images[stratified(torch.zeros(len(images)).long(), min(COLUMNS, len(images)), seed=0)]
            rows += [shown, reconstruct(autoencoder, shown, COLUMNS)]
        self.run.log_grid(torch.cat(rows), columns=len(rows[0]))
        return values
