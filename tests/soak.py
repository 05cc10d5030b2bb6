"""Kill real trainings at random moments, resume them, and compare them bit by bit with an uninterrupted one.

    make soak          (20 kills, and 5 of two processes under each launcher; docs/reliability.md has its results)
    python tests/soak.py --kills 3 --launcher torchrun

Each kill sends SIGKILL to the whole process group at a random moment between the first checkpoint and the end of the
run: in a step, in a validation, or in the middle of a save (checkpoints are written after every step). The resumed run
must end with the same weights, averages, optimizer state and log.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import yaml

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiment.cli import run_program
from machine import children

ROOT = Path(__file__).parent.parent
MEASURED = {"images_per_second", "waiting_for_data", "memory_gb"}
ONE_MACHINE = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
LAUNCHERS = {
    "python": [],
    "accelerate": ["-m", children.LAUNCHER, "--cpu", *ONE_MACHINE, "--num_processes", "2"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}
CONFIG = {
    "model": "XSwin",
    "model_args": {"dim": 32, "depths": [1, 1], "num_heads": [2, 4], "num_global_blocks": 1},
    "data": {"path": "shapes", "num_images": 60, "image_size": 32},
    "optim": {"lr": 1e-3, "muon_lr": 1e-3, "grad_clip": 1.0, "warmup_steps": 3, "decay": "cosine"},
    "train": {"batch_size": 8, "grad_accumulation": 2},
    "sampling": {"sampler": "ddim", "num_steps": 2},
    "log": {
        "every": 3,
        "validate_every": 5,
        "sample_every": 10,
        "checkpoint_every": 1,
        "keep_checkpoints": 2,
        "best": "validation_loss",
        "trackers": [],
    },
}
PIXELS = {
    "autoencoder": "pixel",
    "model_args": {**CONFIG["model_args"], "patch_size": 4},
    "data": {**CONFIG["data"], "image_size": 16},
}


def soak(
    kills: int = 20,
    num_steps: int = 40,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    launcher: Literal["python", "accelerate", "torchrun"] = "python",
    pixels: bool = False,
    seed: int = 0,
    output: Path | None = None,
) -> None:
    """Kill and resume trainings until `kills` processes have been killed, in as many runs as that takes.

    Args:
        kills: number of processes to kill
        num_steps: steps of each training
        precision: precision of training: 'auto', 'fp32' or 'bf16'
        launcher: 'python' starts one process; 'accelerate' and 'torchrun' start two
        pixels: train on pixels in place of latents, which saves some seconds at each start
        seed: seed of the random moments
        output: JSON file for the figures
    """
    if kills < 1:
        raise ValueError(f"--kills {kills}: kill one process at least")
    generator = random.Random(seed)
    figures = {"kills": 0, "in_a_save": 0, "runs": 0, "resumed_steps": []}
    figures |= {"precision": precision, "launcher": launcher}
    with tempfile.TemporaryDirectory() as name, children.handling_signals(stop):
        folder = Path(name)
        config = {**CONFIG, "train": {**CONFIG["train"], "num_steps": num_steps, "precision": precision}}
        config |= PIXELS if pixels else {}
        (folder / "soak.yaml").write_text(yaml.safe_dump(config))
        uninterrupted = start(folder, "straight", launcher)
        await_checkpoint(uninterrupted, folder / "runs" / "straight" / "checkpoints")
        began = time.time()
        finish(uninterrupted)
        length = time.time() - began
        expected = fingerprint(folder / "runs" / "straight")
        while figures["kills"] < kills:
            run = f"killed{figures['runs'] + 1}"
            while True:
                checkpoints = folder / "runs" / run / "checkpoints"
                process = start(folder, run, launcher)
                if figures["kills"] < kills:
                    await_checkpoint(process, checkpoints)
                if figures["kills"] == kills or not killed(process, generator.uniform(0, length)):
                    finish(process)
                    break
                figures["kills"] += 1
                figures["in_a_save"] += any(checkpoints.glob(".*.partial"))
                figures["resumed_steps"].append(newest_step(checkpoints))
                print(f"kill {figures['kills']} of {kills}, at step {newest_step(checkpoints)}", flush=True)
            resumed = fingerprint(folder / "runs" / run)
            different = [key for key in expected if expected[key] != resumed[key]]
            if different:
                raise SystemExit(f"soak: {run} differs from the uninterrupted run in {', '.join(different)}")
            figures["runs"] += 1
            shutil.rmtree(folder / "runs" / run)
    print(json.dumps(figures))
    saves = f"{figures['in_a_save']} in the middle of a save"
    print(f"{figures['kills']} kills ({saves}), {figures['runs']} runs: equal bitwise")
    if output is not None:
        output.write_text(json.dumps(figures, indent=2) + "\n")


def start(folder: Path, name: str, launcher: str) -> subprocess.Popen:
    """Start a training, or resume it; `stop` kills it."""
    flags = ["--config", "soak.yaml", "--name", name, "--resume", "auto"]
    command = [sys.executable, *LAUNCHERS[launcher], str(ROOT / "train.py"), *flags]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    outputs = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    started[:] = [children.start_process(command, cwd=folder, env=environment, **outputs)]
    return started[0]


def stop(number: signal.Signals) -> None:
    """At a signal, kill the running training and exit, which removes the folder."""
    for process in started:
        children.kill_tree(process)
        children.wait_in_handler(process)
    raise SystemExit(128 + number)


started: list[subprocess.Popen] = []  # the running training; there is one at a time


def newest_step(checkpoints: Path) -> int:
    """Step of the newest finished checkpoint; 0 if there is none."""
    return max((int(path.name) for path in checkpoints.glob("[0-9]*")), default=0)


def await_checkpoint(process: subprocess.Popen, checkpoints: Path) -> None:
    """Wait for the next checkpoint, or the end of the process."""
    step = newest_step(checkpoints)
    while process.poll() is None and newest_step(checkpoints) == step:
        time.sleep(0.02)


def killed(process: subprocess.Popen, seconds: float) -> bool:
    """Kill a process after so many seconds; False if it has ended before."""
    try:
        process.wait(timeout=seconds)
        return False
    except subprocess.TimeoutExpired:
        children.kill_tree(process)
        process.communicate()
        return True


def finish(process: subprocess.Popen) -> None:
    """Wait for a process to end; exit with its errors where it has failed."""
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"soak: the training failed\n{errors[-2000:]}")


def fingerprint(run: Path) -> dict[str, str]:
    """Hash the weights, states and log of a finished run, without measured times and memory."""
    last = sorted((run / "checkpoints").glob("[0-9]*"))[-1]
    files = {
        name: last / name for name in ("ema.safetensors", "state/model.safetensors", "state/optimizer.safetensors")
    }
    hashes = {name: hashlib.sha256(tensors_of(path)).hexdigest() for name, path in files.items()}
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    unmeasured = [{key: value for key, value in event.items() if key not in MEASURED} for event in events]
    hashes["log.jsonl"] = hashlib.sha256(json.dumps(unmeasured).encode()).hexdigest()
    hashes["best"] = (run / "checkpoints" / "best").resolve().name
    return hashes


def tensors_of(path: Path) -> bytes:
    """Read a safetensors file without its header, which contains the run's name."""
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


if __name__ == "__main__":
    run_program(soak)
