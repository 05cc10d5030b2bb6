"""Measure. Figures to be compared come from one run, in turns, as medians; a Markdown table is printed.

python scripts/benchmark.py training                                  (all four backbones, images a second)
python scripts/benchmark.py training --compare ../XSwinDiffusion      (beside the published implementation)
python scripts/benchmark.py sampling --models [XSwin,DiT]
"""

import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from evaluation.table import terminal
from experiment.cli import one_line_errors, run_program

BACKBONES = ["XSwin", "USwin", "DiT", "UViT"]
NUM_CLASSES = 101
Row = dict[str, Any]
Program = tuple[Row, Callable[[], Any]]  # what is measured, and a call of it


def training(
    models: list[str] = BACKBONES,
    latent_size: int = 8,
    batch_size: int = 128,
    precision: str = "auto",
    compile: bool = False,
    rounds: int = 5,
    compare: Path | None = None,
    model_args: dict[str, Any] | None = None,
) -> None:
    """Images a second of an optimizer step (forward, hybrid loss, backward, fused AdamW, average) on random latents.

    Args:
        models: names of backbones; they take turns
        latent_size: side of the latents
        batch_size: images a step
        precision: as train.precision: 'auto', 'fp32' or 'bf16'
        compile: as train.compile does
        rounds: steps of each that count
        compare: checkout of the published implementation: its step as shipped (float32), and, where ours computes in
            it, in bf16 with a fused optimizer
        model_args: constructor arguments of the backbones that differ from their rows in the table
    """
    from metrics.cost import cost

    published, precision = checkout(compare), chosen(precision)
    peak = matrix_peak(precision)
    x_0, y = latents(batch_size, latent_size)
    programs: list[Program] = []
    for name in models:
        model = backbone(name, latent_size, **(model_args or {}))
        of_image = cost(model, latent_shape=(4, latent_size, latent_size), num_classes=NUM_CLASSES)
        row = head(name, precision + " compiled" * compile)
        row |= {"parameters": of_image.parameters, "gflops": of_image.gflops}
        programs.append((row, our_step(model, precision, x_0, y, compile)))
        for theirs in dict.fromkeys(("fp32", precision)) if published else ():
            step = published.step(name, NUM_CLASSES, theirs, x_0, y)
            programs.append((head(name, theirs, "published"), step))
    rows = in_turns(programs, rounds, batch_size)
    for row in rows:
        if "gflops" in row:  # backward costs about twice the forward
            row["MFU"] = round(3 * row["gflops"] * 1e9 * row["img/s"] / peak, 3)
    what = f"optimizer step, batch {batch_size}, latents {latent_size}x{latent_size}"
    note = f"MFU: of {peak / 1e12:.2f} TFLOP/s, a product of {the_device()} matrices of side 2048."
    report(what, rows, note)


def sampling(
    models: list[str] = BACKBONES,
    batch_size: int = 101,
    num_steps: int = 10,
    guidance_scale: float = 1.5,
    sampler: str = "ddpm",
    precision: str = "auto",
    rounds: int = 3,
    compare: Path | None = None,
) -> None:
    """Images a second of guided sampling, without decoding.

    Args:
        models: names of backbones; they take turns
        batch_size: images at a time
        num_steps: model calls a sample; time is proportional to them
        guidance_scale: of classifier-free guidance; 1: none
        sampler: its name; the published one is 'ddpm'
        precision: of both implementations, as train.precision
        rounds: batches of each that count
        compare: checkout of the published implementation
    """
    from diffusion import GaussianDiffusion, sample

    published, precision = checkout(compare), chosen(precision)
    noise, y = latents(batch_size)
    settings = {"sampler": sampler, "num_steps": num_steps, "guidance_scale": guidance_scale}
    programs: list[Program] = []
    for name in models:
        model = backbone(name).eval()
        draw = partial(sample, GaussianDiffusion(), model, noise, y, **settings)
        programs.append((head(name, precision), autocasting(precision, draw)))
        if published:
            model = published.create(name, latent_size=8, num_classes=NUM_CLASSES).to(the_device()).eval()
            theirs = {"num_classes": NUM_CLASSES, "num_steps": num_steps, "scale": guidance_scale}
            draw = partial(published.sample, model, noise, y, **theirs)
            programs.append((head(name, precision, "published"), autocasting(precision, draw)))
    rows = in_turns(programs, rounds, batch_size)
    report(f"{sampler}, {num_steps} steps, guidance {guidance_scale:g}, batch {batch_size}", rows)


