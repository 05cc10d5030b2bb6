"""How fast this machine makes an optimizer step, and other programs that are to be compared."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from checkpoints.averages import EMA
from data.encoding import IMAGES_PER_SHARD
from data.latents import FORMAT
from data.shards import write_shard
from diffusion import Diffusion, GaussianDiffusion
from evaluation.table import terminal
from experiment.config import OptimConfig
from machine.whole_files import write_whole
from metrics.cost import throughput
from models import create_model
from models.backbone import Backbone
from models.layers.launches import AT_ONCE
from training.meter import memory_gb
from training.optimizer import build_optimizer
from training.preparation import cast_at_once, compile_blocks

NUM_CLASSES = 101
GAUSSIAN = GaussianDiffusion()
CALLS = 10  # of a program before a GPU is waited for
Row = dict[str, Any]
Program = tuple[Row, Callable[[], Any]]  # what is measured, and a call of it


def the_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def backbone(name: str, latent_size: int = 8, num_classes: int = NUM_CLASSES, **model_args: Any) -> Backbone:
    """A registered backbone for four-channel latents and learned variances, on the device."""
    sizes = {"input_size": latent_size, "in_channels": 4, "out_channels": 8, "num_classes": num_classes}
    return create_model(name, **sizes, **model_args).to(the_device())


def latents(batch_size: int, latent_size: int = 8, num_classes: int = NUM_CLASSES) -> tuple[Tensor, Tensor]:
    """Random latents [b 4 s s] and labels [b]."""
    x_0 = torch.randn(batch_size, 4, latent_size, latent_size, device=the_device())
    return x_0, torch.arange(batch_size, device=the_device()) % num_classes


def autocasting(precision: str, function: Callable[[], Any]) -> Callable[[], Any]:
    return torch.autocast(the_device().type, torch.bfloat16, enabled=precision == "bf16")(function)


def training_step(
    model: Backbone,
    precision: str,
    batch: Callable[[], tuple[Tensor, Tensor]],
    *,
    diffusion: Diffusion = GAUSSIAN,
    compile: bool = False,
    reads: bool = True,
) -> Callable[[], Tensor]:
    """An optimizer step as `train.py` makes it, on what `batch` gives, latents and labels; it gives the loss. The
    gradient's norm is read off the device, unless the step is to be captured in a graph, which has the optimizer count
    its steps there too."""
    optimizer, ema = build_optimizer(model, OptimConfig()), EMA(model, 0.9999)
    for group in optimizer.param_groups:
        group["capturable"] = not reads
    if compile:
        compile_blocks(model)
    elif precision == "bf16" and the_device().type in AT_ONCE:
        cast_at_once(model)
    loss_of = autocasting(precision, lambda: diffusion.training_loss(model, *batch())["loss"].mean())

    def step() -> Tensor:
        loss = loss_of()
        loss.backward()
        norm = nn.utils.get_total_norm([weight.grad for weight in model.parameters() if weight.grad is not None])
        if reads:
            norm.item()
        optimizer.step()
        ema.update(model, 0)
        optimizer.zero_grad()
        return loss.detach()

    return step


def sparse_cache(folder: Path, num_images: int, image_size: int = 256, channels: int = 8, factor: int = 8) -> None:
    """A latent cache of nothing but zeros, of two views, which takes no room on disks that keep no zeros."""
    folder.mkdir(parents=True)
    side, names = image_size // factor, []
    for first in range(0, num_images, IMAGES_PER_SHARD):
        num = min(IMAGES_PER_SHARD, num_images - first)
        names.append(f"{num}-{first:08d}.safetensors")
        about = {name: torch.zeros(num, dtype=torch.int64) for name in ("labels", "source_indices")}
        if not (whole := folder / f"{num}").exists():
            write_shard(whole, {"stored": torch.zeros(num, 2, channels, side, side, dtype=torch.float16), **about})
        with whole.open("rb") as like, (folder / names[-1]).open("wb") as file:
            length = like.read(8)
            file.write(length + like.read(int.from_bytes(length, "little")))
            file.truncate(whole.stat().st_size)
    classes, size = ["0"], [image_size, image_size]
    manifest = {"format": FORMAT, "classes": classes, "image_size": size, "shards": names}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@cache
def matrix_peak(precision: str, side: int | None = None) -> tuple[float, int]:
    """FLOP/s of a large square product in this precision, and its side: large enough that a GPU is busy with it, and
    not with being told, unless another is given."""
    device, (large, calls) = the_device(), (8192, CALLS) if the_device().type == "cuda" else (2048, 1)
    side = side or large
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    product = torch.empty_like(a)

    def multiply() -> None:
        for _ in range(calls):
            torch.mm(a, a, out=product)

    return 2 * side**3 * throughput(multiply, batch_size=calls, num_repeats=3, device=device), side


def in_turns(programs: Sequence[Program], rounds: int, num_images: int, calls: int | None = None) -> list[Row]:
    """Rows with images a second: the median, and the slowest and fastest round, of so many `calls`, by default one on a
    CPU and `CALLS` on a GPU, which is waited for at their end alone. Programs take turns, after a round that does not
    count; `step GB` is what a program's first call adds to the most memory that was held."""
    device = the_device()
    calls = calls or (CALLS if device.type == "cuda" else 1)
    seconds: list[list[float]] = [[] for _ in programs]
    memory: list[float] = []
    for number in range(rounds + 1):
        for (_, program), taken in zip(programs, seconds, strict=True):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with suppress(OSError):  # Linux: the most memory that was held so far is forgotten
                Path("/proc/self/clear_refs").write_text("5")
            held, began = memory_gb(device), time.perf_counter()
            for _ in range(calls):
                program()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number == 0:
                memory.append(round(memory_gb(device) - held, 3))
            else:
                taken.append((time.perf_counter() - began) / calls)
    rows = []
    for (row, _), taken, used in zip(programs, seconds, memory, strict=True):
        speed, slowest, fastest = (num_images / pick(taken) for pick in (statistics.median, max, min))
        spread = f"{slowest:.1f} to {fastest:.1f}"
        rows.append({**row, "img/s": float(f"{speed:.4g}"), "spread": spread, "step GB": used})
    return rows


def report(what: str, rows: Sequence[Row], output: Path | None = None, note: str = "") -> None:
    """A Markdown table, headed by what was measured on which machine; and JSON."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    title = f"{what}; {where}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([str(row.get(column, "")) for column in columns] for row in rows)]
    print(f"\n{title}\n\n{terminal(cells)}\n\n{note}")
    if output is not None:
        write_whole(output, json.dumps({"title": title, "note": note, "rows": list(rows)}, indent=2) + "\n")


def graphed(step: Callable[[], Any]) -> Callable[[], None]:
    """The same kernels, told to a CUDA device at once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def profiled(function: Callable[[], Any]) -> Any:
    """torch's profile of one call, after one that warms up."""
    function()
    kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA][: torch.cuda.is_available()]]
    with profile(activities=kinds, record_shapes=True) as profiler:
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return profiler
