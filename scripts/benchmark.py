"""Measure, each figure as a ratio within one run, and print a Markdown table for docs/performance.md.

python scripts/benchmark.py extraction --extractor mobilenet_v2.pt
python scripts/benchmark.py frechet
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from jsonargparse import auto_cli

sys.path.insert(0, str(Path(__file__).parent.parent))


def extraction(extractor: str, num_images: int = 512, batch_size: int = 64, rounds: int = 5) -> None:
    """Images a second of `metrics.fidelity.Extractor` beside a bare loop over the same network on tensors in memory.

    Args:
        extractor: a name, or a TorchScript file
        num_images: 64x64 images a round
        batch_size: images at a time
        rounds: both loops take turns so often; medians are compared
    """
    import torch

    from metrics.fidelity import Extractor
    from metrics.images import image_batches

    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = Extractor(extractor, device=device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num_images, 3, 64, 64), dtype=torch.uint8, generator=generator)

    @torch.inference_mode()
    def bare() -> None:
        for batch in images.split(batch_size):
            network.module(batch.to(device))[0].cpu()

    def ours() -> None:
        network(image_batches(images, batch_size), num_images, progress=False)

    bare_time, our_time = alternate(rounds, bare, ours)
    report(
        f"{network.name}, {num_images} images of 64x64, batches of {batch_size}",
        {"bare loop": f"{num_images / bare_time:.1f} img/s", "Extractor": f"{num_images / our_time:.1f} img/s"},
        f"ratio {bare_time / our_time:.3f}",
    )


def frechet(num_images: int = 50_000, dim: int = 2048) -> None:
    """Seconds for the Fréchet distance of two sets: moments in batches, then the distance.

    Args:
        num_images: rows of each set
        dim: features
    """
    import torch

    from metrics.frechet import RunningMoments, frechet_distance

    generator = torch.Generator().manual_seed(0)
    sets = [torch.randn(num_images, dim, generator=generator) for _ in range(2)]
    began = time.perf_counter()
    moments = []
    for features in sets:
        running = RunningMoments()
        for batch in features.split(4096):
            running.update(batch)
        moments.append(running.moments())
    middle = time.perf_counter()
    value = frechet_distance(*moments)
    end = time.perf_counter()
    report(
        f"two sets of {num_images} x {dim}",
        {"moments of both": f"{middle - began:.1f} s", "distance": f"{end - middle:.1f} s"},
        f"{end - began:.1f} s in all (distance {value:.3f})",
    )


def training(
    models: list[str] = ["XSwin", "USwin", "DiT", "UViT"],  # noqa: B006  (read only)
    latent_size: int = 8,
    num_classes: int = 101,
    batch_size: int = 128,
    precision: str = "bf16",
    rounds: int = 5,
) -> None:
    """Images a second of an optimizer step (forward, hybrid loss, backward, fused AdamW, average) on random latents.

    Args:
        models: names of backbones; they take turns
        latent_size: side of the latents
        num_classes: of the labels
        batch_size: images a step
        precision: 'fp32' or 'bf16' (autocast)
        rounds: steps of each that count
    """
    import torch

    from diffusion import GaussianDiffusion
    from experiment.ema import EMA
    from metrics.cost import cost
    from models import create_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    process, shape = GaussianDiffusion(), (4, latent_size, latent_size)
    x_0 = torch.randn(batch_size, *shape, device=device)
    y = torch.randint(num_classes, (batch_size,), device=device)
    sizes = {"input_size": latent_size, "in_channels": 4, "out_channels": 8, "num_classes": num_classes}
    built = [create_model(name, **sizes).to(device) for name in models]

    def step_of(model: torch.nn.Module) -> Callable[[], None]:
        optimizer, ema = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), EMA(model, 0.9999)

        def step() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                loss = process.training_loss(model, x_0, y)["loss"].mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update(model, 0)
            if device.type == "cuda":
                torch.cuda.synchronize()

        return step

    seconds = alternate(rounds, *(step_of(model) for model in built))
    peak = matrix_peak(device, precision)
    rows = {}
    for name, model, taken in zip(models, built, seconds, strict=True):
        of_image = cost(model, latent_shape=shape, num_classes=num_classes)
        share = 3 * of_image.gflops * 1e9 * batch_size / taken / peak  # backward costs about twice the forward
        rows[name] = (
            f"{of_image.parameters / 1e6:.1f}M, {of_image.gflops:.2f} GFLOP forward, {batch_size / taken:.1f} img/s, "
            f"{share:.0%} of the matrix peak"
        )
    what = f"training step, batch {batch_size}, {precision}, latents {latent_size}x{latent_size}"
    report(what, rows, f"matrix peak {peak / 1e12:.2f} TFLOP/s (a product of 2048-sided squares)")


def sampling(
    models: list[str] = ["XSwin"],  # noqa: B006  (read only)
    latent_size: int = 8,
    num_classes: int = 101,
    batch_size: int = 101,
    num_steps: int = 10,
    guidance_scale: float = 1.5,
    sampler: str = "ddim",
    precision: str = "bf16",
    rounds: int = 3,
) -> None:
    """Images a second of guided sampling, without decoding.

    Args:
        models: names of backbones; they take turns
        latent_size: side of the latents
        num_classes: of the labels
        batch_size: images at a time
        num_steps: model calls a sample
        guidance_scale: of classifier-free guidance; 1: none
        sampler: its name
        precision: 'fp32' or 'bf16' (autocast)
        rounds: batches of each that count
    """
    import torch

    from diffusion import GaussianDiffusion, sample
    from models import create_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    process = GaussianDiffusion()
    noise = torch.randn(batch_size, 4, latent_size, latent_size, device=device)
    y = torch.arange(batch_size, device=device) % num_classes
    sizes = {"input_size": latent_size, "in_channels": 4, "out_channels": 8, "num_classes": num_classes}
    settings = {"sampler": sampler, "num_steps": num_steps, "guidance_scale": guidance_scale}

    def draw_of(model: torch.nn.Module) -> Callable[[], None]:
        def draw() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                sample(process, model, noise, y, **settings)
            if device.type == "cuda":
                torch.cuda.synchronize()

        return draw

    built = [create_model(name, **sizes).to(device).eval() for name in models]
    seconds = alternate(rounds, *(draw_of(model) for model in built))
    rows = {name: f"{batch_size / taken:.2f} img/s" for name, taken in zip(models, seconds, strict=True)}
    what = f"{sampler}, {num_steps} steps, guidance {guidance_scale:g}, batch {batch_size}, {precision}"
    report(what, rows, f"medians of {rounds} rounds; no decoding")


def matrix_peak(device, precision: str, side: int = 2048, rounds: int = 5) -> float:
    """FLOP/s of a large square product in this precision."""
    import torch

    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)

    def product() -> None:
        (a @ a).sum().item()

    (taken,) = alternate(rounds, product)
    return 2 * side**3 / taken


def alternate(rounds: int, *programs: Callable[[], None]) -> list[float]:
    """Median seconds of each program; they take turns, after one round that does not count."""
    times: list[list[float]] = [[] for _ in programs]
    for number in range(rounds + 1):
        for program, taken in zip(programs, times, strict=True):
            began = time.perf_counter()
            program()
            if number > 0:
                taken.append(time.perf_counter() - began)
    return [statistics.median(taken) for taken in times]


def report(what: str, rows: dict[str, str], note: str) -> None:
    """A table, headed by what was measured on which machine, with a note below."""
    import torch

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    print(f"\n{what}; {where}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| | |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value} |")
    print(f"\n{note}")


if __name__ == "__main__":
    auto_cli([extraction, frechet, training, sampling], as_positional=False)
