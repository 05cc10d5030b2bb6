"""Measure the speed of optimizer steps and of other programs."""

import itertools
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

from autoencoders.codec import Codec
from checkpoints.averages import EMA
from data.encoding import IMAGES_PER_SHARD
from data.latents import FORMAT, LatentCache
from data.shards import write_shard
from diffusion import Diffusion, GaussianDiffusion, sample
from evaluation.table import terminal
from experiment.config import OptimConfig, TrainConfig
from machine.allocator import return_freed_memory
from machine.atomic_files import write_atomic
from metrics.cost import throughput
from models import create_model
from models.backbone import Backbone
from models.compilation import compile_blocks
from models.layers.kernel_launches import FUSED_DEVICES
from training.batches import Batches
from training.meter import memory_gb
from training.objective import Objective
from training.optimizer import build_optimizer
from training.preparation import fuse_weight_casts

NUM_CLASSES = 101
GAUSSIAN = GaussianDiffusion()
CALLS = 10  # of a program between two synchronisations with a GPU
Row = dict[str, Any]
Program = tuple[Row, Callable[[], Any]]  # columns that describe it, and the function to measure


def benchmark_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def backbone(name: str, latent_size: int = 8, num_classes: int = NUM_CLASSES, **model_args: Any) -> Backbone:
    """Create a backbone on the device, for four-channel latents and learned variances."""
    sizes = {"input_size": latent_size, "in_channels": 4, "out_channels": 8, "num_classes": num_classes}
    return create_model(name, **sizes, **model_args).to(benchmark_device())


def wake(model: Backbone) -> Backbone:
    """Initialise layers that are zero at first, which would hide those before them; return the model."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


def latents(batch_size: int, latent_size: int = 8, num_classes: int = NUM_CLASSES) -> tuple[Tensor, Tensor]:
    """Random latents [b 4 s s] and labels [b]."""
    x_0 = torch.randn(batch_size, 4, latent_size, latent_size, device=benchmark_device())
    return x_0, torch.arange(batch_size, device=benchmark_device()) % num_classes


def autocasting(precision: str, function: Callable[[], Any]) -> Callable[[], Any]:
    return torch.autocast(benchmark_device().type, torch.bfloat16, enabled=precision == "bf16")(function)


def training_step(
    model: Backbone,
    precision: str,
    batch: Callable[[], tuple[Tensor, Tensor]],
    *,
    diffusion: Diffusion = GAUSSIAN,
    compile: bool = False,
    reads: bool = True,
) -> Callable[[], Tensor]:
    """Create an optimizer step like that of `train.py`, which returns the loss; `batch` returns latents and labels.
    With `reads` it transfers the gradient's norm to the CPU, as a step that a CUDA graph captures cannot."""
    optimizer, ema = build_optimizer(model, OptimConfig()), EMA(model, 0.9999)
    for group in optimizer.param_groups:
        group["capturable"] = not reads
    if compile:
        compile_blocks(model)
    elif precision == "bf16" and benchmark_device().type in FUSED_DEVICES:
        fuse_weight_casts(model)
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


def sampling(model: nn.Module, precision: str, noise: Tensor, y: Tensor, **settings: Any) -> Callable[[], Tensor]:
    """Create a program that generates latents from noise by the linear Gaussian diffusion, also with CUDA graphs."""
    begin_step = torch.compiler.cudagraph_mark_step_begin

    def generate() -> Tensor:
        begin_step()
        return sample(GAUSSIAN, model, noise, y, callback=lambda *_: begin_step(), **settings)

    return autocasting(precision, generate)


