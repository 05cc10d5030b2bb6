"""Hours from ImageNet's images to FID-50k on so many GPUs, and where they go: arithmetic, with each assumption a flag.

python scripts/budget.py --models '[DiT-XL/2]'                                      (400,000 steps of 256 images)
python scripts/budget.py --models '[DiT-XL/2]' --num_steps 7000000                  (the published length)
python scripts/budget.py --models '[XSwin-L]' --mfu 0.05
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from evaluation.table import terminal
from experiment.cli import run_program

INCEPTION = 11.4  # GFLOP of Inception v3 for an image of 299x299, multiply-adds as two (Szegedy et al. 2016)
POSITIVE = ["num_images", "num_steps", "batch_size", "num_samples", "num_calls"]
POSITIVE += ["peak_tflops", "float32_tflops", "reading", "bus_gb"]


def main(
    models: list[str] = ["DiT-XL/2", "XSwin-L"],  # noqa: B006  (read only)
    gpus: list[int] = [1, 8, 64],  # noqa: B006
    num_images: int = 1_281_167,
    image_size: int = 256,
    num_classes: int = 1000,
    num_steps: int = 400_000,
    batch_size: int = 256,
    num_samples: int = 50_000,
    num_calls: int = 250,
    guided: bool = True,
    peak_tflops: float = 989.0,
    float32_tflops: float = 495.0,
    mfu: float = 0.4,
    reading: float = 2160.0,
    bus_gb: float = 400.0,
) -> None:
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
    values = locals()
    if wrong := next((name for name in POSITIVE if not values[name] > 0), None):
        raise ValueError(f"--{wrong} {values[wrong]}: must be above 0")
    if not 0 < mfu <= 1:
        raise ValueError(f"--mfu {mfu}: a share of the peak lies between 0 and 1")
    if image_size < 32 or image_size % 32 or min(gpus, default=0) < 1:
        raise ValueError(f"--image_size {image_size} has to be a multiple of 32, and of --gpus {gpus} each above 0")
    from ablation.costs import count
    from models import ModelSpec

    encoder, decoder = autoencoder_gflops(image_size)
    rate, exact = (peak * 1e3 * mfu * 3600 for peak in (peak_tflops, float32_tflops))  # GFLOP an hour on one GPU
    rows: list[dict[str, Any]] = []
    for name in models:
        of_image = count(ModelSpec(name, {}, (image_size // 8, image_size // 8), 4, 8, num_classes))
        step = 3 * of_image.gflops * batch_size / rate  # backward costs about twice the forward
        calls = num_calls * (2 if guided else 1)
        for number in gpus:
            summing = 2 * 4 * of_image.parameters * (number - 1) / number / (bus_gb * 1e9) / 3600
            hours = {
                "encode": max(num_images / reading / 3600, 2 * num_images * encoder / exact) / number,
                "train": num_steps * max(step / number, summing),  # gradients are summed during the backward pass
                "sample": num_samples * (calls * of_image.gflops / rate + decoder / exact) / number,
                "score": num_samples * INCEPTION / exact / number,
            }
            row = {"model": name, "parameters": f"{of_image.parameters / 1e6:.0f}M"}
            row |= {"GFLOP": f"{of_image.gflops:.0f}", "GPUs": number}
            row |= {part: f"{spent:.3g}" for part, spent in hours.items()}
            row |= {"all": f"{sum(hours.values()):.3g}", "GPU hours": f"{number * sum(hours.values()):.3g}"}
            rows.append(row | {"limit": "sums" if summing > step / number else "arithmetic"})
    print(terminal([list(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]))
    print(f"\nHours; GFLOP of a forward pass of an image, of the encoder {encoder:.0f}, of the decoder {decoder:.0f}.")


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
    run_program(main)
