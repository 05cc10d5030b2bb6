"""Real processes of the entry points, and what they leave."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

from safetensors import safe_open

ROOT = Path(__file__).parent.parent
TINY = {
    "model": "XSwin",
    "model_args": {
        "dim": 16,
        "depths": [1, 1],
        "num_heads": [2, 4],
        "num_global_blocks": 1,
        "conv_norm": "group",
    },
    "name": "tiny",
    "autoencoder": "embedded",
    "data": {"path": "shapes", "num_images": 40, "image_size": 32},
    "optim": {"lr": 1e-3, "grad_clip": 1.0},
    "train": {"num_steps": 4, "batch_size": 8, "precision": "fp32"},
    "sampling": {"sampler": "ddpm", "num_steps": 3, "guidance_scale": 1.5},
    "log": {"every": 1, "validate_every": 2, "sample_every": 0, "checkpoint_every": 2},
}


def run(*arguments, cwd, processes=1, check=True, **settings):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = environment_of(**settings)
    command = [*launcher, str(ROOT / arguments[0]), *map(str, arguments[1:])]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


def environment_of(**settings):
    """One thread, no accelerator."""
    own = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **own, **settings}


def script(name):
    """A program, such as scripts/gallery.py, as a module, to be tested without a process of its own."""
    path = ROOT / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def log(folder, name):
    return [json.loads(line) for line in (folder / "runs" / name / "log.jsonl").read_text().splitlines()]


def weights(folder, name, step=4, file="ema.safetensors"):
    with safe_open(folder / "runs" / name / "checkpoints" / f"{step:08d}" / file, "pt") as tensors:
        return {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
