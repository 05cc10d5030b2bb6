"""train.py as a user runs it: interrupted, resumed, on one process and several."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from processes import IN_FILES, ROOT, SHARDED, TINY, assert_same_training, log, run, unmeasured, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_alignment import edges


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


def test_trackers_show_losses_and_samples_without_a_network(folder):
    trackers = ("--log.trackers", "[tensorboard, wandb]", "--log.sample_every", 2, "--name", "tracked")
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(folder)}
    run("train.py", "--config", "tiny.yaml", *trackers, cwd=folder, **offline)
    board = EventAccumulator(str(folder / "runs" / "tracked" / "tracking")).Reload()
    logged = [event["loss"] for event in log(folder, "tracked") if "loss" in event]
    assert [scalar.value for scalar in board.Scalars("loss")] == pytest.approx(logged)
    assert [picture.step for picture in board.Images("samples")] == [2, 4]
    (written,) = (folder / "wandb").glob("offline-run-*")
    assert next(written.glob("*.wandb")).stat().st_size > 1000
    assert len(list(written.rglob("samples*.png"))) == 2


RUINED = """
from experiment.registry import register

@register("sampler", "ruined")
def ruined(chain, x_t):
    yield x_t * float("nan"), x_t * float("nan")
"""


def test_a_training_that_draws_nothing_names_no_picture(folder):
    (folder / "ruined.py").write_text(RUINED)
    flags = ("--name", "ruined", "--imports", "ruined.py", "--sampling.sampler", "ruined", "--train.num_steps", 1)
    told = run("train.py", "--config", "tiny.yaml", *flags, cwd=folder).stdout
    assert "step 1: nothing to draw: images are not finite" in told
    assert "samples:" not in told


def test_weights_move_and_the_average_follows(folder):
    ema, model = weights(folder, "tiny"), weights(folder, "tiny", file="state/model.safetensors")
    assert ema.keys() == model.keys()
    assert any(not torch.equal(ema[name], model[name]) for name in ema)


def test_resumed_equals_uninterrupted_bitwise(folder):
    shutil.copytree(folder / "runs" / "tiny", folder / "runs" / "cut")
    shutil.rmtree(folder / "runs" / "cut" / "checkpoints" / "00000004")
    run("train.py", "--resume", "runs/cut", cwd=folder)
    assert_same_training(folder, "tiny", "cut")
    losses = [[e["loss"] for e in log(folder, name) if "loss" in e] for name in ("tiny", "cut")]
    assert losses[0] == losses[1]


def test_latents_left_in_their_files_train_the_same_model_bitwise(folder):
    (folder / "in_files.py").write_text(IN_FILES)
    run(folder / "in_files.py", "--config", "tiny.yaml", "--name", "in_files", cwd=folder)
    assert unmeasured(folder, "in_files") == unmeasured(folder, "tiny")
    assert_same_training(folder, "tiny", "in_files")


def test_stopping_and_resuming_anywhere_loses_nothing(folder):
    """The time runs out after every step: exit status 75; a damaged checkpoint is skipped; the log is the same."""
    common = ("train.py", "--config", "tiny.yaml", "--log.checkpoint_every", 1, "--log.every", 3, "--name")
    straight, flags = (*common, "straight"), (*common, "stopped")
    run(*straight, cwd=folder)
    stopped = run(*flags, "--train.max_hours", 1e-9, "--resume", "auto", cwd=folder, check=False)
    assert stopped.returncode == 75
    assert "stopped after 1 of 4 steps; continue with --resume runs/stopped" in stopped.stdout
    again = run(*flags, "--train.max_hours", 1e-9, "--resume", "auto", cwd=folder, check=False)
    assert "stopped after 2 of 4 steps" in again.stdout
    newest = folder / "runs" / "stopped" / "checkpoints" / "00000002" / "ema.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    last = run("train.py", "--resume", "runs/stopped", "--train.max_hours", 1, cwd=folder)
    assert "00000002 is damaged: ema.safetensors has another checksum; going back" in last.stdout
    assert unmeasured(folder, "stopped") == unmeasured(folder, "straight")
    assert_same_training(folder, "straight", "stopped")
    assert (folder / "runs" / "stopped" / "loss.png").is_file()


def test_other_classes_start_from_what_fits(folder):
    flags = ("--init_from", "runs/tiny", "--name", "warm", "--train.num_steps", 1, "--optim.lr", 1e-30)
    (folder / "two").mkdir()
    for name in ("a", "b"):
        (folder / "two" / name).mkdir()
        for number in range(5):
            Image.new("RGB", (32, 32), (20 * number, 90, 30)).save(folder / "two" / name / f"{number}.png")
    done = run("train.py", "--config", "tiny.yaml", "--data.path", "two", *flags, cwd=folder)
    assert "; 0 of 2 classes keep their label embeddings" in done.stdout
    before, after = weights(folder, "tiny"), weights(folder, "warm", step=1, file="state/model.safetensors")
    assert torch.equal(before["patch.weight"], after["patch.weight"])
    assert torch.equal(before["cond.label.weight"][-1], after["cond.label.weight"][-1])  # the null label


EQUAL = {
    "XSwin": {**TINY["model_args"], "drop_path": 0.0},  # whose masks each process draws for itself
    "DiT": {"dim": 16, "depth": 2, "num_heads": 2},
    "UViT": {"dim": 16, "depth": 3, "num_heads": 2},
}
OBJECTIVES = {
    "gaussian": {},
    "contrastive": {"kind": "flow", "contrast": 0.05},
    "meanflow": {"kind": "meanflow", "omega": 0.5, "kappa": 0.5},
    "shortcut": {"kind": "shortcut", "guidance_scale": 2.0},
    "any guidance": {"kind": "meanflow", "guidance_max": 4.0},
}
PAIRS = [
    ("XSwin", "gaussian"),
    ("UViT", "contrastive"),
    ("DiT", "meanflow"),
    ("UViT", "shortcut"),
    ("DiT", "any guidance"),
]


@pytest.mark.parametrize(("model", "objective"), PAIRS)
def test_two_processes_and_micro_batches_equal_one(folder, model, objective):
    """Six steps, the last of them in a second epoch, at the same global batch and seed."""
    settings = {**TINY, "model": model, "model_args": EQUAL[model], "diffusion": OBJECTIVES[objective], "name": None}
    settings["train"] = {**TINY["train"], "num_steps": 6, "class_balanced": model == "DiT"}
    settings["log"] = {"every": 1, "validate_every": 0, "trackers": []}
    settings["sampling"] = {**TINY["sampling"], "num_steps": 1}
    settings["alignment"] = {"extractor": edges(folder / "edges.pt"), "weight": 0.02}
    prefix = f"{model}-{objective}".replace(" ", "-")
    (folder / f"{prefix}.yaml").write_text(yaml.safe_dump(settings))
    flags = ("train.py", "--config", f"{prefix}.yaml", "--name")
    run(*flags, f"{prefix}-one", cwd=folder)
    run(*flags, f"{prefix}-two", cwd=folder, processes=2)
    run(*flags, f"{prefix}-micro", "--train.grad_accumulation", 2, cwd=folder)
    one = [event["loss"] for event in log(folder, f"{prefix}-one")]
    assert len(one) == 6
    for name in ("two", "micro"):
        assert np.allclose(one, [event["loss"] for event in log(folder, f"{prefix}-{name}")], rtol=1e-5), name
        ours, theirs = weights(folder, f"{prefix}-one", step=6), weights(folder, f"{prefix}-{name}", step=6)
        # Adam turns rounding into whole steps where a gradient is all rounding: hence norms over all weights.
        gap = sum((ours[key].double() - theirs[key].double()).square().sum() for key in ours).sqrt()
        assert gap < 1e-3 * sum(ours[key].double().square().sum() for key in ours).sqrt(), name


def test_a_sharded_training_equals_one_process_and_resumes_anywhere(folder):
    """FSDP2 as in configs/accelerate/fsdp2.yaml: two processes with a part of the model each, and recomputed blocks."""
    sharded = {"cwd": folder, **SHARDED}
    small = {**EQUAL["XSwin"], "depths": [1], "num_heads": [2]}  # torch plans its work on shards per parameter
    settings = {**TINY, "model_args": small, "train": {**TINY["train"], "ema_profiles": [0.1]}}
    settings["alignment"] = {"extractor": edges(folder / "edges.pt"), "weight": 0.02}
    settings["log"] = {"every": 1, "validate_every": 2, "sample_every": 3, "checkpoint_every": 2, "trackers": []}
    settings["sampling"] = {**TINY["sampling"], "num_steps": 1}
    (folder / "sharded.yaml").write_text(yaml.safe_dump(settings))
    state = ("model", "heads", "optimizer", "heads_optimizer", "profiles")
    files = ("ema.safetensors", *(f"state/{name}.safetensors" for name in state))

    def same(name, atol):
        ours = [event for event in log(folder, "whole") if "loss" in event]
        theirs = [event for event in log(folder, name) if "loss" in event]
        for key in ("loss", "gradient_norm", "ema_drift"):
            assert np.allclose([event[key] for event in ours], [event[key] for event in theirs], rtol=1e-5), key
        for file in files:
            ours, theirs = weights(folder, "whole", file=file), weights(folder, name, file=file)
            assert ours.keys() == theirs.keys()
            assert all(torch.allclose(ours[key], theirs[key], atol=atol) for key in ours), file
        return [weights(folder, name, file=file) for file in files]

    run("train.py", "--config", "sharded.yaml", "--name", "whole", cwd=folder)
    flags = ("--config", "sharded.yaml", "--train.recompute", "true", "--name", "sharded")
    done = run("tests/fsdp_on_cpus.py", ROOT / "train.py", *flags, **sharded)
    assert "2 x cpu:0, each with a part of the model" in done.stdout
    straight = same("sharded", atol=1e-3)

    # On the same processes bitwise; on one, from the sharded run's checkpoint, to rounding.
    shutil.copytree(folder / "runs" / "sharded", folder / "runs" / "gathered")
    for name in ("sharded", "gathered"):
        shutil.rmtree(folder / "runs" / name / "checkpoints" / "00000004")
    run("tests/fsdp_on_cpus.py", ROOT / "train.py", "--resume", "runs/sharded", **sharded)
    resumed = same("sharded", atol=1e-3)
    for before, after in zip(straight, resumed, strict=True):
        assert all(torch.equal(before[key], after[key]) for key in before)
    run("train.py", "--resume", "runs/gathered", cwd=folder)
    same("gathered", atol=1e-3)

    # Stochastic depth draws its masks again as they were: moments, so gradients, are bitwise those without.
    flags = ("tests/fsdp_on_cpus.py", ROOT / "train.py", "--config", "sharded.yaml", "--model_args.drop_path", 0.5)
    flags += ("--sampling.guidance_scale", 1, "--alignment.extractor", "null", "--train.ema_profiles", "[]")
    for answer in ("true", "false"):
        run(*flags, "--train.num_steps", 1, "--train.recompute", answer, "--name", answer, **sharded)
    kept, again = (weights(folder, name, 1, "state/optimizer.safetensors") for name in ("false", "true"))
    assert all(torch.equal(kept[key], again[key]) for key in kept)
    refused = run(*flags, "--name", "no", **{**sharded, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, check=False)
    assert "fsdp_activation_checkpointing: stochastic depth and dropout" in refused.stderr


def test_killed_and_resumed_trainings_end_bitwise_equal(folder):
    """A short soak; docs/reliability.md has the results of a long one."""
    done = run("tests/soak.py", "--kills", 1, "--num_steps", 6, "--pixels", "true", cwd=folder, FORKS="true")
    assert "1 kills" in done.stdout
    assert "equal bitwise" in done.stdout


def test_several_cpu_processes_warn_of_batch_norms_and_dropout_masks(folder):
    flags = ("--model_args.conv_norm", "batch", "--train.num_steps", 1, "--name", "batchnorm")
    done = run("train.py", "--config", "tiny.yaml", *flags, "--train.grad_accumulation", 2, cwd=folder, processes=2)
    assert done.stdout.count("Batch norm statistics are per micro-batch") == 1
    assert done.stdout.count("batch norm statistics are per process") == 1
    assert done.stdout.count("The random masks of stochastic depth and dropout") == 1


def test_help_explains_guidance_and_ends_with_examples(folder):
    done = run("train.py", "--help", cwd=folder)
    assert "classifier-free" in done.stdout
    assert done.stdout.endswith("python train.py --resume runs/own-images\n")


HELP = """
import contextlib, io, runpy, sys
wrong, *programs = sys.argv[1:]
for command in ([wrong, "--model", "XSwim"], *([program, "--help"] for program in programs)):
    sys.argv[:] = command
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        runpy.run_path(command[0], run_name="__main__")
    assert "torch" not in sys.modules, command
"""


def test_no_help_and_no_misspelt_model_waits_for_torch():
    programs = [*ROOT.glob("*.py"), *(path for path in ROOT.glob("scripts/*.py") if path.name != "published.py")]
    command = [sys.executable, "-c", HELP, str(ROOT / "train.py"), *map(str, programs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    assert done.stderr.startswith("train.py: error: --model XSwim: unknown; did you mean XSwin")
