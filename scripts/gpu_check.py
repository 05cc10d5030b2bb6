"""Run checks that need a GPU, in ten minutes. Each prints a line of JSON; a failed one says why and does not stop the
others.

python scripts/gpu_check.py > gpu.jsonl                           (on a GPU)
python scripts/gpu_check.py --compare ../XSwinDiffusion           (also the published implementation's step)
python scripts/gpu_check.py --tiny true                           (the same checks at sizes for a CPU)
"""

import copy
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiment.cli import run_main
from machine import children
from settings import reads, within

Args = dict[str, Any]
Step = Callable[[], dict[str, Any]]
TINY_MODELS = {  # arguments for backbones that have all parts but few weights
    "XSwin": {"dim": 16, "depths": [1, 1], "num_heads": [2, 4], "num_global_blocks": 1},
    "DiT-XL/2": {"dim": 32, "depth": 1, "num_heads": 2},
}
ROOT = Path(__file__).resolve().parent.parent
TRAIN = [sys.executable, str(ROOT / "train.py")]
SMALL = ("--model", "XSwin-S", "--data.num_images", "100", "--train.batch_size", "8", "--sampling.num_steps", "2")
SMALL += ("--log.trackers", "[]")
TINY_ARGS = json.dumps({**TINY_MODELS["XSwin"], "patch_size": 4})
TINY_TRAINING = (*SMALL, "--model_args", TINY_ARGS, "--autoencoder", "pixel", "--data.image_size", "16")


@dataclass(frozen=True)
class Sizes:
    """Sizes of the checks; the defaults are for a GPU."""

    speeds: tuple[tuple[str, int, int], ...] = (("XSwin", 8, 128), ("DiT-XL/2", 32, 64))  # side of latents, batch size
    calls: int = 50  # steps between synchronisations
    num_steps: int = 10  # of sampling
    features: tuple[int, int] = (10_000, 2048)  # numbers of images and of features
    encoded: int = 2048  # number of images
    threads: tuple[int, ...] = (1, 4, 12)  # for decoding
    trained: int = 400  # steps of the training that is killed
    training: tuple[str, ...] = SMALL  # its flags
    product: int | None = None  # side of the matrices that determine the peak FLOP/s


TINY = Sizes((("XSwin", 8, 2), ("DiT-XL/2", 8, 2)), 1, 2, (200, 8), 4, (1, 2), 8, TINY_TRAINING, 512)


@dataclass(frozen=True)
class CheckConfig:
    """Run the checks one after the other.

    Args:
        compare: checkout of the published implementation
        only: names of checks or prefixes of names; null: all
        minutes: time limit; the current check is then interrupted, and the others fail
        tiny: use sizes for a CPU
    """

    compare: Path | None = reads("folder", None)
    only: list[str] | None = None
    minutes: float = within("(0, inf)", 10.0)
    tiny: bool = False


