"""What only a GPU can show, in ten minutes: a line of JSON a step; a step that fails says why, and the next one begins.

python scripts/gpu_check.py > gpu.jsonl                           (on a GPU)
python scripts/gpu_check.py --compare ../XSwinDiffusion           (beside the published implementation's step)
python scripts/gpu_check.py --tiny true                           (the same steps at sizes for a CPU)
"""

import json
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

from experiment.cli import one_line_errors, parse
from machine import children
from settings import within

Args = dict[str, Any]
Step = Callable[[], dict[str, Any]]
TINY_MODELS = {  # arguments that leave a backbone its parts and few weights
    "XSwin": {"dim": 16, "depths": [1, 1], "num_heads": [2, 4], "num_global_blocks": 1},
    "DiT-XL/2": {"dim": 32, "depth": 1, "num_heads": 2},
}
TRAIN = [sys.executable, str(Path(__file__).resolve().parent.parent / "train.py")]
SMALL = ("--model", "XSwin-S", "--data.num_images", "100", "--train.batch_size", "8", "--sampling.num_steps", "2")
SMALL += ("--log.trackers", "[]")
TINY_ARGS = json.dumps({**TINY_MODELS["XSwin"], "patch_size": 4})
TINY_TRAINING = (*SMALL, "--model_args", TINY_ARGS, "--autoencoder", "pixel", "--data.image_size", "16")


@dataclass(frozen=True)
class Sizes:
    """How large what is measured is."""

    speeds: tuple[tuple[str, int, int], ...] = (("XSwin", 8, 128), ("DiT-XL/2", 32, 64))  # side of latents, batch
    calls: int = 50  # steps before the device is waited for
    num_steps: int = 10  # of sampling
    features: tuple[int, int] = (10_000, 2048)  # images, and features of each
    encoded: int = 2048  # images
    threads: tuple[int, ...] = (1, 4, 12)
    trained: int = 400  # steps of a training that is killed
    training: tuple[str, ...] = SMALL  # its flags
    product: int | None = None  # side of the matrices whose product tells the peak


TINY = Sizes((("XSwin", 8, 2), ("DiT-XL/2", 8, 2)), 1, 2, (200, 8), 4, (1, 2), 8, TINY_TRAINING, 512)


@dataclass(frozen=True)
class CheckConfig:
    """Run the steps, one after the other.

    Args:
        compare: checkout of the published implementation
        only: names of steps, or how they begin; null: all
        minutes: after which the step under way is broken off, and the rest left
        tiny: sizes that a CPU can do
    """

    compare: Path | None = None
    only: list[str] | None = None
    minutes: float = within("(0, inf)", 10.0)
    tiny: bool = False


def main(config: CheckConfig) -> None:
    """A line each; the exit status is 1 where one failed."""
    import torch

    from training.speed import the_device

    if the_device().type != "cuda" and not config.tiny:
        raise ValueError("--tiny false: there is no CUDA device here; --tiny true runs the steps on the CPU")
    torch.manual_seed(0)
    deadline, failed = time.monotonic() + 60 * config.minutes, 0
    for name, step in steps(TINY if config.tiny else Sizes(), config.compare, tiny=config.tiny):
        if config.only is None or any(name.startswith(start) for start in config.only):
            failed += not report(name, step, deadline)
    raise SystemExit(int(failed > 0))


def report(name: str, step: Step, deadline: float) -> bool:
    """A step's line: what it found or how it failed. A step may take until the deadline."""
    import torch

    def end(*_: object) -> None:
        raise TimeoutError("the minutes are over")

    began, line = time.monotonic(), {"step": name, "ok": True}
    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(deadline - began, 1e-3))
    try:
        line |= step()
    except Exception as error:  # whatever libraries, drivers and compilers raise
        line |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:300]}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    print(json.dumps({**line, "seconds": round(time.monotonic() - began, 1)}), flush=True)
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return bool(line["ok"])


def steps(sizes: Sizes, compare: Path | None, *, tiny: bool) -> Iterator[tuple[str, Step]]:
    """What to run, by its name in the report."""
    cases = [(*case, TINY_MODELS[case[0]] if tiny else {}) for case in sizes.speeds]
    yield "machine", partial(machine, sizes.product)
    for name in [] if tiny else ("USwin", "DiT", "UViT", "UViT-tokens-S/2", "LightningDiT-S/1", "UNet"):
        yield f"numbers {name}", partial(numbers, name, 8, 8, {})
    for case in cases:
        yield f"numbers {case[0]}", partial(numbers, *case)
        yield f"attention {case[0]}", partial(attention, *case)
        for how in ("eager",) if tiny else ("eager", "compiled", "graphed"):
            yield f"speed {case[0]} {how}", partial(speed_of, *case, how=how, sizes=sizes)
        if compare is not None and case[0] == "XSwin":
            for how in ("fp32", "bf16"):
                yield f"speed published {how}", partial(speed_of, *case, how=how, sizes=sizes, checkout=compare)
        yield f"profile {case[0]}", partial(profile_of, *case)
    yield "resume", partial(killed_and_resumed, sizes.training, sizes.trained)
    yield "sampling", partial(sampling, *cases[0], num_steps=sizes.num_steps)
    yield "scores", partial(scores, *sizes.features)
    yield "encoding", partial(encoding, sizes.encoded, sizes.threads)


