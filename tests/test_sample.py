"""sample.py as a user runs it."""

import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from processes import log, run, script
from tqdm import tqdm

from autoencoders.codec import PixelCodec
from checkpoints.checkpoint import open_checkpoint
from diffusion import GaussianDiffusion
from experiment.config import DataFlags, SamplingConfig
from machine.checkpoint_folder import CheckpointError, list_checkpoints
from models import create_model
from sampling.generation import Generator, generate
from sampling.grids import read_weights_hash

SAMPLE = script("sample.py")


def test_same_seed_same_images_whatever_batch_and_processes(folder):
    flags = ("sample.py", "--checkpoint", "runs/tiny", "--num_per_class", 2)
    run(*flags, "--output", "a.npz", "--batch_size", 4, cwd=folder)
    run(*flags, "--output", "b.npz", "--batch_size", 7, cwd=folder, processes=2)
    run(*flags, "--output", "c.npz", "--batch_size", 4, "--seed", 1, cwd=folder)
    a, b, c = (np.load(folder / f"{name}.npz") for name in "abc")
    assert a["arr_0"].shape == (20, 32, 32, 3)
    assert a["arr_1"].tolist() == [label for label in range(10) for _ in range(2)]
    assert a["classes"][:3].tolist() == ["circle", "square", "triangle"]
    assert np.abs(a["arr_0"].astype(int) - b["arr_0"]).max() <= 1
    assert np.abs(a["arr_0"].astype(int) - c["arr_0"]).max() > 10


def test_samples_are_of_the_weights_that_were_opened_whatever_a_training_does_meanwhile(folder, here, monkeypatch):
    """It deletes checkpoints, which lost the samples, and moves `checkpoints/best`, whose hash was then theirs."""
    steps = here / "run" / "checkpoints"
    shutil.copytree(folder / "runs" / "tiny" / "checkpoints", steps)
    best, (first, second) = steps / "best", list_checkpoints(steps)
    best.symlink_to(first.name)
    opened, denoise = open_checkpoint(best), Generator.denoise

    def denoise_while_training_goes_on(*arguments):
        best.unlink()
        best.symlink_to(second.name)
        shutil.rmtree(first)
        return denoise(*arguments)

    monkeypatch.setattr(Generator, "denoise", denoise_while_training_goes_on)
    SAMPLE.main(SAMPLE.SampleConfig(str(best), output="drawn.png", classes=["0"], num_per_class=1))
    assert read_weights_hash(Path("drawn.png")) == opened.weights_sha256
    with pytest.raises(CheckpointError, match="replaced while it was read"):
        opened.load_model()


@pytest.mark.parametrize(
    ("mode", "name"), [({}, "samples"), ({"interpolate": 2}, "interpolation"), ({"reconstruct": 500.0}, "reconstruct")]
)
def test_a_run_that_cannot_be_written_is_found_before_anything_is_drawn(folder, monkeypatch, mode, name):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(Generator, "denoise", None)
    with pytest.raises(ValueError, match=rf"--output runs/tiny/{name}\.png: nothing can be written in "):
        SAMPLE.main(SAMPLE.SampleConfig("runs/tiny", **mode))


GATHERED = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from autoencoders.codec import PixelCodec
from diffusion import GaussianDiffusion
from experiment.config import SamplingConfig
from machine.accelerator import open_accelerator
from models import create_model
from sampling.generation import Generator, generate

sent = 0

