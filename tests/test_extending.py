"""The examples of docs/extending.md as they stand: one of each kind in a training, its samples and its scores."""

import json
import re

import torch
import yaml
from processes import ROOT, TINY, log, run

from experiment.registry import TABLES
from metrics.programs import save_program

FILE = re.compile(r"```python\n# (\w+\.py)\n(.*?)```", re.DOTALL)


class Colour(torch.nn.Module):
    """An extractor: features are mean colours, probabilities classes of them."""

    def forward(self, images: torch.Tensor):
        means = images.float().mean(dim=(2, 3)) / 255
        return means, torch.softmax(4 * means, dim=1)


def test_files_of_the_documentation_train_sample_and_score(tmp_path):
    files = FILE.findall((ROOT / "docs" / "extending.md").read_text())
    for name, text in files:
        assert len(text.splitlines()) < 40, name
        (tmp_path / name).write_text(text)
    registered = re.findall(r'@register\("(\w+)"', "".join(text for _, text in files))
    assert set(registered) == set(TABLES)

    config = {
        **TINY,
        "model": "Mine-S",
        "model_args": {},
        "autoencoder": "folded",
        "data": {"path": "ramps", "num_images": 40, "image_size": 16},
        "diffusion": {"kind": "cosine_v", "num_timesteps": 50},
        "auxiliary": [{"kind": "edges", "weight": 0.1}],
        "sampling": {"sampler": "restart", "num_steps": 3, "guidance_scale": 1.5},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    state = {"XDG_STATE_HOME": str(tmp_path / "state")}
    run(
        "train.py", "--config", "mine.yaml", "--imports", json.dumps([name for name, _ in files]), cwd=tmp_path, **state
    )
    first = log(tmp_path, "tiny")[0]
    assert first["edges"] > 0
    run("sample.py", "--checkpoint", "runs/tiny", "--num_per_class", 2, "--output", "drawn.npz", cwd=tmp_path, **state)
    assert (tmp_path / "drawn.npz").is_file()
    save_program(Colour(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8), tmp_path / "colour.pt")
    run(
        *("evaluate.py", "--samples", "runs/tiny", "--metrics", "[fid, gap]", "--num_samples", 8),
        *("--extractor", "colour.pt"),
        cwd=tmp_path,
        **state,
    )
    scores = json.loads((tmp_path / "runs" / "tiny" / "scores.json").read_text())
    assert scores["num_samples"] == 8
    assert scores["scores"]["gap"]["value"] > 0

    elsewhere = run("sample.py", "--checkpoint", "runs/tiny", cwd=tmp_path, check=False, XDG_STATE_HOME=str(tmp_path))
    assert elsewhere.returncode == 2
    assert "its code was not given here before; if you trust it, repeat the command with --imports" in elsewhere.stderr
