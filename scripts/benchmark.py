"""Benchmarks. Compare only numbers of the same run: programs take turns, and medians are printed as a Markdown table.

python scripts/benchmark.py training                                  (all four backbones, images per second)
python scripts/benchmark.py training --compare ../XSwinDiffusion      (against the published implementation)
python scripts/benchmark.py training --models [DiT] --variants '[{}, {qk_norm: true}, {mlp: swiglu}]'
python scripts/benchmark.py sampling --models [XSwin,DiT]
python scripts/benchmark.py epoch --compare ../XSwinDiffusion         (from images, which theirs encodes in each step)
python scripts/benchmark.py cache                                     (latents of ImageNet's size, read from files)
python scripts/benchmark.py scaling --plot scaling.png                (time and memory against the side of the latent)
python scripts/benchmark.py extraction --extractor mobilenet_v2.pt
python scripts/benchmark.py frechet
"""

import itertools
import json
import subprocess
import sys
import tempfile
import time
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiment.cli import run_program
from machine import children
from machine.allocator import reuse_freed_memory
from machine.atomic_files import keeping

BACKBONES = ["XSwin", "USwin", "DiT", "UViT"]
Row = dict[str, Any]


def training(
    models: list[str] = BACKBONES,
    latent_size: int = 8,
    batch_size: int = 128,
    precision: str = "auto",
    compile: bool = False,
    rounds: int = 5,
    compare: Path | None = None,
    variants: list[dict[str, Any]] = [{}],  # noqa: B006  (read only)
    output: Path | None = None,
) -> None:
    """Images per second of an optimizer step on random latents: forward, hybrid loss, backward, gradient norm, fused
    AdamW, EMA.

    Args:
        models: names of backbones, which take turns
        latent_size: side of the latents
        batch_size: images per step
        precision: like train.precision: 'auto', 'fp32' or 'bf16'
        compile: like train.compile
        rounds: measured steps of each
        compare: checkout of the published implementation; measures its step as shipped (float32) and, if ours uses
            bf16, also in bf16 with a fused optimizer
        variants: constructor arguments, a row each for every backbone; `time` is relative to the first
        output: JSON file
    """
    from metrics.cost import cost
    from training import speed

    published, precision = checkout(compare), resolve_precision(precision)
    peak, side = speed.matrix_peak(precision)
    x_0, y = speed.latents(batch_size, latent_size)
    programs: list[Any] = []
    for name, variant in itertools.product(models, variants):
        model = speed.backbone(name, latent_size, **variant)
        per_image = cost(model, latent_shape=(4, latent_size, latent_size), num_classes=speed.NUM_CLASSES)
        row = row_head(name, precision + " compiled" * compile)
        row |= {"arguments": ", ".join(f"{argument} {value}" for argument, value in variant.items())} if variant else {}
        row |= {"parameters": per_image.parameters, "gflops": per_image.gflops}
        programs.append((row, speed.training_step(model, precision, lambda: (x_0, y), compile=compile)))
        for theirs in dict.fromkeys(("fp32", precision)) if published else ():
            step = published.step(name, speed.NUM_CLASSES, speed.benchmark_device(), theirs, lambda: (x_0, y))
            programs.append((row_head(name, theirs, "published"), step))
    rows = speed.time_interleaved(programs, rounds, batch_size)
    first: dict[str, float] = {}
    for row in rows:
        if "gflops" in row:  # a backward pass costs about twice the forward pass
            row["MFU"] = round(3 * row["gflops"] * 1e9 * row["img/s"] / peak, 3)
            row["time"] = round(first.setdefault(row["model"], row["img/s"]) / row["img/s"], 3)
    what = f"optimizer step, batch {batch_size}, latents {latent_size}x{latent_size}"
    note = f"MFU: of {peak / 1e12:.2f} TFLOP/s, a product of {speed.benchmark_device()} matrices of side {side}."
    speed.report(what, rows, output, note=note)


