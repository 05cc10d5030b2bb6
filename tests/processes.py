"""Run entry points in processes of their own, and read what they write."""

import atexit
import contextlib
import importlib.util
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import random
import runpy
import socket
import subprocess
import sys
import tempfile
import tomllib
import types
from pathlib import Path
from unittest import mock

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
PIXELS = {**TINY, "autoencoder": "pixel", "data": {**TINY["data"], "image_size": 16}}  # saves loading an autoencoder
PIXELS |= {"model_args": {**TINY["model_args"], "patch_size": 4}}

IN_FILES = f"""
import runpy
import experiment.build

experiment.build.free_memory = lambda *_: 0
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""  # trains on latents that are read from their files, as if no memory were free


def run(*arguments, cwd, processes=1, check=True, **settings):
    """Run a program in a process of its own, as a user starts it; `settings` are added to its environment.

    The process is forked from a server that has imported the libraries and the rooms, which saves seconds. Several
    `processes` get the variables that torchrun sets; as under torchrun, all are stopped when one fails.
    """
    command = [str(ROOT / arguments[0]), *map(str, arguments[1:])]
    if "fork" in multiprocessing.get_all_start_methods():
        done = forked(command, cwd, [environment_of(**settings, **rank) for rank in ranks(processes)])
    else:
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        options = {"env": environment_of(**settings), "capture_output": True, "text": True}
        done = subprocess.run([*launcher, *command], cwd=cwd, check=False, **options)
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


LIBRARIES = ["torch", "torch.utils.tensorboard", "torchvision", "torch_fidelity", "accelerate", "einops.layers.torch"]
LIBRARIES += ["diffusers.models.autoencoders.autoencoder_kl", "jsonargparse", "attr", "shtab"]
LIBRARIES += ["matplotlib.figure", "matplotlib.backends.backend_agg"]
ROOMS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["preloaded"])


def ranks(number):
    """Environment variables of each process of a distributed run, as torchrun sets them; none for a single process."""
    if number == 1:
        return [{}]
    port = str(free_port())
    shared = {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]


def free_port():
    """Find a free port outside of the ephemeral range, so that the system gives it to nobody else in the meantime."""
    generator = random.SystemRandom()
    while True:
        address = "127.0.0.1", generator.randrange(10_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(address) as server:
            return server.getsockname()[1]


def started(command, cwd, environment, *outputs):
    """Start a Python program in a forked process, whose stdout and stderr are appended to these files."""
    with mock.patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}):
        multiprocessing.forkserver.ensure_running()
    process = SERVER.Process(target=become, args=(command, str(cwd), environment, *outputs))
    process.start()
    return process


def forked(command, cwd, environments):
    """Run a command in a forked process per environment; the result is like that of `subprocess.run`."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        group = [started(command, cwd, environment, *outputs) for environment in environments]
        while any(process.exitcode is None for process in group):
            multiprocessing.connection.wait([process.sentinel for process in group if process.exitcode is None])
            if any(process.exitcode for process in group):
                for process in group:
                    process.terminate()
        code = next((process.exitcode for process in group if process.exitcode), 0)
        return subprocess.CompletedProcess(command, code, *(path.read_text() for path in outputs))


def become(command, cwd, environment, *outputs):
    """Set folder, environment, arguments and outputs of a forked process, and run a program in it."""
    atexit._clear()  # handlers of the imported libraries belong to the server
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.dont_write_bytecode = bool(environment.get("PYTHONDONTWRITEBYTECODE"))
    for name in ("processes", "preloaded", "conftest"):
        sys.modules.pop(name, None)
    sys.argv, sys.path[0] = command, str(Path(command[0]).parent)
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()


def environment_of(**settings):
    """The environment of a program in tests: one thread, no accelerator, and the given variables."""
    defaults = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **defaults, **settings}


def script(name):
    """Import a program, such as scripts/gallery.py, as a module, to test it without a process of its own."""
    path = ROOT / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def log(folder, name):
    """Read the log of a run: one dictionary per line."""
    return [json.loads(line) for line in (folder / "runs" / name / "log.jsonl").read_text().splitlines()]


def unmeasured(folder, name):
    """Read the log of a run without measured speed and memory, which differ between equal runs."""
    measured = {"images_per_second", "waiting_for_data", "memory_gb"}
    return [{key: value for key, value in event.items() if key not in measured} for event in log(folder, name)]


def assert_same_training(folder, name, other):
    """Assert that two runs ended with bitwise equal averages, weights and optimizer state."""
    import torch

    for file in ("ema.safetensors", "state/model.safetensors", "state/optimizer.safetensors"):
        first, second = (weights(folder, run, file=file) for run in (name, other))
        assert first.keys() == second.keys(), file
        assert all(torch.equal(first[key], second[key]) for key in first), file


def weights(folder, name, step=4, file="ema.safetensors"):
    """Load the tensors of a file of a run's checkpoint."""
    with safe_open(folder / "runs" / name / "checkpoints" / f"{step:08d}" / file, "pt") as tensors:
        return {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
