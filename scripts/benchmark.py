"""Images a second of training steps and of model calls, on random latents; a Markdown table is printed.

python scripts/benchmark.py                                               (all four backbones)
python scripts/benchmark.py --models [XSwin,DiT] --latent_size 32 --batch_size 16 --compile true
"""

import platform
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiment.cli import one_line_errors, run_program

BACKBONES = ["XSwin", "USwin", "DiT", "UViT"]
NUM_CLASSES = 101


def main(
    models: list[str] = BACKBONES,
    latent_size: int = 8,
    batch_size: int = 128,
    precision: str = "auto",
    compile: bool = False,
    rounds: int = 5,
    model_args: dict[str, Any] | None = None,
) -> None:
    """Images a second of an optimizer step (forward, hybrid loss, backward, fused AdamW) and of one call of the model.

    Args:
        models: names of backbones
        latent_size: side of the latents, of four channels
        batch_size: images a step
        precision: as train.precision: 'auto', 'fp32' or 'bf16'
        compile: as train.compile does
        rounds: steps, or calls, whose median counts
        model_args: constructor arguments of the backbones that differ from their rows in the table
    """
    import torch

    from ablation.costs import count, time_model
    from diffusion import GaussianDiffusion
    from evaluation.table import terminal
    from machine.accelerator import open_accelerator
    from machine.precision import precision_of
    from metrics.cost import throughput
    from models import ModelSpec

    accelerator = open_accelerator(precision)
    device, side = accelerator.device, 2048
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if precision_of(accelerator) == "bf16" else None)
    peak = 2 * side**3 * throughput(lambda: a @ a, batch_size=1, num_repeats=3, device=device)
    rows = [["model", "parameters", "GFLOPs", "training img/s", "MFU", "calls img/s"]]
    for name in models:
        spec = ModelSpec(name, model_args or {}, (latent_size, latent_size), 4, 8, NUM_CLASSES)
        cost = count(spec)
        training, calls = time_model(spec, GaussianDiffusion(), accelerator, batch_size, rounds, compile=compile)
        share = 3e9 * cost.gflops * training / peak  # backward costs about twice the forward
        rows.append([name, f"{cost.parameters / 1e6:.2f}M", f"{cost.gflops:.3f}", f"{training:.4g}", f"{share:.3f}"])
        rows[-1].append(f"{calls:.4g}")
    where = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"\nbatch {batch_size}, latents {latent_size}x{latent_size}; {where}, torch {torch.__version__}\n")
    print(terminal(rows))
    print(f"\nMFU: of {peak / 1e12:.2f} TFLOP/s, a product of matrices of side {side}.")


if __name__ == "__main__":
    with one_line_errors():
        run_program(main)