def batches_of(cache: LatentCache, codec: Codec, batch_size: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """Create a function that returns latents and labels of the next batch of a training on a cache."""
    config = TrainConfig(batch_size=batch_size, label_dropout=0.0)
    micro_batches = Batches(cache, codec, Objective(GAUSSIAN), config, device=benchmark_device()).micro_batches
    steps = map(micro_batches, itertools.count())

    def next_batch() -> tuple[Tensor, Tensor]:
        (batch,) = next(steps)
        return batch.x_0, batch.y

    return next_batch


def sparse_cache(folder: Path, num_images: int) -> None:
    """Write a latent cache of zeros, two views of images of 256 pixels, as sparse files, which take almost no space."""
    folder.mkdir(parents=True)
    names = []
    for first in range(0, num_images, IMAGES_PER_SHARD):
        num = min(IMAGES_PER_SHARD, num_images - first)
        names.append(f"{num}-{first:08d}.safetensors")
        if not (template := folder / f"{num}").exists():
            shard = {name: torch.zeros(num, dtype=torch.int64) for name in ("labels", "source_indices")}
            shard["stored"] = torch.zeros(num, 2, 8, 32, 32, dtype=torch.float16)
            write_shard(template, shard)
        with template.open("rb") as source, (folder / names[-1]).open("wb") as file:
            length = source.read(8)
            file.write(length + source.read(int.from_bytes(length, "little")))
            file.truncate(template.stat().st_size)
    manifest = {"format": FORMAT, "classes": ["0"], "image_size": [256, 256], "shards": names}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@cache
def matrix_peak(precision: str, side: int | None = None) -> tuple[float, int]:
    """Measure the FLOP/s of a product of square matrices, by default so large that launches do not count; also return
    their side."""
    device, (default, calls) = benchmark_device(), (8192, CALLS) if benchmark_device().type == "cuda" else (2048, 1)
    side = side or default
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    product = torch.empty_like(a)

    def multiply() -> None:
        for _ in range(calls):
            torch.mm(a, a, out=product)

    return 2 * side**3 * throughput(multiply, batch_size=calls, num_repeats=3, device=device), side


def time_interleaved(programs: Sequence[Program], rounds: int, num_images: int, calls: int | None = None) -> list[Row]:
    """Measure programs in alternation, after a warm-up round. `calls` of a round share one synchronisation; by default
    they are 1 on a CPU and `CALLS` on a GPU.

    Returns a row for each program with the median of images per second, the slowest and the fastest round, and as `step
    GB` the peak memory of its first round beyond what was held before.
    """
    device = benchmark_device()
    calls = calls or (CALLS if device.type == "cuda" else 1)
    seconds: list[list[float]] = [[] for _ in programs]
    memory: list[float] = []
    for index in range(rounds + 1):
        for (_, program), durations in zip(programs, seconds, strict=True):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            if index == 0:
                return_freed_memory()
            with suppress(OSError):  # on Linux this resets the peak memory of the process
                Path("/proc/self/clear_refs").write_text("5")
            held, start = memory_gb(device), time.perf_counter()
            for _ in range(calls):
                program()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if index == 0:
                memory.append(round(memory_gb(device) - held, 3))
            else:
                durations.append((time.perf_counter() - start) / calls)
    rows = []
    for (row, _), durations, peak in zip(programs, seconds, memory, strict=True):
        speed, slowest, fastest = (num_images / select(durations) for select in (statistics.median, max, min))
        spread = f"{slowest:.1f} to {fastest:.1f}"
        rows.append({**row, "img/s": float(f"{speed:.4g}"), "spread": spread, "step GB": peak})
    return rows


def report(what: str, rows: Sequence[Row], output: Path | None = None, note: str = "") -> None:
    """Print rows as a table, headed by what was measured on which machine, and write them as JSON."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    title = f"{what}; {where}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([str(row.get(column, "")) for column in columns] for row in rows)]
    print(f"\n{title}\n\n{terminal(cells)}\n\n{note}")
    if output is not None:
        record = {"title": title, "note": note, "rows": list(rows)}
        write_atomic(output, json.dumps(record, indent=2) + "\n", keep=True)


def capture_graph(step: Callable[[], Any]) -> Callable[[], None]:
    """Capture a step in a CUDA graph, which launches all its kernels at once."""
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


def profile_call(function: Callable[[], Any]) -> Any:
    """torch's profile of one call, after one that warms up."""
    function()
    kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA][: torch.cuda.is_available()]]
    with profile(activities=kinds, record_shapes=True) as profiler:
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return profiler