def machine(side: int | None) -> dict[str, Any]:
    """Device, versions, and the speed of products of matrices."""
    import torch

    from training.speed import matrix_peak, the_device

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else the_device().type
    peaks = {f"{each} TFLOP/s": round(matrix_peak(each, side)[0] / 1e12, 2) for each in ("fp32", "bf16")}
    return {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda, **peaks}


def numbers(name: str, side: int, batch: int, args: Args) -> dict[str, Any]:
    """Losses of three steps in float32 and bf16, without stochastic depth; and the lines at which a step waits."""
    import torch

    from diffusion import GaussianDiffusion
    from training import speed

    x_0, y = speed.latents(min(batch, 8), side)
    losses: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for precision, found in losses.items():
        torch.manual_seed(0)
        model = speed.backbone(name, side, **args).eval()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
        loss_of = speed.autocasting(precision, partial(GaussianDiffusion().training_loss, model, x_0, y))
        for step in range(3):
            torch.manual_seed(step)
            loss = loss_of()["loss"].mean()
            loss.backward()
            for weight, parameter in model.named_parameters():
                if parameter.grad is None or not parameter.grad.isfinite().all():
                    raise ValueError(f"{precision}, step {step}: the gradient of {weight} is missing or not finite")
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
    gap = max(abs(bf16 / fp32 - 1) for fp32, bf16 in zip(*losses.values(), strict=True))
    if gap > 0.02:
        raise ValueError(f"bf16 is {gap:.1%} off float32: {losses}")
    step = speed.training_step(speed.backbone(name, side, **args), "bf16", lambda: (x_0, y))
    step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watch = torch.cuda.set_sync_debug_mode if torch.cuda.is_available() else lambda mode: None
        watch("warn")
        step()
        watch("default")
    lines = Counter(f"{Path(one.filename).name}:{one.lineno}" for one in caught if "synchroniz" in str(one.message))
    return {"losses": losses["fp32"], "bf16 off by": round(gap, 6), "waits": lines}


def attention(name: str, side: int, batch: int, args: Args) -> dict[str, Any]:
    """What each attention of a forward pass is computed by, with the shape of its queries."""
    from training import speed

    model, (x_0, y) = speed.backbone(name, side, **args).eval(), speed.latents(batch, side)
    found: Counter[str] = Counter()
    profile = speed.profiled(speed.autocasting("bf16", partial(model, x_0, y.float(), y)))
    for event in profile.key_averages(group_by_input_shape=True):
        if event.key.startswith("aten::_scaled_dot_product"):
            found[f"{event.key.removeprefix('aten::_scaled_dot_product_')} {event.input_shapes[0]}"] += event.count
    return {"kernels": found}


def speed_of(
    name: str, side: int, batch: int, args: Args, *, how: str, sizes: Sizes, checkout: Path | None = None
) -> dict[str, Any]:
    """Images a second, share of the matrix peak and memory of a step: plain, compiled, in a graph, or the published."""
    from metrics.cost import cost
    from published.checkout import Published
    from training import speed

    data, model = speed.latents(batch, side), speed.backbone(name, side, **args)
    flops = 3e9 * cost(model, latent_shape=(4, side, side), num_classes=speed.NUM_CLASSES).gflops
    if checkout:
        step = Published(checkout).step(name, speed.NUM_CLASSES, speed.the_device(), how, lambda: data)
    else:
        compiled, reads = how == "compiled", how != "graphed"
        step = speed.training_step(model, "bf16", lambda: data, compile=compiled, reads=reads)
    (row,) = speed.in_turns([({}, speed.graphed(step) if how == "graphed" else step)], 1, batch, sizes.calls)
    peak, _ = speed.matrix_peak("fp32" if how == "fp32" else "bf16", sizes.product)
    return {"latents": side, "batch": batch, **row, "MFU": round(flops * row["img/s"] / peak, 3)}