def main(config: CheckConfig) -> None:
    """Run the checks; the exit status is 1 if one fails."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # before torch is imported: its profiler writes to stderr
    import torch

    from training.speed import benchmark_device

    if benchmark_device().type != "cuda" and not config.tiny:
        raise ValueError("--tiny false: there is no CUDA device here; --tiny true runs the steps on the CPU")
    torch.manual_seed(0)
    deadline, failed = time.monotonic() + 60 * config.minutes, 0
    for name, step in steps(TINY if config.tiny else Sizes(), config.compare, tiny=config.tiny):
        if config.only is None or any(name.startswith(start) for start in config.only):
            failed += not report(name, step, deadline)
    raise SystemExit(int(failed > 0))


def report(name: str, step: Step, deadline: float) -> bool:
    """Run a check until the deadline at most, print its result or error, and return whether it passed."""
    import torch

    def time_out(*_: object) -> None:
        raise TimeoutError("the minutes are over")

    start, line = time.monotonic(), {"step": name, "ok": True}
    signal.signal(signal.SIGALRM, time_out)
    signal.setitimer(signal.ITIMER_REAL, max(deadline - start, 1e-3))
    try:
        line |= step()
    except Exception as error:  # libraries, drivers and compilers raise all kinds of errors
        line |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:300]}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    print(json.dumps({**line, "seconds": round(time.monotonic() - start, 1)}), flush=True)
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return bool(line["ok"])


def steps(sizes: Sizes, compare: Path | None, *, tiny: bool) -> Iterator[tuple[str, Step]]:
    cases = [(*case, TINY_MODELS[case[0]] if tiny else {}) for case in sizes.speeds]
    yield "machine", partial(machine, sizes.product)
    for name in [] if tiny else ("USwin", "DiT", "UViT", "UViT-tokens-S/2", "LightningDiT-S/1", "UNet"):
        yield f"numbers {name}", partial(numbers, name, 8, 8, {})
    for case in cases:
        yield f"numbers {case[0]}", partial(numbers, *case)
        yield f"attention {case[0]}", partial(attention, *case)
        for mode in ("eager",) if tiny else ("eager", "compiled", "graphed"):
            yield f"speed {case[0]} {mode}", partial(speed_of, *case, mode=mode, sizes=sizes)
        if compare is not None and case[0] == "XSwin":
            for mode in ("fp32", "bf16"):
                yield f"speed published {mode}", partial(speed_of, *case, mode=mode, sizes=sizes, checkout=compare)
        yield f"profile {case[0]}", partial(profile_of, *case)
    yield "resume", partial(killed_and_resumed, sizes.training, sizes.trained)
    if not tiny:  # Accelerate shards on accelerators only
        yield "sharded", partial(sharded, sizes.training)
    yield "scores", partial(scores, *sizes.features)
    yield "encoding", partial(encoding, sizes.encoded, sizes.threads)
    yield "sampling", partial(sampling, *cases[0], num_steps=sizes.num_steps, tiny=tiny)


def machine(side: int | None) -> dict[str, Any]:
    """Device, versions, and the speed of matrix products."""
    import torch

    from training.speed import benchmark_device, matrix_peak

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else benchmark_device().type
    peaks = {f"{dtype} TFLOP/s": round(matrix_peak(dtype, side)[0] / 1e12, 2) for dtype in ("fp32", "bf16")}
    return {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda, **peaks}


def numbers(name: str, side: int, batch: int, args: Args) -> dict[str, Any]:
    """Compare the losses of three steps in float32 and bf16, without stochastic depth, and list the lines at which a
    step synchronises with the device."""
    import torch

    from diffusion import GaussianDiffusion
    from training import speed

    x_0, y = speed.latents(min(batch, 8), side)
    losses: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for precision, step_losses in losses.items():
        torch.manual_seed(0)
        model = speed.backbone(name, side, **args).eval()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
        loss_of = speed.autocasting(precision, partial(GaussianDiffusion().training_loss, model, x_0, y))
        for step in range(3):
            torch.manual_seed(step)
            loss = loss_of()["loss"].mean()
            loss.backward()
            for parameter_name, parameter in model.named_parameters():
                if parameter.grad is None or not parameter.grad.isfinite().all():
                    problem = f"the gradient of {parameter_name} is missing or not finite"
                    raise ValueError(f"{precision}, step {step}: {problem}")
            optimizer.step()
            optimizer.zero_grad()
            step_losses.append(loss.item())
    gap = max(abs(bf16 / fp32 - 1) for fp32, bf16 in zip(*losses.values(), strict=True))
    if gap > 0.02:
        raise ValueError(f"bf16 is {gap:.1%} off float32: {losses}")
    step = speed.training_step(speed.backbone(name, side, **args), "bf16", lambda: (x_0, y))
    step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        set_sync_debug_mode = torch.cuda.set_sync_debug_mode if torch.cuda.is_available() else lambda mode: None
        set_sync_debug_mode("warn")
        step()
        set_sync_debug_mode("default")
    found = [warning for warning in caught if "synchroniz" in str(warning.message)]
    lines = Counter(f"{Path(warning.filename).name}:{warning.lineno}" for warning in found)
    waits = {"waits": lines} if torch.cuda.is_available() else {}
    return {"losses": losses["fp32"], "bf16 off by": round(gap, 6), **waits}


def attention(name: str, side: int, batch: int, args: Args) -> dict[str, Any]:
    """Count the attention kernels of a forward pass, by kernel and shape of the queries, and compare windows in shared
    tiles with separate ones. On a GPU all kernels must be fused."""
    import torch

    from models.layers import kernel_launches
    from training import speed

    model, (x_0, y) = speed.backbone(name, side, **args).eval(), speed.latents(batch, side)
    kernels: Counter[str] = Counter()
    profile = speed.profile_call(speed.autocasting("bf16", partial(model, x_0, y.float(), y)))
    for event in profile.key_averages(group_by_input_shape=True):
        if event.key.startswith("aten::_scaled_dot_product"):
            kernels[f"{event.key.removeprefix('aten::_scaled_dot_product_')} {event.input_shapes[0]}"] += event.count
    if torch.cuda.is_available() and (not kernels or any("math" in kernel for kernel in kernels)):
        raise ValueError(f"attention is not fused: {dict(kernels) or 'none of its kernels is known'}")
    speed.wake(model)
    usual, outputs = kernel_launches.FUSED_DEVICES, []
    for kernel_launches.FUSED_DEVICES in ({x_0.device.type}, set[str]()):
        with torch.no_grad():
            outputs.append(model(x_0, y.float(), y))
    kernel_launches.FUSED_DEVICES = usual
    gap = ((outputs[0] - outputs[1]).norm() / outputs[1].norm().clamp(min=1e-9)).item()
    if gap > 1e-3:
        raise ValueError(f"windows in shared tiles are {gap:.1e} off separate ones, in float32")
    return {"kernels": kernels, "shared tiles off by": gap}


def speed_of(
    name: str, side: int, batch: int, args: Args, *, mode: str, sizes: Sizes, checkout: Path | None = None
) -> dict[str, Any]:
    """Measure images per second, MFU and memory of a training step.

    Args:
        mode: 'eager', 'compiled' or 'graphed', all in bf16; with `checkout` the precision, 'fp32' or 'bf16'
        checkout: measure the published implementation there instead
    """
    from conversion.checkout import PublishedCheckout
    from metrics.cost import cost
    from training import speed

    data, model = speed.latents(batch, side), speed.backbone(name, side, **args)
    flops = 3e9 * cost(model, latent_shape=(4, side, side), num_classes=speed.NUM_CLASSES).gflops
    if checkout:
        step = PublishedCheckout(checkout).step(name, speed.NUM_CLASSES, speed.benchmark_device(), mode, lambda: data)
    else:
        step = speed.training_step(model, "bf16", lambda: data, compile=mode == "compiled", reads=mode != "graphed")
    program = speed.capture_graph(step) if mode == "graphed" else step
    (row,) = speed.time_interleaved([({}, program)], 1, batch, sizes.calls)
    peak, _ = speed.matrix_peak("fp32" if mode == "fp32" else "bf16", sizes.product)
    return {"latents": side, "batch": batch, **row, "MFU": round(flops * row["img/s"] / peak, 3)}


def profile_of(name: str, side: int, batch: int, args: Args) -> dict[str, Any]:
    """Profile a training step: number of launches, utilisation of the device, and the longest kernels (on a CPU,
    operators)."""
    import torch

    from training import speed

    data, on_gpu = speed.latents(batch, side), torch.cuda.is_available()
    step = speed.training_step(speed.backbone(name, side, **args), "bf16", lambda: data)
    (row,) = speed.time_interleaved([({}, step)], 1, batch)
    events = speed.profile_call(step).key_averages()
    events = [event for event in events if "#" not in event.key]  # those contain others
    events = [event for event in events if on_gpu == str(event.device_type).endswith("CUDA")]
    times = {event.key[:80]: event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in events}
    busy = {"busy": round(sum(times.values()) / 1e6 * row["img/s"] / batch, 3)} if on_gpu else {}
    longest = dict(sorted(times.items(), key=lambda item: item[1], reverse=True)[:10])
    count = {"launches" if on_gpu else "operators": sum(event.count for event in events)}
    return {**count, **busy, "longest, microseconds": longest}


def killed_and_resumed(training: tuple[str, ...], num_steps: int) -> dict[str, Any]:
    """Compare a training that is killed and resumed with one that is not: largest difference of their averaged
    weights."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        straight, killed = (Path(folder, "runs", name, "checkpoints") for name in ("straight", "killed"))

        def train(*flags: str) -> subprocess.Popen:
            silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            return children.start_process([*TRAIN, *flags], cwd=folder, **silent)

        flags = [*training, "--train.num_steps", str(num_steps), "--log.checkpoint_every", str(num_steps // 4)]
        status, process = train(*flags, "--name", "straight").wait(), train(*flags, "--name", "killed")
        while process.poll() is None and not list(killed.glob("0*")):
            time.sleep(0.02)
        children.kill_tree(process)
        process.wait()
        saved = max(path.name for path in killed.glob("0*"))
        if status or train("--resume", "runs/killed").wait():
            raise RuntimeError("train.py failed: run it by itself")
        resumed, expected = (load_file(path / f"{num_steps:08d}/ema.safetensors") for path in (killed, straight))
    gap = max((resumed[name].double() - expected[name].double()).abs().max().item() for name in expected)
    return {"killed after": int(saved), "largest difference": gap}


def sharded(training: tuple[str, ...]) -> dict[str, Any]:
    """Compare the losses of a training under FSDP, on one GPU, with those of one without it."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--config_file"]
    launcher, losses = [*launcher, str(ROOT / "configs/accelerate/fsdp2.yaml")], {}
    with tempfile.TemporaryDirectory() as folder:
        flags = [*training, "--train.num_steps", "4", "--log.every", "1", "--train.precision", "fp32", "--name"]
        for name, command in (("plain", TRAIN), ("sharded", [*launcher, TRAIN[1]])):
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
            process = children.start_process([*command, *flags, name], cwd=folder, **pipes)
            output = process.communicate()[0]
            if process.returncode:
                raise RuntimeError(f"{name} training failed: run train.py by itself")
            if name == "sharded" and "each with a part of the model" not in output:
                raise RuntimeError("nothing was sharded")
            lines = (Path(folder, "runs", name) / "log.jsonl").read_text().splitlines()
            losses[name] = [event["loss"] for event in map(json.loads, lines) if "loss" in event]
    gap = max(abs(one / other - 1) for one, other in zip(*losses.values(), strict=True))
    if gap > 1e-3:
        raise ValueError(f"losses differ by {gap:.1e}: {losses}")
    return {"losses off by": gap, "losses": losses["sharded"]}


def sampling(name: str, side: int, batch: int, args: Args, *, num_steps: int, tiny: bool) -> dict[str, Any]:
    """Measure images per second of decoding, and of guided sampling by plain blocks, compiled ones and (on a GPU) CUDA
    graphs, and compare the samples."""
    from autoencoders.codec import create_codec
    from models.compilation import compile_blocks
    from training import speed

    (noise, y), codec = speed.latents(batch, side), create_codec("embedded").to(speed.benchmark_device())
    models = {"eager": speed.wake(speed.backbone(name, side, **args).eval())}
    for kind in ("blocks",) if tiny else ("blocks", "graphs"):
        models[kind] = copy.deepcopy(models["eager"])
        compile_blocks(models[kind], kind, backend="eager" if tiny else "inductor")

    settings = {"sampler": "ddim", "num_steps": num_steps, "guidance_scale": 1.5}
    draws = {kind: speed.sampling(model, "bf16", noise, y, **settings) for kind, model in models.items()}
    programs: list[Any] = [({"what": f"{num_steps} steps, {kind}"}, draw) for kind, draw in draws.items()]
    rows = speed.time_interleaved([*programs, ({"what": "decoding"}, partial(codec.decode, noise))], 2, batch, 1)
    samples = {kind: draw() for kind, draw in draws.items()}
    samples["float32"] = speed.sampling(models["eager"], "fp32", noise, y, **settings)()
    size = samples["eager"].norm()
    gaps = {kind: ((found - samples["eager"]).norm() / size).item() for kind, found in samples.items()}
    if not all(gaps[kind] <= 2 * gaps["float32"] for kind in models):
        raise ValueError(f"samples are further from plain ones in bf16 than these from float32: {gaps}")
    return {"rows": rows, "samples off by": gaps}


def scores(num: int, dim: int) -> dict[str, Any]:
    """Compare scores on the CPU and on the device: time of each, and largest relative difference."""
    import torch

    from metrics.features import Features
    from metrics.fidelity import compute_scores
    from training.speed import benchmark_device

    samples, reference = (Features.of(torch.randn(num, dim) * scale) for scale in (1.0, 1.1))
    seconds, results = [], []
    for device in (torch.device("cpu"), benchmark_device()):
        start, extractor = time.perf_counter(), SimpleNamespace(kind="random", name="random", device=device)
        values = compute_scores(samples, reference, extractor).scores  # pyright: ignore[reportArgumentType]
        results.append({name: score.value for name, score in values.items() if score.value is not None})
        seconds.append(round(time.perf_counter() - start, 2))
    on_cpu, on_device = results
    gap = max(abs(on_device[name] - value) / max(abs(value), 1e-9) for name, value in on_cpu.items())
    if gap > 1e-6:
        raise ValueError(f"the device's scores are {gap:.1e} off the CPU's: {results}")
    return {"seconds on the CPU": seconds[0], "on the device": seconds[1], "off by": gap, "scores": sorted(on_cpu)}


def encoding(num: int, threads: tuple[int, ...]) -> dict[str, Any]:
    """Measure images per second from JPEG files to a latent cache of 256 pixels, by the number of decoding threads."""
    import numpy as np
    from PIL import Image

    from autoencoders.codec import create_codec
    from data.encoding import build_cache
    from data.images import ImageDataset
    from training.speed import benchmark_device

    device, rates, rng = benchmark_device(), {}, np.random.default_rng(0)
    codec = create_codec("embedded").to(device)
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "files"
        files.mkdir()
        for index in range(num):
            blurred = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((500, 375))
            blurred.save(files / f"{index}.jpg", quality=90)
        images = ImageDataset(files, image_size=256)
        for num_threads in threads:
            start, cache = time.perf_counter(), Path(folder) / f"{num_threads}"
            build_cache(cache, images, codec.prepare, {}, flips=True, device=device, num_threads=num_threads)
            rates[f"{num_threads} threads"] = round(num / (time.perf_counter() - start), 1)
    return {"img/s": rates}


if __name__ == "__main__":
    run_main(main, CheckConfig)
