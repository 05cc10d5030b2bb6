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


def report(what: str, rows: dict[str, str], total: str) -> None:
    """A table, headed by what was measured on which machine."""
    import torch

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    print(f"\n{what}; {where}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| | |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value} |")
    print(f"| **together** | {total} |")


if __name__ == "__main__":
    auto_cli([extraction, frechet], as_positional=False)
