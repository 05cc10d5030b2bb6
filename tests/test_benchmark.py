"""scripts/benchmark.py as a user runs it."""

from pathlib import Path

import pytest
from processes import run, script


def test_a_table_with_every_row(tmp_path):
    flags = ("--models", "[DiT]", "--batch_size", 2, "--rounds", 1)
    flags += ("--model_args", "{dim: 32, depth: 2, num_heads: 2}")
    done = run("scripts/benchmark.py", "training", *flags, cwd=tmp_path)
    head, _, row = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line
    )
    row = dict(zip(head, row, strict=True))
    assert row["model"] == "DiT"
    assert float(row["parameters"]) < 1e6
    assert float(row["img/s"]) > 0
    assert 0 < float(row["MFU"]) < 1


def test_a_folder_that_is_no_checkout_is_told_before_anything_is_measured(monkeypatch):
    benchmark = script("scripts/benchmark.py")
    monkeypatch.delattr(benchmark, "in_turns")
    for measure in (benchmark.training, benchmark.sampling):
        with pytest.raises(FileNotFoundError, match="--compare nowhere: no models/ package there"):
            measure(compare=Path("nowhere"))
