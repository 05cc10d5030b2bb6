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
import signal
import socket
import subprocess
import sys
import tempfile
import tomllib
import traceback
import types
from functools import partial
from pathlib import Path
from unittest import mock

import yaml
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

SHARDED = {"processes": 2, "ACCELERATE_USE_FSDP": "true"}  # as configs/accelerate/fsdp2.yaml has it
SHARDED |= {
    key.upper(): str(value)
    for key, value in yaml.safe_load((ROOT / "configs/accelerate/fsdp2.yaml").read_text())["fsdp_config"].items()
}

IN_FILES = f"""
import runpy
import experiment.build

experiment.build.free_memory = lambda *_: 0
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""  # trains on latents that are read from their files, as if no memory were free


def run(*arguments, cwd, processes=1, check=True, **settings):
    """Run a program in a process of its own, as a user starts it; `settings` are added to its environment.

    The process is forked from a server that has imported the libraries and the rooms, which saves seconds. With `FORKS`
    in its environment, the program forks the programs that it starts in turn, and leads a session. Several `processes`
    get the variables that torchrun sets; as under torchrun, all are stopped when one fails.
    """
    command = [str(ROOT / arguments[0]), *map(str, arguments[1:])]
    if FORKS:
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
LIBRARIES += ["matplotlib.figure", "matplotlib.backends.backend_agg", "timm.models.vision_transformer"]
ROOMS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
FORKS = "fork" in multiprocessing.get_all_start_methods()
SERVER = multiprocessing.get_context("forkserver")
ADDRESS = "FORK_SERVER"  # environment variable with the address of the server that pytest's workers share


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


def serve():
    """Start the server that programs are forked from; return its address."""
    SERVER.set_forkserver_preload(["preloaded"])
    with mock.patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}):
        multiprocessing.forkserver.ensure_running()
    return multiprocessing.forkserver._forkserver._forkserver_address


def share_server():
    """Use the server of pytest's main process."""
    server = multiprocessing.forkserver._forkserver
    if server._forkserver_address is None:
        server._forkserver_address, server.ensure_running = os.environ[ADDRESS], lambda: None
        server._forkserver_alive_fd = os.open(os.devnull, os.O_WRONLY)


def started(command, cwd, environment, *outputs):
    """Start a Python program in a forked process, whose stdout and stderr are appended to these files."""
    share_server() if ADDRESS in os.environ else serve()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    process = SERVER.Process(target=become, args=(command, str(cwd), environment, cores, *outputs))
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


def become(command, cwd, environment, cores, *outputs):
    """Set cores, folder, environment, arguments and outputs of a forked process, and run a program in it."""
    atexit._clear()  # handlers of the imported libraries belong to the server
    if cores is not None:
        os.sched_setaffinity(0, cores)
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # the server may have looked it up already, in its own environment
    sys.dont_write_bytecode = bool(environment.get("PYTHONDONTWRITEBYTECODE"))
    if environment.get("FORKS") and os.getpgrp() != os.getpid():
        os.setsid()
        children = importlib.import_module("machine.children")
        children.start_process = partial(fork, children.start_process, children._end_with)
    for name in ("processes", "preloaded", "conftest"):
        sys.modules.pop(name, None)
    sys.argv, sys.path[0] = command, str(Path(command[0]).parent)
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()


def fork(start, end_with, command, **options):
    """Replace `machine.children.start_process`: fork the calling program and run a Python file in the child."""
    if not command[1].endswith(".py"):
        return start(command, **options)
    return Forked(command, end_with, **options)


class Forked(subprocess.Popen):
    """A child process with its parent's imports, in a process group of its own, which ends with its parent."""

    def __init__(self, command, end_with, **options):
        self.be = partial(self.child, command[1:], os.getpid(), end_with)
        super().__init__(command, **options)

    def _execute_child(self, _0, _1, _2, _3, _4, cwd, environment, _7, _8, _9, *others):
        pipes = others[:6]
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(self.be(cwd or Path.cwd(), environment or dict(os.environ), *pipes))
        self._child_created = True
        self._close_pipe_fds(*pipes)

    def child(self, command, parent, end_with, cwd, environment, read, own_write, own_read, write, own_errors, errors):
        """Run the program in the child; return its exit status."""
        os.setpgid(0, 0)
        for number, pipe in enumerate((read, write, errors)):
            if pipe != -1:
                os.dup2(pipe, number)
        for pipe in {own_write, own_read, own_errors} - {-1}:
            os.close(pipe)
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            end_with(parent)
            become(command, cwd, environment, None)
            status = 0
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        return status


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
