"""scripts/benchmark.py as a user runs it."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from processes import run, script
from torch._subclasses.fake_tensor import FakeTensorMode

from training import speed


def test_a_table_and_json_with_every_row(tmp_path):
    flags = ("--models", "[DiT]", "--batch_size", 2, "--rounds", 1, "--output", "out.json")
    small = "dim: 32, depth: 2, num_heads: 2"
    flags += ("--variants", f"[{{{small}}}, {{{small}, qk_norm: true}}]")
    done = run("scripts/benchmark.py", "training", *flags, cwd=tmp_path)
    assert "| model | implementation | precision |" in done.stdout
    row, other = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["model"] == "DiT"
    assert row["parameters"] < 1e6
    assert row["img/s"] > 0
    assert 0 < row["MFU"] < 1
    assert (row["time"], other["arguments"]) == (1, "dim 32, depth 2, num_heads 2, qk_norm True")
    assert other["time"] == pytest.approx(row["img/s"] / other["img/s"], rel=1e-2)


def test_a_folder_that_is_not_a_checkout_is_refused_before_anything_is_measured(monkeypatch):
    benchmark = script("scripts/benchmark.py")
    monkeypatch.delattr(speed, "time_interleaved")
    for measure in (benchmark.training, benchmark.sampling, benchmark.epoch):
        with pytest.raises(FileNotFoundError, match="--compare nowhere: no models/ package there"):
            measure(compare=Path("nowhere"))


def test_on_a_gpu_ten_calls_share_a_synchronisation_and_the_peak_is_of_large_matrices(monkeypatch):
    """What a GPU has to do in the meantime takes much longer than the launches."""
    done = []
    monkeypatch.setattr(speed, "benchmark_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(speed, "memory_gb", lambda device: 0.0)
    for name in ("reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, partial(done.append, name))
    speed.time_interleaved([({}, lambda: done.append("step"))], 2, 4)
    assert done == ["reset_peak_memory_stats", *["step"] * 10, "synchronize"] * 3

    products = []
    monkeypatch.setattr(torch, "mm", lambda a, b, out: products.append((a.shape, a.device.type)))
    monkeypatch.setattr(speed, "throughput", lambda multiply, batch_size, **_: multiply() or float(batch_size))
    with FakeTensorMode():
        assert speed.matrix_peak.__wrapped__("bf16") == (2 * 8192**3 * 10, 8192)
    assert products == [((8192, 8192), "cuda")] * 10


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux forgets the most memory that was held")
def test_memory_of_each_program_is_its_own():
    programs = [({"GB": gb}, partial(torch.ones, int(gb * 2.5e8))) for gb in (0.4, 0.2)]
    used = [row["step GB"] for row in speed.time_interleaved(programs, rounds=1, num_images=1)]
    assert used == pytest.approx([0.4, 0.2], abs=0.05)
