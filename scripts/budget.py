"""Estimate the hours from ImageNet's images to FID-50k for several numbers of GPUs. Each assumption is a flag.

python scripts/budget.py --models '[DiT-XL/2]'                                      (400,000 steps of 256 images)
python scripts/budget.py --models '[DiT-XL/2]' --num_steps 7000000                  (the published length)
python scripts/budget.py --models '[XSwin-L]' --mfu 0.05
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from evaluation.table import terminal
from experiment.cli import run_main
from settings import within

INCEPTION = 11.4  # GFLOP of Inception v3 for a 299x299 image, a multiply-add counting as two (Szegedy et al. 2016)


@dataclass(frozen=True)
class BudgetConfig:
    """Estimate the hours for encoding, training, sampling and scoring. All parts scale with the number of GPUs, except
    for the all-reduce of gradients.

    Args:
        models: names of backbones, on latents of Stable Diffusion's autoencoder (1/8 of the side, 4 channels)
        gpus: numbers of GPUs, a row each
        num_images: images in the training set, encoded once, with mirrored views
        image_size: side of the images
        num_classes: classes of the training set
        num_steps: optimizer steps
        batch_size: images per step, over all GPUs
        num_samples: images to generate and score
        num_calls: model calls per sample
        guided: classifier-free guidance, which doubles the calls
        peak_tflops: peak of one GPU in bf16 without sparsity, for the backbone: 989 for H100 and H200 (data sheets)
        float32_tflops: peak of one GPU in float32, for autoencoder and Inception: 495 with TF32, 67 without
        mfu: fraction of these peaks that is reached
        reading: images per second that the CPUs read, decode and crop for each GPU during encoding: 135 per core for
            JPEGs of 500x375, measured on one core here, times 16 cores
        bus_gb: GB per second and GPU for the all-reduce of gradients in float32: 400 for NVLink, or for a 400 Gb/s
            network port per GPU in nodes with eight
    """

    models: list[str] = field(default_factory=lambda: ["DiT-XL/2", "XSwin-L"])
    gpus: list[int] = within("[1, inf)", [1, 8, 64])
    num_images: int = within("[1, inf)", 1_281_167)
    image_size: int = within("[32, inf)", 256)
    num_classes: int = within("[0, inf)", 1000)
    num_steps: int = within("[1, inf)", 400_000)
    batch_size: int = within("[1, inf)", 256)
    num_samples: int = within("[1, inf)", 50_000)
    num_calls: int = within("[1, inf)", 250)
    guided: bool = True
    peak_tflops: float = within("(0, inf)", 989.0)
    float32_tflops: float = within("(0, inf)", 495.0)
    mfu: float = within("(0, 1]", 0.4)
    reading: float = within("(0, inf)", 2160.0)
    bus_gb: float = within("(0, inf)", 400.0)

    def check(self, prefix: str) -> None:
        if self.image_size % 32:
            raise ValueError(f"{prefix}image_size {self.image_size} has to be a multiple of 32")
        if not self.gpus or not self.models:
            raise ValueError(f"{prefix}{'models' if self.gpus else 'gpus'} []: give one at least")


def main(config: BudgetConfig) -> None:
    """Count the operations of each model per image, and print a row for each number of GPUs."""
    from ablation.costs import count_cost
    from models import ModelSpec

    encoder, decoder = autoencoder_gflops(config.image_size)
    side, rows = config.image_size // 8, []
    for name in config.models:
        cost = count_cost(ModelSpec(name, {}, (side, side), 4, 8, config.num_classes))
        for gpus in config.gpus:
            hours, limit = hours_of(config, cost, encoder, decoder, gpus)
            row = {"model": name, "parameters": f"{cost.parameters / 1e6:.0f}M"}
            row |= {"GFLOP": f"{cost.gflops:.0f}", "GPUs": gpus}
            row |= {part: f"{value:.3g}" for part, value in hours.items()}
            row |= {"all": f"{sum(hours.values()):.3g}", "GPU hours": f"{gpus * sum(hours.values()):.3g}"}
            rows.append(row | {"limit": limit})
    print(terminal([list(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]))
    print(f"\nHours; GFLOP of a forward pass of an image, of the encoder {encoder:.0f}, of the decoder {decoder:.0f}.")


def hours_of(
    config: BudgetConfig, cost: Any, encoder: float, decoder: float, gpus: int
) -> tuple[dict[str, float], str]:
    """Estimate the hours of each part from the GFLOP of each network for an image, and say what limits training,
    'arithmetic' or the 'sums' of gradients."""
    peaks = config.peak_tflops, config.float32_tflops
    bf16, float32 = (peak * 1e3 * config.mfu * 3600 for peak in peaks)  # GFLOP per hour on one GPU
    reading = config.num_images / config.reading / 3600
    step = 3 * cost.gflops * config.batch_size / bf16 / gpus  # a backward pass costs about twice the forward pass
    all_reduce = 2 * 4 * cost.parameters * (gpus - 1) / gpus / (config.bus_gb * 1e9) / 3600
    per_sample = config.num_calls * (2 if config.guided else 1) * cost.gflops / bf16 + decoder / float32
    hours = {
        "encode": max(reading, 2 * config.num_images * encoder / float32) / gpus,
        "train": config.num_steps * max(step, all_reduce),  # gradients are reduced during the backward pass
        "sample": config.num_samples * per_sample / gpus,
        "score": config.num_samples * INCEPTION / float32 / gpus,
    }
    return hours, "sums" if all_reduce > step else "arithmetic"


def autoencoder_gflops(image_size: int) -> tuple[float, float]:
    """GFLOP per image of the encoder and the decoder of Stable Diffusion's architecture."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from autoencoder_training.autoencoder_config import ArchitectureConfig
    from autoencoder_training.model import create_autoencoder

    with torch.device("meta"):
        autoencoder = create_autoencoder(ArchitectureConfig(), image_size).eval()
        image, latent = torch.zeros(1, 3, image_size, image_size), torch.zeros(1, 4, image_size // 8, image_size // 8)
    gflops = []
    for network, data in ((autoencoder.encoder, image), (autoencoder.decoder, latent)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(data)
        gflops.append(counter.get_total_flops() / 1e9)
    return gflops[0], gflops[1]


if __name__ == "__main__":
    run_main(main, BudgetConfig)