def sampling(
    models: list[str] = BACKBONES,
    batch_size: int = 101,
    num_steps: int = 10,
    guidance_scale: float = 1.5,
    sampler: str = "ddpm",
    precision: str = "auto",
    compile: Literal["blocks", "graphs"] | None = None,
    rounds: int = 3,
    compare: Path | None = None,
) -> None:
    """Images per second of guided sampling, without decoding.

    Args:
        models: names of backbones, which take turns
        batch_size: images per batch
        num_steps: sampling steps; time is proportional to them
        guidance_scale: of classifier-free guidance; 1: none
        sampler: name of the sampler; the published one is 'ddpm'
        precision: of both implementations, like train.precision
        compile: also measure this implementation compiled, like sample.py --compile
        rounds: measured batches of each
        compare: checkout of the published implementation
    """
    from models.compilation import compile_blocks
    from training import speed

    published, precision = checkout(compare), resolve_precision(precision)
    noise, y = speed.latents(batch_size)
    settings = {"sampler": sampler, "num_steps": num_steps, "guidance_scale": guidance_scale}
    programs: list[Any] = []
    for name in models:
        for kind in dict.fromkeys((None, compile)):
            model = speed.backbone(name).eval()
            if kind:
                compile_blocks(model, kind)
            row = row_head(name, f"{precision} {kind or ''}".strip())
            programs.append((row, speed.sampling(model, precision, noise, y, **settings)))
        if published:
            model = published.create(name, latent_size=8, num_classes=speed.NUM_CLASSES)
            theirs = {"num_classes": speed.NUM_CLASSES, "num_steps": num_steps, "scale": guidance_scale}
            generate = partial(published.sample, model.to(noise.device).eval(), noise, y, **theirs)
            programs.append((row_head(name, precision, "published"), speed.autocasting(precision, generate)))
    what = f"{sampler}, {num_steps} steps, guidance {guidance_scale:g}, batch {batch_size}"
    speed.report(what, speed.time_interleaved(programs, rounds, batch_size))


def epoch(
    compare: Path,
    models: list[str] = ["XSwin"],  # noqa: B006  (read only)
    batch_size: int = 128,
    precision: str = "auto",
    rounds: int = 2,
) -> None:
    """Images per second of training from 64x64 images: ours from a filled cache, the published loop encoding in each
    step.

    The published loop's autoencoder has the architecture of Stable Diffusion's, with random weights.

    Args:
        compare: checkout of the published implementation
        models: names of backbones
        batch_size: images per step
        precision: of ours, like train.precision
        rounds: measured steps of each
    """
    import torch

    from autoencoder_training.autoencoder_config import ArchitectureConfig
    from autoencoder_training.model import create_autoencoder
    from autoencoders.codec import create_codec
    from data.encoding import build_cache
    from data.latents import LatentCache
    from experiment.build import open_split
    from experiment.config import DataConfig
    from training import speed

    published, precision, device = checkout(compare), resolve_precision(precision), speed.benchmark_device()
    codec = create_codec("embedded").to(device)
    shapes = open_split(DataConfig(num_images=4 * batch_size), "train")
    autoencoder = create_autoencoder(ArchitectureConfig(), image_size=64).to(device).eval()
    images = torch.stack([shapes[index][0] for index in range(batch_size)]).to(device).float() / 127.5 - 1
    _, y = speed.latents(batch_size, num_classes=10)

    encoded = torch.no_grad()(lambda: (0.18215 * autoencoder.encode(images).latent_dist.sample(), y))
    with tempfile.TemporaryDirectory() as folder:
        cache_folder = Path(folder) / "cache"
        build_cache(cache_folder, shapes, codec.prepare, codec.provenance, flips=True, device=device)
        cached = speed.batches_of(LatentCache(cache_folder, codec.identity, device), codec, batch_size)
        programs: list[Any] = []
        for name in models:
            ours = speed.training_step(speed.backbone(name, num_classes=10), precision, cached)
            theirs = published.step(name, 10, device, "fp32", encoded)
            programs.append((row_head(name, precision, "this one, cache warm"), ours))
            programs.append((row_head(name, "fp32", "published loop"), theirs))
        rows = speed.time_interleaved(programs, rounds, batch_size)
    speed.report(f"training from 64x64 images, batch {batch_size}", rows)