def our_step(model: Any, precision: str, x_0: Any, y: Any, compile: bool) -> Callable[[], None]:
    """An optimizer step as `train.py` makes it, on these latents and labels."""
    from checkpoints.averages import EMA
    from diffusion import GaussianDiffusion
    from experiment.config import OptimConfig
    from training.optimizer import build_optimizer
    from training.preparation import compile_blocks

    diffusion, optimizer, ema = GaussianDiffusion(), build_optimizer(model, OptimConfig()), EMA(model, 0.9999)
    if compile:
        compile_blocks(model)
    loss_of = autocasting(precision, lambda: diffusion.training_loss(model, x_0, y)["loss"].mean())

    def step() -> None:
        loss_of().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model, 0)

    return step


def checkout(folder: Path | None) -> Any:
    from published.checkout import Published

    return None if folder is None else Published(folder)


def head(name: str, precision: str, implementation: str = "this one") -> Row:
    return {"model": name, "implementation": implementation, "precision": precision}


def backbone(name: str, latent_size: int = 8, **model_args: Any) -> Any:
    """A registered backbone for four-channel latents and learned variances, on the device."""
    from models import create_model

    sizes = {"input_size": latent_size, "in_channels": 4, "out_channels": 8, "num_classes": NUM_CLASSES}
    return create_model(name, **sizes, **model_args).to(the_device())


def latents(batch_size: int, latent_size: int = 8) -> tuple[Any, Any]:
    """Random latents [b 4 s s] and labels [b]."""
    import torch

    x_0 = torch.randn(batch_size, 4, latent_size, latent_size, device=the_device())
    return x_0, torch.arange(batch_size, device=the_device()) % NUM_CLASSES


def autocasting(precision: str, function: Callable[[], Any]) -> Callable[[], Any]:
    import torch

    return torch.autocast(the_device().type, torch.bfloat16, enabled=precision == "bf16")(function)


def chosen(precision: str) -> str:
    """What train.precision of that name is on this machine; says what it costs where it is emulated."""
    from machine.precision import choose_precision, warning_of

    if warning := warning_of(precision, the_device(), "--precision"):
        print(warning, flush=True)
    return choose_precision(precision, the_device())


def the_device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def matrix_peak(precision: str, side: int = 2048) -> float:
    """FLOP/s of a large square product in this precision."""
    import torch

    from metrics.cost import throughput

    a = torch.randn(side, side, device=the_device(), dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    return 2 * side**3 * throughput(lambda: a @ a, batch_size=1, num_repeats=3, device=the_device())


def in_turns(programs: Sequence[Program], rounds: int, num_images: int) -> list[Row]:
    """Rows with images a second: the median, slowest and fastest round, after one that does not count. Programs take
    turns; `step GB` is what a first call adds to the most memory that was held."""
    import torch

    from training.meter import memory_gb

    device = the_device()
    seconds: list[list[float]] = [[] for _ in programs]
    memory: list[float] = []
    for number in range(rounds + 1):
        for (_, program), taken in zip(programs, seconds, strict=True):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            held, began = memory_gb(device), time.perf_counter()
            program()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number == 0:
                memory.append(round(memory_gb(device) - held, 3))
            else:
                taken.append(time.perf_counter() - began)
    rows = []
    for (row, _), taken, used in zip(programs, seconds, memory, strict=True):
        speed, slowest, fastest = (num_images / pick(taken) for pick in (statistics.median, max, min))
        spread = f"{slowest:.1f} to {fastest:.1f}"
        rows.append({**row, "img/s": float(f"{speed:.4g}"), "spread": spread, "step GB": used})
    return rows


def report(what: str, rows: Sequence[Row], note: str = "") -> None:
    """A Markdown table, headed by what was measured on which machine."""
    import torch

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    title = f"{what}; {where}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([str(row.get(column, "")) for column in columns] for row in rows)]
    print(f"\n{title}\n\n{terminal(cells)}\n\n{note}")


if __name__ == "__main__":
    with one_line_errors():
        run_program([training, sampling])
