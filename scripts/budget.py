"""Hours from ImageNet's images to FID-50k on so many GPUs, and where they go: arithmetic, with each assumption a flag.

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
from experiment.cli import one_line_errors, parse
from settings import within

INCEPTION = 11.4  # GFLOP of Inception v3 for an image of 299x299, multiply-adds as two (Szegedy et al. 2016)


@dataclass(frozen=True)
class BudgetConfig:
    """Hours of each part. One GPU's rates are multiplied by their number, but gradients have to be summed over all.

    Args:
        models: names of backbones, in latents of an autoencoder of Stable Diffusion's shape (an eighth, 4 channels)
        gpus: how many, a row each
        num_images: of the training set, encoded once, with their mirror images
        image_size: their side
        num_classes: of the training set
        num_steps: optimizer steps
        batch_size: images a step, over all GPUs
        num_samples: images that are drawn and scored
        num_calls: of the sampler, a sample
        guided: each call is for an image with and without its label
        peak_tflops: of one GPU in bf16, without sparsity, for the backbone: 989 of an H100 or H200 (data sheets)
        float32_tflops: of one GPU for autoencoder and Inception, in float32: 495 with TF32, 67 without
        mfu: share of either peak that is reached
        reading: images that are read, decoded and cut a second, beside each GPU, while others are encoded: 135 a core
            of JPEGs of 500x375, measured on one here, times 16 cores
        bus_gb: GB a second at which each GPU sums gradients in float32 with the others: 400 of NVLink, or of a
            400 Gb/s network port for each of a node's eight GPUs
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
    """Count what a model computes for an image, and print a row for each number of GPUs."""
    from ablation.costs import count
    from models import ModelSpec

    encoder, decoder = autoencoder_gflops(config.image_size)
    side, rows = config.image_size // 8, []
    for name in config.models:
        of_image = count(ModelSpec(name, {}, (side, side), 4, 8, config.num_classes))
        for gpus in config.gpus:
            hours, limit = hours_of(config, of_image, encoder, decoder, gpus)
            row = {"model": name, "parameters": f"{of_image.parameters / 1e6:.0f}M"}
            row |= {"GFLOP": f"{of_image.gflops:.0f}", "GPUs": gpus}
            row |= {part: f"{spent:.3g}" for part, spent in hours.items()}
            row |= {"all": f"{sum(hours.values()):.3g}", "GPU hours": f"{gpus * sum(hours.values()):.3g}"}
            rows.append(row | {"limit": limit})
    print(terminal([list(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]))
    print(f"\nHours; GFLOP of a forward pass of an image, of the encoder {encoder:.0f}, of the decoder {decoder:.0f}.")


def hours_of(
    config: BudgetConfig, of_image: Any, encoder: float, decoder: float, gpus: int
) -> tuple[dict[str, float], str]:
    """Each part's, of what a model, an encoder and a decoder compute for an image; and what limits training."""
    peaks = config.peak_tflops, config.float32_tflops
    rate, exact = (peak * 1e3 * config.mfu * 3600 for peak in peaks)  # GFLOP an hour on one GPU
    reading = config.num_images / config.reading / 3600
    computing = 3 * of_image.gflops * config.batch_size / rate / gpus  # a step; backward costs about twice the forward
    summing = 2 * 4 * of_image.parameters * (gpus - 1) / gpus / (config.bus_gb * 1e9) / 3600
    drawing = config.num_calls * (2 if config.guided else 1) * of_image.gflops / rate + decoder / exact
    hours = {
        "encode": max(reading, 2 * config.num_images * encoder / exact) / gpus,
        "train": config.num_steps * max(computing, summing),  # gradients are summed during the backward pass
        "sample": config.num_samples * drawing / gpus,
        "score": config.num_samples * INCEPTION / exact / gpus,
    }
    return hours, "sums" if summing > computing else "arithmetic"


def autoencoder_gflops(image_size: int) -> tuple[float, float]:
    """Of encoder and decoder, for an image, in Stable Diffusion's shape."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from autoencoding.autoencoder_config import ArchitectureConfig
    from autoencoding.model import create_autoencoder

    with torch.device("meta"):
        autoencoder = create_autoencoder(ArchitectureConfig(), image_size).eval()
        image, latent = torch.zeros(1, 3, image_size, image_size), torch.zeros(1, 4, image_size // 8, image_size // 8)
    counted = []
    for half, data in ((autoencoder.encoder, image), (autoencoder.decoder, latent)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            half(data)
        counted.append(counter.get_total_flops() / 1e9)
    return counted[0], counted[1]


if __name__ == "__main__":
    with one_line_errors():
        main(parse(BudgetConfig))
