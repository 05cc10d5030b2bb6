"""Pixel space as a user runs it: train.py, sample.py and scripts/recognise.py on small images with odd sides."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from processes import run, script, weights

from data import open_dataset
from metrics.perceptual import perceptual_network
from metrics.programs import class_names

PIXELS = {
    "model": "UNet-Mini",
    "model_args": {"channels": [8, 16], "down": ["R"], "middle_channels": [16], "middle": ["A"], "up": ["R"]},
    "autoencoder": "pixel",
    "data": {"path": "digits", "image_size": 9, "flip": False},
    "diffusion": {"schedule": "cosine", "variance": "fixed_small"},
    "train": {"num_steps": 3, "batch_size": 8},
    "sampling": {"num_steps": 3, "guidance_scale": 2.0},
    "log": {"every": 1, "validate_every": 2, "sample_every": 1, "checkpoint_every": 2, "trackers": []},
}


@pytest.fixture(scope="module")
def pixels(folder):
    """A finished run in pixel space on odd-sized images of two classes, with a learning rate that changes no weight."""
    rng = np.random.default_rng(0)
    for name in ("3", "7"):
        (folder / "digits" / name).mkdir(parents=True)
        for number in range(10):
            picture = rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)
            Image.fromarray(picture).save(folder / "digits" / name / f"{number}.png")
    (folder / "pixels.yaml").write_text(yaml.safe_dump(PIXELS))
    run("train.py", "--config", "pixels.yaml", "--name", "pixels", "--optim.lr", 1e-12, cwd=folder)
    return folder


def test_grids_of_a_run_start_from_the_same_noise(pixels):
    """As the weights never change, all grids are equal; progress.gif and progress.png contain all of them."""
    run_folder = pixels / "runs" / "pixels"
    grids = [path.read_bytes() for path in sorted((run_folder / "samples").glob("*.png"))]
    assert len(grids) == 3
    assert grids[0] == grids[1] == grids[2]
    with Image.open(run_folder / "samples" / "00000001.png") as grid:
        height = grid.height
    with Image.open(run_folder / "progress.gif") as moving, Image.open(run_folder / "progress.png") as still:
        assert moving.n_frames == 3
        assert still.height == 3 * height


def test_a_class_by_number_or_name(pixels):
    for asked, name in ((("--class", 1), "number"), (("--class=7",), "name")):
        run("sample.py", "--checkpoint", "runs/pixels", *asked, "--output", f"{name}.npz", cwd=pixels)
        with np.load(pixels / f"{name}.npz") as file:
            assert file["arr_1"].tolist() == [1] * 4


def test_held_out_images_are_noised_and_denoised(pixels):
    flags = ("sample.py", "--checkpoint", "runs/pixels", "--reconstruct", 500)
    shutil.move(pixels / "digits", pixels / "moved")
    assert "--data.path digits: is neither a folder nor a file" in run(*flags, cwd=pixels, check=False).stderr
    done = run(*flags, "--data.path", "moved", cwd=pixels)
    shutil.move(pixels / "moved", pixels / "digits")
    assert "4 held-out images, noised and denoised: runs/pixels/reconstruct.png" in done.stdout
    with Image.open(pixels / "runs" / "pixels" / "reconstruct.png") as picture:
        assert picture.width == 12 * (9 * 7 + 2) + 2
    done = run(*flags, "--output", "folder", cwd=pixels, check=False)
    assert "--output folder: --reconstruct draws one picture; give FILE.png or FILE.pdf" in done.stderr


def test_labelled_folders_train_an_unconditional_model(pixels):
    flags = ("--data.use_labels", "false", "--name", "unconditional", "--log.sample_every", 0)
    done = run("train.py", "--config", "pixels.yaml", *flags, cwd=pixels)
    assert "16 images, 0 classes" in done.stdout
    names = weights(pixels, "unconditional", step=3)
    assert not any("label" in name for name in names)
    run("sample.py", "--checkpoint", "runs/unconditional", "--reconstruct", 100, cwd=pixels)


def test_samples_of_the_wrong_class_are_not_recognised(folder):
    """Real shapes, half of them with a wrong label: half are recognised, up to the classifier's accuracy."""
    shapes = open_dataset("shapes", split="test", image_size=32, num_images=500)
    images = np.stack([shapes[i][0].permute(1, 2, 0).numpy() for i in range(100)])
    labels = shapes.labels[:100].numpy()
    asked = np.where(np.arange(100) < 50, labels, (labels + 1) % 10)
    np.savez(folder / "half.npz", arr_0=images, arr_1=9 - asked, classes=shapes.classes[::-1])  # labels go by name
    flags = ("--data.num_images", 500, "--data.image_size", 32, "--epochs", 10, "--width", 16)
    command = ("scripts/recognise.py", "--samples", "half.npz", *flags)
    files = ("--output", "recognised.json", "--classifier", "shapes.pt2", "--perceptual", "features.pt2")
    done = run(*command, *files, cwd=folder)
    found = json.loads((folder / "recognised.json").read_text())
    assert found["held_out_accuracy"] > 0.9
    assert found["class_agreement"] == pytest.approx(0.5, abs=0.05)
    assert set(found["per_class"]) == set(shapes.classes)
    assert found["classes_shown"] > 9  # held-out images, which show all ten equally often
    assert found["confidence"] == pytest.approx(found["held_out_confidence"])
    assert f"confidence is {found['confidence']:.2f} on 100 samples" in done.stdout
    assert "on 100 held-out images; always guessing the most frequent class would give 10.00%" in done.stdout
    assert done.stdout.splitlines()[1:3] == ["saved: shapes.pt2", "saved: features.pt2"]
    assert class_names(folder / "shapes.pt2") == shapes.classes
    # Its stages look at images of any size, and lead gradients back to them.
    image = torch.zeros(2, 3, 20, 24, requires_grad=True)
    features = perceptual_network(str(folder / "features.pt2"))(image)
    assert (features.ndim, len(features)) == (2, 2)
    features.sum().backward()
    assert image.grad is not None
    assert image.grad.abs().sum() > 0


