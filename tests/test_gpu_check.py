"""scripts/gpu_check.py, which is made for a GPU, at sizes for a CPU."""

import json

from processes import run


def lines(*flags, cwd, **options):
    done = run("scripts/gpu_check.py", "--tiny", "true", *flags, cwd=cwd, **options)
    return done.returncode, {line["step"]: line for line in map(json.loads, done.stdout.splitlines())}


def test_every_step_leaves_a_line(tmp_path):
    status, found = lines(cwd=tmp_path, FORKS="true")
    assert status == 0
    assert [*found][-4:] == ["resume", "scores", "encoding", "sampling"]
    assert all(line["ok"] and line["seconds"] >= 0 for line in found.values())
    for name in ("XSwin", "DiT-XL/2"):
        assert found[f"numbers {name}"]["bf16 off by"] < 0.02
        assert 0 < found[f"speed {name} eager"]["MFU"] < 1
        assert len(found[f"profile {name}"]["longest, microseconds"]) == 10
        assert found[f"attention {name}"]["shared tiles off by"] < 1e-4
    assert found["resume"]["killed after"] >= 2
    assert found["resume"]["largest difference"] == 0
    assert len(found["scores"]["scores"]) == 6
    assert [row["what"] for row in found["sampling"]["rows"]] == ["2 steps, eager", "2 steps, blocks", "decoding"]
    gaps = found["sampling"]["samples off by"]
    assert gaps["eager"] == gaps["blocks"] == 0 < gaps["float32"] < 0.1


def test_a_step_that_fails_or_takes_too_long_says_so_and_the_next_one_begins(tmp_path):
    asked = ("--only", "[speed published, scores]", "--compare", "nowhere")
    (tmp_path / "nowhere").mkdir()  # and nothing in it
    status, found = lines(*asked, cwd=tmp_path, check=False)
    assert status == 1
    assert found["speed published bf16"]["error"].startswith("FileNotFoundError: --compare nowhere")
    assert found["scores"]["ok"]
    status, found = lines("--only", "[machine]", "--minutes", 1e-4, cwd=tmp_path, check=False)
    assert (status, found["machine"]["error"]) == (1, "TimeoutError: the minutes are over")