def cache(
    num_images: int = 1_281_167,
    model: str = "DiT-S/2",
    model_args: dict[str, Any] = {},  # noqa: B006  (read only)
    batch_size: int = 16,
    precision: str = "auto",
    rounds: int = 20,
) -> None:
    """Compare a training step on latents that are read from a cache's files with one on latents in memory. The losses
    must be equal. The cache, sparse files of zeros, is written to the current folder.

    Args:
        num_images: images of 256 pixels in the cache, 33 KB each with the mirrored view
        model: name of a backbone
        model_args: arguments of its constructor
        batch_size: images per step
        precision: like train.precision
        rounds: measured steps of each
    """
    import torch

    from autoencoders.codec import create_codec
    from data.latents import LatentCache, num_bytes
    from training import speed
    from training.meter import memory_gb

    precision, device = resolve_precision(precision), speed.benchmark_device()
    codec = create_codec("embedded").to(device)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        speed.sparse_cache(Path(folder) / "sparse", num_images)
        start = time.perf_counter()
        files = LatentCache(Path(folder) / "sparse", {}, device=None)
        seconds, gb_verifying = time.perf_counter() - start, memory_gb(torch.device("cpu"))
        at_hand = copy(files)
        at_hand.stored = torch.zeros((), dtype=torch.float16, device=device).expand(files.stored.shape)
        losses: dict[str, list[Any]] = {"from files": [], "at hand": []}

        def training_on(name: str, latents: LatentCache) -> Any:
            torch.manual_seed(0)
            network, batches = speed.backbone(model, 32, 1, **model_args), speed.batches_of(latents, codec, batch_size)
            step = speed.training_step(network, precision, batches)

            def program() -> None:
                torch.manual_seed(0)  # the step then samples the same noise for both
                losses[name].append(step())

            return row_head(model, precision, f"latents {name}"), program

        programs = [training_on("from files", files), training_on("at hand", at_hand)]
        rows = speed.time_interleaved(programs, rounds, batch_size)
        gb, gb_training = num_bytes(files.folder) / 1e9, memory_gb(torch.device("cpu"))
    equal = torch.equal(*map(torch.stack, losses.values()))
    rows[0]["speed"] = round(rows[0]["img/s"] / rows[1]["img/s"], 3)
    memory = f"Held at most: {gb_verifying:.2f} GB while files were checked, {gb_training:.2f} GB in training."
    note = f"Checked in {seconds:.0f} s. Losses are {'equal' if equal else 'DIFFERENT'}. {memory}"
    speed.report(f"optimizer step, batch {batch_size}, a cache of {gb:.1f} GB", rows, note=note)