def test_how_sure_a_classifier_is_and_how_many_classes_it_names():
    """Two of four classes, one of them three times as often: exp(H(3/4, 1/4))."""
    probabilities = torch.tensor([[0.7, 0.3, 0, 0], [0.5, 0.3, 0.2, 0], [1, 0, 0, 0], [0.1, 0.6, 0.2, 0.1]])
    sure, shown = script("scripts/recognise.py").sureness(probabilities)
    assert sure == pytest.approx(0.7)
    assert shown == pytest.approx(4 / 3**0.75)


def test_samples_without_labels_have_a_confidence_alone(folder):
    np.savez(folder / "unlabelled.npz", arr_0=np.full((3, 16, 16, 3), 200, np.uint8))
    flags = ("--data.num_images", 60, "--data.image_size", 16, "--epochs", 1, "--width", 2, "--side", 16)
    done = run("scripts/recognise.py", "--samples", "unlabelled.npz", *flags, "--output", "sure.json", cwd=folder)
    found = json.loads((folder / "sure.json").read_text())
    assert "class_agreement" not in found
    assert found["classes_shown"] == pytest.approx(1)  # three times the same
    assert "they cover 1.0 and" in done.stdout


def test_few_images_are_seen_more_than_four_times():
    default_epochs = script("scripts/recognise.py").default_epochs
    assert [default_epochs(num_images) for num_images in (1, 160, 1984, 60000)] == [125, 42, 5, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to do: give --samples NPZ, or --classifier FILE or --output JSON"),
        (("--samples", "tiny.yaml"), "--samples tiny.yaml: not a whole npz file"),
        (("--samples", "half.npz", "--data.use_labels", "false"), "--data.path shapes: its classes are none"),
        (("--samples", "half.npz"), "--samples half.npz: 8 pixels wide, not 64; give --data.image_size 8"),
    ],
)
def test_what_cannot_be_recognised_is_told(folder, arguments, message):
    np.savez(folder / "half.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8), arr_1=np.arange(2))
    done = run("scripts/recognise.py", *arguments, cwd=folder, check=False)
    assert done.returncode == 2
    assert message in done.stderr.strip().splitlines()[-1]


def test_labels_of_unnamed_classes_are_said_to_be_numbers(here, capsys):
    """ADM's format has none, and the data may have its classes in another order."""
    np.savez("x.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8), arr_1=np.array([1, 0]))
    _, labels, origin = script("scripts/recognise.py").read_samples(Path("x.npz"), ["cat", "dog"])
    assert labels.tolist() == [1, 0]
    assert origin["classes"] == "none are named: labels number those of the images"
    said = "--samples x.npz: it names no classes; its labels are taken to number cat, dog\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("wrong", [{"arr_0": np.zeros((2, 8, 8, 3))}, {"arr_1": np.array([0, -1])}])
def test_samples_in_other_units_and_negative_labels_are_refused(tmp_path, wrong):
    np.savez(tmp_path / "x.npz", **{"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "arr_1": np.arange(2), **wrong})
    with pytest.raises(ValueError, match=r"not uint8 \[n h w 3\]|no label of each image from 0 on"):
        script("scripts/recognise.py").read_samples(tmp_path / "x.npz", ["a", "b"])