def profile_of(name: str, side: int, batch: int, args: Args) -> dict[str, Any]:
    """Launches of a training step, the share that the device is busy, and the longest kernels; on a CPU, operations."""
    import torch

    from training import speed

    data, on_gpu = speed.latents(batch, side), torch.cuda.is_available()
    step = speed.training_step(speed.backbone(name, side, **args), "bf16", lambda: data)
    (row,) = speed.in_turns([({}, step)], 1, batch)
    events = [one for one in speed.profiled(step).key_averages() if "#" not in one.key]  # which are spans of others
    events = [one for one in events if on_gpu == str(one.device_type).endswith("CUDA")]
    took = {one.key[:80]: one.self_device_time_total if on_gpu else one.self_cpu_time_total for one in events}
    busy = sum(took.values()) / 1e6 / (batch / row["img/s"])
    longest = dict(sorted(took.items(), key=lambda item: item[1], reverse=True)[:10])
    return {"launches": sum(one.count for one in events), "busy": round(busy, 3), "longest, microseconds": longest}


def killed_and_resumed(training: tuple[str, ...], num_steps: int) -> dict[str, Any]:
    """A training that is killed and goes on, beside one that is not: the largest difference of their averages."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        straight, killed = (Path(folder, "runs", name, "checkpoints") for name in ("straight", "killed"))

        def train(*flags: str) -> subprocess.Popen:
            return children.start([*TRAIN, *flags], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        new = [*training, "--train.num_steps", str(num_steps), "--log.checkpoint_every", str(num_steps // 4), "--name"]
        first, process = train(*new, "straight").wait(), train(*new, "killed")
        while process.poll() is None and not list(killed.glob("0*")):
            time.sleep(0.02)
        children.kill(process)
        process.wait()
        saved = max(path.name for path in killed.glob("0*"))
        if first or train("--resume", "runs/killed").wait():
            raise RuntimeError("train.py failed: run it by itself")
        ours, theirs = (load_file(path / f"{num_steps:08d}/ema.safetensors") for path in (killed, straight))
    gap = max((ours[name].double() - theirs[name].double()).abs().max().item() for name in theirs)
    return {"killed after": int(saved), "largest difference": gap}


def sampling(name: str, side: int, batch: int, args: Args, *, num_steps: int) -> dict[str, Any]:
    """Images a second of guided sampling, and of decoding."""
    from autoencoders.codec import create_codec
    from diffusion import GaussianDiffusion, sample
    from training import speed

    noise, y = speed.latents(batch, side)
    model, codec = speed.backbone(name, side, **args).eval(), create_codec("embedded").to(speed.the_device())
    settings = {"sampler": "ddim", "num_steps": num_steps, "guidance_scale": 1.5}
    draw = speed.autocasting("bf16", partial(sample, GaussianDiffusion(), model, noise, y, **settings))
    programs = [({"what": f"{num_steps} steps"}, draw), ({"what": "decoding"}, partial(codec.decode, noise))]
    return {"rows": speed.in_turns(programs, 2, batch, 1)}


def scores(num: int, dim: int) -> dict[str, Any]:
    """Scores on the CPU and on the device: seconds of each, and how far they are apart."""
    import torch

    from metrics.features import Features
    from metrics.fidelity import compare
    from training.speed import the_device

    samples, reference = (Features.of(torch.randn(num, dim) * scale) for scale in (1.0, 1.1))
    seconds, found = [], []
    for device in (torch.device("cpu"), the_device()):
        began, extractor = time.perf_counter(), SimpleNamespace(kind="random", name="random", device=device)
        values = compare(samples, reference, extractor).scores  # pyright: ignore[reportArgumentType]
        found.append({name: score.value for name, score in values.items() if score.value is not None})
        seconds.append(round(time.perf_counter() - began, 2))
    gap = max(abs(found[1][name] - value) / max(abs(value), 1e-9) for name, value in found[0].items())
    if gap > 1e-6:
        raise ValueError(f"the device's scores are {gap:.1e} off the CPU's: {found}")
    return {"seconds on the CPU": seconds[0], "on the device": seconds[1], "off by": gap, "scores": sorted(found[0])}


def encoding(num: int, threads: tuple[int, ...]) -> dict[str, Any]:
    """Images a second from JPEG files to a latent cache of 256 pixels, by the number of threads that decode them."""
    import numpy as np
    from PIL import Image

    from autoencoders.codec import create_codec
    from data.encoding import build_cache
    from data.images import ImageDataset
    from training.speed import the_device

    codec, rates, rng = create_codec("embedded").to(the_device()), {}, np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "files"
        files.mkdir()
        for number in range(num):
            blurred = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((500, 375))
            blurred.save(files / f"{number}.jpg", quality=90)
        images = ImageDataset(files, image_size=256)
        for number in threads:
            began, cache = time.perf_counter(), Path(folder) / f"{number}"
            build_cache(cache, images, codec.prepare, {}, flips=True, device=the_device(), num_threads=number)
            rates[f"{number} threads"] = round(num / (time.perf_counter() - began), 1)
    return {"img/s": rates}


if __name__ == "__main__":
    with one_line_errors():
        main(parse(CheckConfig))
