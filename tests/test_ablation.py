"""A real ablation that is stopped, killed and resumed."""

import json
import re
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from ablations import BASE
from processes import PIXELS, ROOT, TINY, environment_of, run, started

from ablation.identity import done_stages

pytestmark = pytest.mark.usefixtures("here")


def test_a_stopped_and_a_killed_ablation_go_on_and_report_their_runs_numbers(tmp_path):
    from metrics.programs import save_program

    class MeanColors(torch.nn.Module):
        def forward(self, images: torch.Tensor):
            means = images.float().mean(dim=(2, 3)) / 255
            return means, torch.softmax(4 * means, dim=1)

    save_program(MeanColors(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8), tmp_path / "colors.pt")
    base = {**BASE, **PIXELS, "train": {**TINY["train"], "num_steps": 20}}
    base["log"] = {**TINY["log"], "validate_every": 0, "checkpoint_every": 5, "trackers": []}
    text = {
        "base": base,
        "variants": {"XSwin": {}, "four steps": {"sampling.num_steps": 4}},  # of one training: seconds less again
        "pictures": {"num_per_class": 0},
    }
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(text))
    command = [str(ROOT / "scripts" / "ablate.py"), "two.yaml"]

    folder = Path("runs/two/XSwin/seed0")

    def begun(until):
        runner = started(command, tmp_path, environment_of(FORKS="true"), tmp_path / "output", tmp_path / "errors")
        while not (folder / until).exists() or not (folder / until).stat().st_size:
            assert runner.is_alive(), (tmp_path / "errors").read_text()
            time.sleep(0.02)
        return runner

    # Stopped by a signal to itself alone: its training saves and ends with it.
    runner = begun("log.jsonl")
    training = psutil.Process(runner.pid).children(recursive=True)
    runner.terminate()
    runner.join()
    assert runner.exitcode == 75
    assert "stopped: XSwin, seed 0: SIGTERM" in (tmp_path / "output").read_text()
    assert training
    assert not psutil.wait_procs(training, timeout=120)[1]
    (saved,) = (folder / "checkpoints").glob("[0-9]*")

    # Killed, its training with it, after the next checkpoint.
    runner = begun(f"checkpoints/{5 * (int(saved.name) // 5 + 1):08d}")
    for process in (runner, *psutil.Process(runner.pid).children(recursive=True)):
        process.kill()
    runner.join()
    assert "train" not in done_stages(folder)
    assert not (folder / "checkpoints/00000020").exists()

    # Gone on with, from there.
    done = run("scripts/ablate.py", "two.yaml", cwd=tmp_path, FORKS="true")
    assert re.search(r"XSwin, seed 0 +\| 0\.1\dM", done.stdout)
    assert re.search(r"at step (5|10|15) of 20 ", done.stdout)
    assert "report of 2 runs (0 to go)" in done.stdout
    losses = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [event["step"] for event in losses] == list(range(1, 21))
    for variant in ("XSwin", "four-steps"):
        folder = Path("runs/two") / variant / "seed0"
        record = json.loads((folder / "scores.json").read_text())
        value = record["rows"][0]["trials"][0]["frechet_distance[colors]"]["value"]
        for name in ("results.csv", "report.md", "table.tex", "report.html"):
            shown = str(value) if name == "results.csv" else f"{value:.4f}"
            assert shown in Path("runs/two", name).read_text(), name
