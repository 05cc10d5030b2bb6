"""The programs on a device that refuses what GPUs refuse (tests/pretend.py), with the numbers of the CPU."""

import json
import shutil

import pytest
import torch
import yaml
from processes import TINY, log, run
from test_backbones import SMALL

from metrics.torchscript import save_torchscript
from models import BACKBONES


def there(*arguments, cwd):
    """How often each file waited for the device."""
    done = run("tests/pretend.py", *arguments, cwd=cwd, ACCELERATE_USE_CPU="false")
    return json.loads(done.stdout.splitlines()[-1])


def losses(folder, name):
    return {line["step"]: line["loss"] for line in log(folder, name) if "loss" in line}


NOW_AND_THEN = {"meter", "validation", "ema", "sharding"}  # lines of the log, checkpoints
ONCE = {"experiment/build.py", "models/autoencoder.py", "experiment/generation.py"}  # encoding, samples that are there


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    return folder, there("train.py", "--config", "tiny.yaml", cwd=folder)


@pytest.mark.xdist_group("elsewhere")
def test_training_is_that_of_the_cpu_and_waits_once_a_step(trained, folder):
    elsewhere, waits = trained
    for ours, theirs in zip(log(elsewhere, "tiny"), log(folder, "tiny"), strict=True):
        assert ours.keys() == theirs.keys()
        for name in {"loss", "gradient_norm", "validation_loss"} & ours.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
    assert waits.pop("experiment/guard.py") == TINY["train"]["num_steps"]
    assert set(waits) <= ONCE | {f"experiment/{name}.py" for name in NOW_AND_THEN}


@pytest.mark.xdist_group("elsewhere")
def test_samples_and_scores_are_those_of_the_cpu(trained, tmp_path):
    class MeanColors(torch.nn.Module):
        def forward(self, images: torch.Tensor):
            means = images.float().mean(dim=(2, 3)) / 255
            return means, torch.softmax(4 * means, dim=1)

    save_torchscript(MeanColors(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8), tmp_path / "colors.pt")
    flags = ("--samples", trained[0] / "runs/tiny", "--extractor", tmp_path / "colors.pt", "--num_samples", 20)
    flags += ("--sampler", "ddpm,ddim,heun,dpmpp_2m_sde,unipc", "--num_steps", 3, "--guidance_scale", 2)
    flags += ("--sampling.guidance_interval", "[0, 50]")
    waits = there("evaluate.py", *flags, "--output", "ours.json", cwd=tmp_path)
    assert not [name for name in waits if name.startswith("diffusion/")]
    run("evaluate.py", *flags, "--output", "theirs.json", cwd=tmp_path)
    ours, theirs = (json.loads((tmp_path / name).read_text()) for name in ("ours.json", "theirs.json"))
    for one, other in zip(ours["rows"], theirs["rows"], strict=True):
        name = "frechet_distance[colors]"
        assert one["scores"][name]["value"] == pytest.approx(other["scores"][name]["value"], rel=1e-3)


def test_it_refuses_what_a_gpu_refuses(tmp_path):
    (tmp_path / "mixed.py").write_text("import torch\ntorch.ones(2, device='pretend') + torch.ones(2)\n")
    done = run("tests/pretend.py", tmp_path / "mixed.py", cwd=tmp_path, check=False)
    assert "tensors of two devices" in done.stderr


def test_a_run_of_the_cpu_goes_on_elsewhere_as_it_would_there(folder, tmp_path):
    shutil.copytree(folder / "runs/tiny", tmp_path / "runs/tiny")
    shutil.copytree(folder / "runs/tiny", tmp_path / "cpu/runs/tiny")
    there("train.py", "--resume", "runs/tiny", "--train.num_steps", 6, cwd=tmp_path)
    run("train.py", "--resume", "runs/tiny", "--train.num_steps", 6, cwd=tmp_path / "cpu")
    found = losses(tmp_path, "tiny")
    assert found == pytest.approx(losses(tmp_path / "cpu", "tiny"), rel=1e-5)
    assert max(found) == 6


VARIANTS = {
    "flow": {"model": "DiT-S/2", "diffusion": {"kind": "flow", "times": "logit_normal"}},
    "EDM": {"model": "UViT-tokens-S/2", "diffusion": {"kind": "edm"}},
    "importance": {"model": "USwin", "diffusion": {"times": "importance"}},
    "pixels": {
        "model": "UNet-Mini",
        "autoencoder": "pixel",
        "data": {**TINY["data"], "image_size": 16},
        "auxiliary": [{"kind": "feature_matching", "weight": 0.1}],
    },
    "cascade": {"model": "Cascade", "autoencoder": "pixel", "diffusion": {"kind": "cascade", "num_timesteps": 25}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_other_objectives_backbones_and_spaces_train_there(name, tmp_path):
    sizes = SMALL[BACKBONES[VARIANTS[name]["model"]][0].__name__]
    config = {**TINY, "sampling": {"num_steps": 2}, "train": {**TINY["train"], "num_steps": 3}}
    config |= {**VARIANTS[name], "model_args": {key: _plain(value) for key, value in sizes.items()}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    there("train.py", "--config", "tiny.yaml", cwd=tmp_path)
    assert len(losses(tmp_path, "tiny")) == 3


def test_an_autoencoder_is_trained_as_on_the_cpu(tmp_path):
    flags = ("--data.path", "shapes", "--data.num_images", 40, "--data.image_size", 32, "--train.num_steps", 4)
    flags += ("--train.batch_size", 4, "--architecture.channels", "[8, 16]", "--architecture.norm_groups", 4)
    flags += ("--loss.perceptual", "null", "--discriminator.weight", 0.1, "--discriminator.start", 2)
    flags += ("--log.every", 1)
    there("scripts/train_autoencoder.py", *flags, "--name", "ours", cwd=tmp_path)
    run("scripts/train_autoencoder.py", *flags, "--name", "theirs", cwd=tmp_path)
    assert losses(tmp_path, "ours") == pytest.approx(losses(tmp_path, "theirs"), rel=1e-4)


def _plain(value):
    """Tuples as lists, for YAML."""
    return [_plain(part) for part in value] if isinstance(value, tuple) else value