class Counting(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        global sent
        if operation.namespace == "c10d" and "gather" in operation.name():
            sent += sum(tensor.nbytes for tensor in args[1])
        return operation(*args, **(kwargs or {}))

class Ready(Generator):
    def draw(self, indices):
        return images[indices]

accelerator = open_accelerator("fp32")
for number in (64, 3, 1, 0):
    images = torch.randint(256, (number, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels, sampling = torch.zeros(number, dtype=torch.int64), SamplingConfig(num_steps=1)
    sent = 0
    with Counting():
        parts = torch.nn.Identity(), GaussianDiffusion(), PixelCodec()
        drawn = generate(Ready(*parts, labels, sampling, (64, 64), 0, accelerator), batch_size=8)
    assert torch.equal(drawn, images if accelerator.is_main_process else images[:0])
    if number == 64:
        assert 0 < 2 * sent < 1.5 * images.nbytes, sent
"""


def test_images_are_gathered_on_the_main_process_even_if_fewer_than_processes(tmp_path):
    (tmp_path / "gathered.py").write_text(GATHERED)
    run(tmp_path / "gathered.py", cwd=tmp_path, processes=2)


def test_two_processes_write_one_interpolation_and_keep_one_former_picture(folder):
    (folder / "between.png").write_text("of the user's")
    flags = ("--checkpoint", "runs/tiny", "--interpolate", 2, "--output", "between.png")
    written = run("sample.py", *flags, cwd=folder, processes=2).stdout
    assert written.count("2 images on the way: between.png") == 1
    (kept,) = folder.glob("between.png.before-*")
    assert kept.read_text() == "of the user's"


def test_the_progress_bar_moves_within_a_batch(monkeypatch):
    """Forty images of a large model are one batch, which takes minutes on a CPU."""
    seen: list[int] = []

    class Watched(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(self)

    class Slow(Generator):
        def draw(self, indices):
            for step in range(4):
                self.callback(step, torch.zeros(0), torch.zeros(0))
            return torch.zeros(len(indices), 3, 8, 8, dtype=torch.uint8)

    bars: list[Watched] = []
    monkeypatch.setattr("sampling.generation.tqdm", Watched)
    labels, sampling = torch.zeros(15, dtype=torch.int64), SamplingConfig(num_steps=4)
    settings = sampling, (8, 8), 0, Accelerator(cpu=True), lambda *_: seen.append(bars[0].n)
    parts = torch.nn.Identity(), GaussianDiffusion(), PixelCodec()
    assert len(generate(Slow(*parts, labels, *settings), batch_size=10)) == 15
    assert seen == [0, 2, 4, 6, 10, 11, 12, 13]
    assert bars[0].n == 15


def test_batches_of_small_models_are_large_on_gpus_and_decoded_in_parts(monkeypatch):
    """Decoding then does not set the peak of memory."""
    decoded = []

    class Watched(PixelCodec):
        def decode(self, x_0):
            decoded.append(len(x_0))
            return super().decode(x_0)

    labels, sampling = torch.zeros(130, dtype=torch.int64), SamplingConfig(num_steps=1)
    sizes = {"input_size": 4, "in_channels": 3, "out_channels": 6, "num_classes": 2}
    model = create_model("DiT", **sizes, dim=16, depth=1, num_heads=2).eval()
    here = Generator(model, GaussianDiffusion(), Watched(), labels, sampling, (4, 4), 0, Accelerator(cpu=True))
    images = generate(here, batch_size=130)
    assert decoded == [64, 64, 2]
    assert torch.equal(images[:3], generate(replace(here, labels=labels[:3]), batch_size=130))

    assert here.batch_size == 64
    monkeypatch.setattr(Accelerator, "device", torch.device("cuda"))
    assert here.batch_size == 512
    large = create_model("DiT", **{**sizes, "input_size": 64}, dim=384, depth=3, num_heads=6, patch_size=2)
    assert replace(here, model=large, image_size=(64, 64)).batch_size == 64


FOUND = """
from checkpoints import checkpoint as module
from checkpoints.warm_start import warm_start
from experiment.config import SamplingConfig
from machine.accelerator import open_accelerator
from sampling.checks import load_guide_model

accelerator = open_accelerator("fp32")
if not accelerator.is_main_process:
    module.list_checkpoints = lambda folder: []
checkpoint = module.open_checkpoint("runs/tiny", accelerator)
assert checkpoint.step == 4
assert "took" in warm_start(checkpoint.spec.build(), "runs/tiny", accelerator=accelerator)
told = checkpoint.config.diffusion, checkpoint.spec, accelerator, checkpoint.classes, checkpoint.identity
assert load_guide_model(SamplingConfig(guidance_checkpoint="runs/tiny"), *told) is not None
"""


def test_the_main_process_decides_which_checkpoint_is_the_newest(folder):
    (folder / "found.py").write_text(FOUND)
    run(folder / "found.py", cwd=folder, processes=2)


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


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"reconstruct": 0.5, "interpolate": 3},
            "--interpolate has no effect with --reconstruct: leave one of them out$",
        ),
        ({"reconstruct": 0.5, "panel": 2}, "--panel has no effect with --reconstruct"),
        ({"interpolate": 3, "num_per_class": 9}, "--num_per_class has no effect with --interpolate"),
        ({"to_seed": 3}, "--to_seed has no effect without --interpolate: leave it out, or add --interpolate$"),
        (
            {"data": DataFlags(path="images")},
            "--data has no effect without --reconstruct: leave it out, or add --reconstruct$",
        ),
    ],
)
def test_flags_without_effect_are_refused(settings, words):
    sample = script("sample.py")
    with pytest.raises(ValueError, match=words):
        sample.main(sample.SampleConfig("runs/none", **settings))


def test_unconditional_images_train_and_sample(folder):
    """The images have no class folders; asking for guidance is then an error in words."""
    (folder / "plain").mkdir()
    for number in range(10):
        Image.new("RGB", (16, 16), (20 * number, 90, 30)).save(folder / "plain" / f"{number}.png")
    flags = ("--data.path", "plain", "--data.image_size", 16, "--train.num_steps", 2, "--name", "plain")
    run("train.py", "--config", "tiny.yaml", "--autoencoder", "pixel", *flags, cwd=folder)
    with Image.open(folder / "runs" / "plain" / "samples" / "00000002.png") as grid:
        assert grid.size == (10 * 66 + 2, 4 * 66 + 2)  # forty samples, 16 pixels shown as 64
    run("sample.py", "--checkpoint", "runs/plain", "--num_per_class", 3, "--output", "plain.npz", cwd=folder)
    with np.load(folder / "plain.npz") as file:
        assert file["arr_0"].shape == (3, 16, 16, 3)
    guided = run("sample.py", "--checkpoint", "runs/plain", "--guidance_scale", 2.0, cwd=folder, check=False)
    assert guided.returncode == 2
    assert "--sampling.guidance_scale 2.0" in guided.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("kind", ["flow", "edm"])
def test_other_objectives_train_sample_and_guide_each_other(folder, kind):
    """Each with its diffusion's own sampler, guided by an earlier checkpoint of the same run, or refused."""
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


def test_pictures_of_somebody_else_are_kept(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    theirs = {name: f"{name} of the user's" for name in ("mine.png", "mine-panel.png", "way.pdf")}
    for name, text in theirs.items():
        (folder / name).write_text(text)
    sample = script("sample.py")
    samplings = [{"output": "mine.png", "num_per_class": 1, "panel": 2}, {"output": "way.pdf", "interpolate": 2}]
    for settings in samplings:
        sample.main(sample.SampleConfig("runs/tiny", precision="fp32", **settings))
    for name, text in theirs.items():
        (kept,) = folder.glob(f"{name}.before-*")
        assert kept.read_text() == text
    assert "mine.png: what was there is now mine.png.before-" in capsys.readouterr().out
    sample.main(sample.SampleConfig("runs/tiny", precision="fp32", **samplings[0]))  # the same again
    assert len([*folder.glob("mine*.png.before-*")]) == 2


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"panel": 3, "output": "x.pdf", "num_per_class": 1, "classes": ["0"]},
        {"interpolate": 9},
        {"reconstruct": 500.0},
    ],
)
def test_a_picture_too_large_for_a_pdf_is_refused_before_anything_is_drawn(folder, monkeypatch, settings):
    """The samples of hours were lost when they were written."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sampling.grids.LARGEST_PDF", 100)
    monkeypatch.setattr(Generator, "denoise", lambda *_: pytest.fail("drawn"))
    with pytest.raises(ValueError, match=r"--output \S+\.pdf: it would have \d+x\d+ pixels.*FILE.png, or fewer images"):
        SAMPLE.main(SAMPLE.SampleConfig("runs/tiny", **{"output": "large.pdf", "precision": "fp32"} | settings))
