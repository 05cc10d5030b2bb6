"""train.py, sample.py and evaluate.py as a user runs them: real processes, one tiny run shared by the tests."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

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


def run(*arguments, cwd, processes=1, check=True):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [*launcher, str(ROOT / arguments[0]), *map(str, arguments[1:])]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with a finished tiny run in it."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    run("train.py", "--config", "tiny.yaml", cwd=folder)
    return folder


def log(folder, name):
    return [json.loads(line) for line in (folder / "runs" / name / "log.jsonl").read_text().splitlines()]


def weights(folder, name, step=4, file="ema.safetensors"):
    with safe_open(folder / "runs" / name / "checkpoints" / f"{step:08d}" / file, "pt") as tensors:
        return {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118


def test_training_leaves_what_a_user_looks_for(folder):
    run_folder = folder / "runs" / "tiny"
    assert [path.name for path in sorted((run_folder / "checkpoints").iterdir())] == ["00000002", "00000004"]
    assert (run_folder / "samples" / "00000004.png").is_file()
    assert yaml.safe_load((run_folder / "config.yaml").read_text())["model"] == "XSwin"
    events = log(folder, "tiny")
    assert [event["step"] for event in events if "loss" in event] == [1, 2, 3, 4]
    assert [event["step"] for event in events if "validation_loss" in event] == [2, 4]
    assert {"loss", "mse", "vb", "lr", "images_per_second", "gradient_norm", "ema_drift"} <= events[0].keys()
    assert any(run_folder.rglob("events.out.tfevents*"))


def test_weights_move_and_the_average_follows(folder):
    ema, model = weights(folder, "tiny"), weights(folder, "tiny", file="state/model.safetensors")
    assert ema.keys() == model.keys()
    assert any(not torch.equal(ema[name], model[name]) for name in ema)


def test_resumed_equals_uninterrupted_bitwise(folder):
    straight = weights(folder, "tiny")
    shutil.copytree(folder / "runs" / "tiny", folder / "runs" / "cut")
    shutil.rmtree(folder / "runs" / "cut" / "checkpoints" / "00000004")
    run("train.py", "--resume", "runs/cut", cwd=folder)
    for file in ("ema.safetensors", "state/model.safetensors", "state/optimizer.safetensors"):
        straight, resumed = weights(folder, "tiny", file=file), weights(folder, "cut", file=file)
        assert all(torch.equal(straight[name], resumed[name]) for name in straight), file
    losses = [[e["loss"] for e in log(folder, name) if "loss" in e] for name in ("tiny", "cut")]
    assert losses[0] == losses[1]


def steps(events):
    """The log without what a clock or the machine says."""
    measured = {"images_per_second", "waiting_for_data", "memory_gb"}
    return [{key: value for key, value in event.items() if key not in measured} for event in events]


def test_stopping_and_resuming_anywhere_loses_nothing(folder):
    """Out of time after every step: exit status 75; a damaged checkpoint is passed over; the log is the same."""
    common = ("train.py", "--config", "tiny.yaml", "--log.checkpoint_every", 1, "--log.every", 3, "--name")
    straight, flags = (*common, "straight"), (*common, "stopped")
    run(*straight, cwd=folder)
    stopped = run(*flags, "--train.max_hours", 1e-9, "--resume", "auto", cwd=folder, check=False)
    assert stopped.returncode == 75
    assert "stopped after 1 of 4 steps; go on with --resume runs/stopped" in stopped.stdout
    again = run(*flags, "--train.max_hours", 1e-9, "--resume", "auto", cwd=folder, check=False)
    assert "stopped after 2 of 4 steps" in again.stdout
    newest = folder / "runs" / "stopped" / "checkpoints" / "00000002" / "ema.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    last = run("train.py", "--resume", "runs/stopped", "--train.max_hours", 1, cwd=folder)
    assert "00000002 is damaged: ema.safetensors has another checksum; going back" in last.stdout
    assert steps(log(folder, "stopped")) == steps(log(folder, "straight"))
    for file in ("ema.safetensors", "state/model.safetensors", "state/optimizer.safetensors"):
        one, other = weights(folder, "straight", file=file), weights(folder, "stopped", file=file)
        assert all(torch.equal(one[name], other[name]) for name in one), file
    assert (folder / "runs" / "stopped" / "loss.png").is_file()


def test_sigterm_ends_after_the_step_with_a_checkpoint(folder):
    flags = ("--name", "signalled", "--train.num_steps", 100000, "--log.every", 1, "--log.validate_every", 0)
    command = [sys.executable, str(ROOT / "train.py"), "--config", "tiny.yaml", *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.time() + 120
    while time.time() < deadline and not (folder / "runs" / "signalled" / "log.jsonl").exists():
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "SIGTERM: stopped after" in output
    done = int(output.split("stopped after ")[1].split()[0])
    assert (folder / "runs" / "signalled" / "checkpoints" / f"{done:08d}" / "ema.safetensors").is_file()


def test_another_number_of_classes_starts_from_what_fits(folder):
    flags = ("--init_from", "runs/tiny", "--name", "warm", "--train.num_steps", 1, "--optim.lr", 0.0)
    (folder / "two").mkdir()
    for name in ("a", "b"):
        (folder / "two" / name).mkdir()
        for number in range(5):
            Image.new("RGB", (32, 32), (20 * number, 90, 30)).save(folder / "two" / name / f"{number}.png")
    done = run("train.py", "--config", "tiny.yaml", "--data.path", "two", *flags, cwd=folder)
    assert "of another shape: cond.label.weight" in done.stdout
    before, after = weights(folder, "tiny"), weights(folder, "warm", step=1, file="state/model.safetensors")
    assert torch.equal(before["patch.weight"], after["patch.weight"])


EQUAL = {
    "XSwin": {**TINY["model_args"], "drop_path": 0.0},  # whose masks each process draws for itself
    "DiT": {"dim": 16, "depth": 2, "num_heads": 2},
    "UViT": {"dim": 16, "depth": 3, "num_heads": 2},
}


@pytest.mark.parametrize("model", EQUAL)
def test_two_processes_and_micro_batches_equal_one(folder, model):
    """Twenty steps at the same global batch and seed."""
    settings = {**TINY, "model": model, "model_args": EQUAL[model], "name": None}
    settings["train"] = {**TINY["train"], "num_steps": 20}
    settings["log"] = {"every": 1, "validate_every": 0, "trackers": []}
    (folder / f"{model}.yaml").write_text(yaml.safe_dump(settings))
    flags = ("train.py", "--config", f"{model}.yaml", "--name")
    run(*flags, f"{model}-one", cwd=folder)
    run(*flags, f"{model}-two", cwd=folder, processes=2)
    run(*flags, f"{model}-micro", "--train.grad_accumulation", 2, cwd=folder)
    one = [event["loss"] for event in log(folder, f"{model}-one")]
    assert len(one) == 20
    for name in ("two", "micro"):
        assert np.allclose(one, [event["loss"] for event in log(folder, f"{model}-{name}")], rtol=1e-5), name
        ours, theirs = weights(folder, f"{model}-one", step=20), weights(folder, f"{model}-{name}", step=20)
        # Adam turns rounding into whole steps where a gradient is all rounding: hence norms over all weights.
        gap = sum((ours[key].double() - theirs[key].double()).square().sum() for key in ours).sqrt()
        assert gap < 1e-3 * sum(ours[key].double().square().sum() for key in ours).sqrt(), name


def test_batch_norms_on_several_cpu_processes_are_spoken_of(folder):
    flags = ("--model_args.conv_norm", "batch", "--train.num_steps", 1, "--name", "batchnorm")
    done = run("train.py", "--config", "tiny.yaml", *flags, cwd=folder, processes=2)
    assert done.stdout.count("Batch norms see each process's own share") == 1


def test_an_average_of_any_length_is_made_from_snapshots(folder):
    flags = ("--train.ema_profiles", "[0.05, 0.1]", "--name", "profiles", "--log.checkpoint_every", 1)
    run("train.py", "--config", "tiny.yaml", *flags, cwd=folder)
    done = run("scripts/reconstruct_ema.py", "--run", "runs/profiles", "--sigma_rel", 0.08, cwd=folder)
    assert "sigma_rel 0.08 up to step 4, from 8 snapshots" in done.stdout
    made = ("--checkpoint", "runs/profiles/ema-0.08.safetensors", "--num_per_class", 1, "--output", "averaged.npz")
    run("sample.py", *made, cwd=folder)
    shutil.rmtree(folder / "runs" / "profiles" / "checkpoints" / "00000004")
    before = load_file(folder / "runs" / "profiles" / "snapshots" / "00000004.safetensors")
    run("train.py", "--resume", "runs/profiles", cwd=folder)
    after = load_file(folder / "runs" / "profiles" / "snapshots" / "00000004.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_submitted_training_runs(folder):
    flags = ("--cluster", "local", "--gpus", 0, "--wait", "true", "--overrides", "[--name, submitted]")
    done = run("scripts/launch_slurm.py", "--experiment", "tiny.yaml", *flags, cwd=folder)
    assert "it ended with status 0" in done.stdout
    assert (folder / "runs" / "submitted" / "checkpoints" / "00000004").is_dir()


def test_same_seed_same_images_whatever_batch_and_processes(folder):
    flags = ("sample.py", "--checkpoint", "runs/tiny", "--num_per_class", 2)
    run(*flags, "--output", "a.npz", "--batch_size", 4, cwd=folder)
    run(*flags, "--output", "b.npz", "--batch_size", 7, cwd=folder, processes=2)
    run(*flags, "--output", "c.npz", "--batch_size", 4, "--seed", 1, cwd=folder)
    a, b, c = (np.load(folder / f"{name}.npz") for name in "abc")
    assert a["arr_0"].shape == (20, 32, 32, 3)
    assert a["arr_1"].tolist() == [label for label in range(10) for _ in range(2)]
    assert np.abs(a["arr_0"].astype(int) - b["arr_0"]).max() <= 1
    assert np.abs(a["arr_0"].astype(int) - c["arr_0"]).max() > 10


def test_grid_folder_and_panel(folder):
    flags = ("sample.py", "--checkpoint", "runs/tiny/checkpoints/00000004", "--classes", "[star, 2]")
    run(*flags, "--output", "grid.png", "--panel", 3, cwd=folder)
    run(*flags, "--output", "images", "--num_per_class", 2, cwd=folder)
    for name in ("grid.png", "grid-panel.png"):
        with Image.open(folder / name) as picture:
            assert picture.width > 100
    names = sorted(path.relative_to(folder).as_posix() for path in (folder / "images").rglob("*.png"))
    assert names == [
        f"images/{name}/{number:06d}.png"
        for name, number in zip(["star", "star", "triangle", "triangle"], range(4), strict=True)
    ]


@pytest.fixture(scope="module")
def extractor(folder):
    """A TorchScript extractor: mean colours as features, soft classes of them."""

    class MeanColors(torch.nn.Module):
        def forward(self, images: torch.Tensor):
            means = images.float().mean(dim=(2, 3)) / 255
            return means, torch.softmax(4 * means, dim=1)

    path = folder / "colors.pt"
    from metrics.torchscript import save_torchscript

    save_torchscript(MeanColors(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8), path)
    return path


def scores(folder, name):
    return json.loads((folder / name).read_text())


def test_scores_carry_their_provenance(folder, extractor):
    done = run("evaluate.py", "--samples", "runs/tiny", "--extractor", extractor, "--num_samples", 10, cwd=folder)
    assert "frechet_distance[colors]" in done.stdout
    assert "not FID" in done.stdout
    record = scores(folder, "runs/tiny/scores.json")
    assert record["num_samples"] == 10
    assert record["samples"]["sampler"] == "ddpm"
    assert record["samples"]["step"] == 4
    assert len(record["extractor_sha256"]) == 64
    assert record["reference"]["source"] == "shapes"
    assert {"commit", "versions", "evaluation"} <= record.keys()
    assert record["scores"]["spatial_frechet_distance[colors]"]["value"] is None
    assert "Inception has" in record["scores"]["spatial_frechet_distance[colors]"]["reason"]
    assert (folder / "runs" / "tiny" / "scores.png").is_file()


def test_floor_and_ceiling_stand_beside_an_untrained_model(folder, extractor):
    flags = ("--extractor", extractor, "--num_samples", 20, "--output", "baselines.json", "--memorisation", "true")
    both = ("--baselines", "true", "--per_class", "true", "--labels", "reference")
    done = run("evaluate.py", "--samples", "runs/tiny", *flags, *both, cwd=folder)
    rows = {row["name"]: row["scores"] for row in scores(folder, "baselines.json")["rows"]}
    assert list(rows) == ["XSwin", "training images", "reconstructions"]
    model, floor, ceiling = (row["frechet_distance[colors]"]["value"] for row in rows.values())
    assert max(floor, ceiling) < model
    assert "| training images |" in done.stdout
    assert 0 <= scores(folder, "baselines.json")["memorisation"]["closer_to_training_than_held_out"] <= 1
    assert (folder / "baselines-nearest.png").is_file()
    classes = scores(folder, "baselines.json")["per_class"]
    assert len(classes) == 10
    assert all(score["reason"].startswith("too few images") for score in classes.values())


def test_processes_and_batches_do_not_change_a_score(folder, extractor):
    flags = ("evaluate.py", "--samples", "runs/tiny", "--extractor", extractor, "--num_samples", 96)
    run(*flags, "--batch_size", 32, "--output", "one.json", cwd=folder)
    run(*flags, "--batch_size", 48, "--output", "two.json", processes=2, cwd=folder)
    one, two = (scores(folder, f"{name}.json")["scores"] for name in ("one", "two"))
    for name, score in one.items():
        if score["value"] is None:
            assert two[name] == score
        else:
            assert two[name]["value"] == pytest.approx(score["value"], rel=1e-3, abs=1e-6), name


def test_trials_and_sweeps_are_rows_and_curves(folder, extractor):
    flags = (
        "--extractor",
        extractor,
        "--num_samples",
        12,
        "--output",
        "sweep.json",
        "--metrics",
        "[fid,precision,recall]",
    )
    run(
        *("evaluate.py", "--samples", "runs/tiny", *flags),
        *("--guidance_scale", "1,3", "--num_steps", "2", "--sampler", "ddim", "--trials", 2),
        cwd=folder,
    )
    rows = scores(folder, "sweep.json")["rows"]
    assert [row["samples"]["guidance_scale"] for row in rows] == [1.0, 3.0]
    assert [row["samples"]["num_steps"] for row in rows] == [2, 2]
    for row in rows:
        trials = [trial["frechet_distance[colors]"]["value"] for trial in row["trials"]]
        score = row["scores"]["frechet_distance[colors]"]
        assert trials[0] != trials[1]
        assert score["value"] == pytest.approx(np.mean(trials))
        assert score["std"] == pytest.approx(np.std(trials, ddof=1))
    assert (folder / "sweep-sweep.png").is_file()


def test_scores_during_training_are_those_of_evaluate(folder, extractor):
    flags = ("--evaluation.extractor", extractor, "--evaluation.num_samples", 12, "--log.evaluate_every", 4)
    run("train.py", "--config", "tiny.yaml", "--name", "scored", *flags, cwd=folder)
    logged = next(event for event in log(folder, "scored") if "frechet_distance[colors]" in event)
    run("evaluate.py", "--samples", "runs/scored", cwd=folder)
    found = scores(folder, "runs/scored/scores.json")["scores"]
    for name in ("frechet_distance[colors]", "precision", "kernel_distance[colors]"):
        assert logged[name] == pytest.approx(found[name]["value"], rel=1e-6), name


def test_references_are_written_read_and_reused(folder, extractor):
    flags = ("evaluate.py", "--samples", "runs/tiny", "--extractor", extractor, "--num_samples", 10)
    run(*flags, "--output", "a.json", "--write_reference", "reference.npz", cwd=folder)
    run(*flags, "--output", "b.json", "--reference", "reference.npz", cwd=folder)
    a, b = (scores(folder, f"{name}.json")["scores"] for name in ("a", "b"))
    assert a["frechet_distance[colors]"]["value"] == pytest.approx(b["frechet_distance[colors]"]["value"])
    assert a["precision"] == b["precision"]
    cached = list((folder / "cache" / "references").glob("shapes-*.safetensors"))
    assert cached
    before = [path.stat().st_mtime_ns for path in cached]
    run(*flags, "--output", "c.json", cwd=folder)
    assert [path.stat().st_mtime_ns for path in cached] == before


def test_an_npz_is_scored_and_the_self_check_passes(folder, extractor):
    run("sample.py", "--checkpoint", "runs/tiny", "--num_per_class", 1, "--output", "drawn.npz", cwd=folder)
    flags = ("--checkpoint", "runs/tiny", "--extractor", extractor, "--seed", 1)
    run("evaluate.py", "--samples", "drawn.npz", *flags, "--output", "drawn.json", cwd=folder)
    assert scores(folder, "drawn.json")["num_samples"] == 10
    done = run("evaluate.py", "--self_check", "true", "--extractor", extractor, cwd=folder)
    assert done.stdout.count("ok  ") == 8
    assert "never with published FID" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train.py", "--data.path", "nowhere"), "--data.path nowhere"),
        (("train.py", "--model", "XSwinn"), "did you mean XSwin"),
        (
            ("train.py", "--sampling.sampler", "dppm"),
            "--sampling.sampler dppm: unknown, choose from ddpm, ddim",
        ),
        (("train.py", "--data.image_size", "60"), "multiple of 8"),
        (("train.py", "--resume", "runs/none"), "--resume runs/none: nothing to resume"),
        (("train.py", "--config", "tiny.yaml"), "runs/tiny holds a run already: --resume runs/tiny"),
        (("sample.py", "--checkpoint", "runs/tiny", "--classes", "[sta]"), "--classes sta: no such class"),
        (("sample.py", "--checkpoint", "runs/none"), "--checkpoint runs/none does not exist"),
        (("evaluate.py", "--samples", "runs/tiny", "--extractor", "inception"), "--weights_path FILE"),
        (("evaluate.py", "--extractor", "colors.pt"), "--samples: give a run"),
        (("evaluate.py", "--samples", "runs/none", "--extractor", "colors.pt"), "runs/none does not exist"),
        (
            ("evaluate.py", "--samples", "runs/tiny", "--extractor", "colors.pt", "--guidance_scale", "1,two"),
            "--guidance_scale 1,two: give a number",
        ),
        (
            ("evaluate.py", "--samples", "runs/tiny", "--extractor", "colors.pt", "--metrics", "[fidd]"),
            "--metrics fidd",
        ),
        (
            (
                "evaluate.py",
                "--samples",
                "drawn.npz",
                "--checkpoint",
                "runs/tiny",
                "--extractor",
                "colors.pt",
                "--trials",
                2,
            ),
            "--trials 2: drawn.npz is a fixed set",
        ),
    ],
)
def test_mistakes_end_in_one_line(folder, extractor, arguments, message):
    done = run(*arguments, cwd=folder, check=False)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "error:" in last
    assert message in last
    assert "Traceback" not in done.stderr


def test_help_teaches_and_is_quick(folder):
    done = run("train.py", "--help", cwd=folder)
    assert "classifier-free" in done.stdout
    imported = subprocess.run(
        [sys.executable, "-c", "import sys, train; print('torch' in sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert imported.stdout.strip() == "False"


def test_unconditional_images_train_and_sample(folder):
    """A folder of images without class folders; asking for guidance then is a mistake, told in words."""
    (folder / "plain").mkdir()
    for number in range(10):
        Image.new("RGB", (16, 16), (20 * number, 90, 30)).save(folder / "plain" / f"{number}.png")
    flags = ("--data.path", "plain", "--data.image_size", 16, "--train.num_steps", 2, "--name", "plain")
    run("train.py", "--config", "tiny.yaml", "--autoencoder", "pixel", *flags, cwd=folder)
    run("sample.py", "--checkpoint", "runs/plain", "--num_per_class", 3, "--output", "plain.npz", cwd=folder)
    with np.load(folder / "plain.npz") as file:
        assert file["arr_0"].shape == (3, 16, 16, 3)
    guided = run("sample.py", "--checkpoint", "runs/plain", "--guidance_scale", 2.0, cwd=folder, check=False)
    assert guided.returncode == 2
    assert "--guidance_scale 2.0" in guided.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("kind", ["flow", "edm"])
def test_other_objectives_train_sample_and_guide_each_other(folder, kind):
    """With no sampler named, the process's own; guided away from an earlier checkpoint of the same run, or refused."""
    flags = ("--diffusion.kind", kind, "--name", kind, "--sampling.sampler", "null")
    run("train.py", "--config", "tiny.yaml", *flags, cwd=folder)
    assert all(math.isfinite(event["loss"]) for event in log(folder, kind) if "loss" in event)
    refined = ("--sampling.guidance_interval", "[0.1, 5]", "--sampling.guidance_parallel", 0.0)
    earlier = ("--sampling.guidance_checkpoint", f"runs/{kind}/checkpoints/00000002", "--guidance_scale", 2)
    flags = ("sample.py", "--checkpoint", f"runs/{kind}", "--num_per_class", 1, "--classes", "[0, 1]")
    run(*flags, *earlier, *refined, "--spacing", "karras", "--output", f"{kind}.npz", cwd=folder)
    with np.load(folder / f"{kind}.npz") as file:
        assert file["arr_0"].shape == (2, 32, 32, 3)
    other = run(*flags, "--sampling.guidance_checkpoint", "runs/tiny", cwd=folder, check=False)
    assert "--guidance_checkpoint runs/tiny: its kind is gaussian" in other.stderr.strip().splitlines()[-1]