def scaling(
    models: list[str] = BACKBONES,
    sides: list[int] = [8, 16, 32, 64, 128],  # noqa: B006  (read only)
    tokens: int = 8192,
    precision: str = "auto",
    rounds: int = 3,
    plot: Path | None = None,
) -> None:
    """Time and memory of a training step per latent pixel, against the side of the latent, each measured in its own
    process. Memory is the increase in the first step, including AdamW's moments.

    Args:
        models: names of backbones
        sides: sides of the latents
        tokens: latent pixels per step; the batch shrinks as the side grows, down to one image
        precision: like train.precision: 'auto', 'fp32' or 'bf16'
        rounds: measured steps
        plot: plot of both
    """
    from training import speed
    from training.curves import draw_scaling

    rows, precision = [], resolve_precision(precision)
    for name, side in itertools.product(models, sides):
        batch_size = max(1, tokens // side**2)
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            flags = {"models": f"[{name}]", "latent_size": side, "batch_size": batch_size, "rounds": rounds}
            arguments = [f"--{flag}={value}" for flag, value in flags.items()]
            arguments += [f"--precision={precision}", f"--output={file.name}"]
            children.run_process([sys.executable, __file__, "training", *arguments], stdout=subprocess.DEVNULL)
            (row,) = json.loads(Path(file.name).read_text())["rows"]
        pixels = batch_size * side**2
        rows.append({"model": name, "latent": side, "batch": batch_size, "img/s": row["img/s"]})
        rows[-1]["us/pixel"] = round(1e6 / row["img/s"] / side**2, 2)
        rows[-1]["kB/pixel"] = round(row["step GB"] * 1e6 / pixels, 1)
        print(rows[-1], file=sys.stderr)
    speed.report(f"training step, {precision}, {tokens} latent pixels a step", rows)
    if plot is not None:
        with keeping([plot]):
            draw_scaling(rows, plot)


def extraction(extractor: str, num_images: int = 512, batch_size: int = 64, rounds: int = 5) -> None:
    """Images per second of `metrics.features.Extractor`, compared with a bare loop over the same network in memory.

    Args:
        extractor: like evaluate.py's: a name, timm:NAME, or a file, .pt2 rather than TorchScript; a file is a program:
            run only what you trust
        num_images: 64x64 images per round
        batch_size: images per batch
        rounds: measurements of each loop
    """
    import torch

    from metrics.features import Extractor
    from metrics.image_batches import image_batches
    from training import speed

    network = Extractor(extractor, device=str(speed.benchmark_device()))
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num_images, 3, 64, 64), dtype=torch.uint8, generator=generator)

    @torch.inference_mode()
    def bare() -> None:
        for batch in images.split(batch_size):
            network.module(batch.to(speed.benchmark_device()))[0].cpu()

    def extract() -> None:
        network(image_batches(images, batch_size), num_images, progress=False)

    rows = speed.time_interleaved([({"what": "bare loop"}, bare), ({"what": "Extractor"}, extract)], rounds, num_images)
    speed.report(f"{network.name}, {num_images} images of 64x64, batches of {batch_size}", rows)


def frechet(num_images: int = 50_000, dim: int = 2048) -> None:
    """Time of the Fréchet distance of two sets: moments in batches, then the distance.

    Args:
        num_images: images in each set
        dim: number of features
    """
    import torch

    from metrics.frechet import RunningMoments, frechet_distance
    from training import speed

    generator = torch.Generator().manual_seed(0)
    sets = [torch.randn(num_images, dim, generator=generator) for _ in range(2)]
    start, moments = time.perf_counter(), [RunningMoments(), RunningMoments()]
    for running, features in zip(moments, sets, strict=True):
        for batch in features.split(4096):
            running.update(batch)
    middle = time.perf_counter()
    frechet_distance(*(running.moments() for running in moments))
    seconds = {"moments of both": middle - start, "distance": time.perf_counter() - middle}
    rows = [{"what": part, "s": round(duration, 1)} for part, duration in seconds.items()]
    speed.report(f"two sets of {num_images} x {dim}", rows)


def checkout(folder: Path | None) -> Any:
    from conversion.checkout import PublishedCheckout

    return None if folder is None else PublishedCheckout(folder)


def row_head(name: str, precision: str, implementation: str = "this one") -> Row:
    return {"model": name, "implementation": implementation, "precision": precision}


def resolve_precision(precision: str) -> str:
    """Resolve a precision, such as 'auto', for this device, with a warning if it is emulated."""
    from machine.precision import bf16_warning, choose_precision
    from training.speed import benchmark_device

    if warning := bf16_warning(precision, benchmark_device(), "--precision"):
        print(warning, flush=True)
    return choose_precision(precision, benchmark_device())


if __name__ == "__main__":
    reuse_freed_memory()  # as a training does
    run_program([training, sampling, epoch, cache, scaling, extraction, frechet])
