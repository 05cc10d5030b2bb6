"""Losses of the first 20 steps, as they were when the code was last known to be right. They reveal a change of
initialisation, data order, noise, loss or optimizer. If it is intended, write the new losses: `python
tests/test_golden.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
CONFIG = {
    "autoencoder": "pixel",
    "data": {"path": "shapes", "num_images": 40, "image_size": 16},
    "optim": {"lr": 3e-5},
    "train": {"num_steps": 20, "batch_size": 8, "precision": "fp32"},
    "log": {"every": 1, "validate_every": 0, "sample_every": 0, "checkpoint_every": 0, "trackers": []},
    "sampling": {"sampler": "ddim", "num_steps": 1},
}
SAME_SUMS = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "COMPATIBLE"}
"""Instructions that every x86 CPU of today has: wider ones add up in another order, which XSwin's twenty steps grow to
6e-4."""
MODELS = {
    "XSwin": {"dim": 16, "depths": [2, 1], "num_heads": [2, 4], "num_global_blocks": 1},
    "DiT": {"dim": 32, "depth": 2, "num_heads": 2},
}


def on_one_core():
    """With two threads sums have another order, and within twenty steps the difference grows to 2e-4."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


TRAIN = """
import runpy, sys
program, *models = sys.argv[1:]
for model in models:
    sys.argv[:] = [program, "--config", f"{model}.yaml"]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def losses(folder):
    """Losses of all models, trained one after the other in one process."""
    for model, model_args in MODELS.items():
        (folder / f"{model}.yaml").write_text(yaml.safe_dump({**CONFIG, "model": model, "model_args": model_args}))
    command = [sys.executable, "-c", TRAIN, str(ROOT / "train.py"), *MODELS]
    environment = {**os.environ, **SAME_SUMS, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, preexec_fn=on_one_core
    )
    assert done.returncode == 0, done.stderr[-2000:]
    logs = {model: folder / "runs" / model / "log.jsonl" for model in MODELS}
    return {model: [json.loads(line)["loss"] for line in log.read_text().splitlines()] for model, log in logs.items()}


def test_losses_are_those_written_down(tmp_path):
    for model, found in losses(tmp_path).items():
        expected = [float(line) for line in (GOLDEN / f"{model}.txt").read_text().split()]
        assert found == pytest.approx(expected, rel=1e-5), model


if __name__ == "__main__":
    import tempfile

    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, found in losses(Path(folder)).items():
            (GOLDEN / f"{name}.txt").write_text("".join(f"{loss:.6f}\n" for loss in found))
            print(name, found)
