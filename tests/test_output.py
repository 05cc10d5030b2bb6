"""Outputs of sampling: complete files in their folder, one batch at a time, and the model's modes restored."""

import errno
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from exact import generator, labels, randn
from PIL import Image
from processes import ROOT, script
from torch import nn

from autoencoders.codec import AutoencoderError, PixelCodec
from diffusion import GaussianDiffusion, sample
from evaluation.sources import read_samples
from experiment.config import SamplingConfig
from machine.atomic_files import atomic_path, sha256_of, unused_path, write_atomic
from sampling import generation
from sampling.generation import Generator
from sampling.grids import LARGEST_PDF, check_size, grid_size, read_weights_hash, save_grid
from sampling.image_files import save_folder, save_npz
from sampling.labels import resolve_classes

SAMPLE = script("sample.py")
IMAGES = torch.randint(0, 256, (5, 3, 4, 6), dtype=torch.uint8, generator=generator())


def interrupted():
    yield IMAGES[:2]
    raise OSError("no space left")


def test_other_samples_of_that_name_are_kept(tmp_path, capsys):
    path = tmp_path / "x.npz"
    for images in (IMAGES, IMAGES, IMAGES.flip(0)):  # the same once more is no other file
        save_npz(iter(images.split(2)), torch.arange(5), [], path)
    (kept,) = tmp_path.glob("x.npz.before-*")
    for file, images in ((kept, IMAGES), (path, IMAGES.flip(0))):
        with np.load(file) as arrays:
            assert (arrays["arr_0"] == images.permute(0, 2, 3, 1).numpy()).all()
    assert f"{path}: what was there is now {kept}" in capsys.readouterr().out


def test_samples_that_come_into_a_folder_that_another_program_filled_are_kept_beside_its_own(tmp_path):
    def batches():
        yield IMAGES[:2]
        save_folder(iter([IMAGES[2:]]), ["theirs"] * 3, tmp_path / "images")

    save_folder(batches(), ["ours"] * 2, tmp_path / "images")
    (theirs,) = tmp_path.glob("images.before-*/theirs")
    assert [len([*folder.iterdir()]) for folder in (theirs, tmp_path / "images" / "ours")] == [3, 2]


def test_batches_become_an_npz_and_a_folder(tmp_path):
    save_npz(iter(IMAGES.split(2)), torch.arange(5), ["a"] * 5, tmp_path / "deep" / "x.npz")
    with np.load(tmp_path / "deep" / "x.npz") as file:
        assert np.array_equal(file["arr_0"], IMAGES.permute(0, 2, 3, 1).numpy())
        assert file["arr_1"].tolist() == [0, 1, 2, 3, 4]
        assert file["classes"].tolist() == ["a"] * 5
    save_npz(iter(IMAGES.split(2)), torch.zeros(5, dtype=torch.int64), [], tmp_path / "y.npz")
    with np.load(tmp_path / "y.npz") as file:
        assert file.files == ["arr_0"]  # zeros would be taken for labels
    save_folder(iter(IMAGES.split(2)), ["a", "a", "b/c", "b/c", "a"], tmp_path / "images")
    with Image.open(tmp_path / "images" / "b" / "c" / "000003.png") as image:
        assert np.array_equal(np.asarray(image), IMAGES[3].permute(1, 2, 0).numpy())


def test_scores_of_an_npz_say_which_weights_drew_it(tmp_path):
    """The zoo took what was recognised of another run's samples; a card went by the times of files."""
    path = tmp_path / "x.npz"
    save_npz([IMAGES[..., :4]], torch.arange(5), list("abcde"), path, "hash of the weights")
    *_, origin = script("scripts/recognise.py").read_samples(path, list("abcde"))
    assert origin == {"sha256": sha256_of(path), "weights_sha256": "hash of the weights"}
    assert read_samples(str(path), 4, None).provenance.items() >= origin.items()


def test_what_is_interrupted_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="no space"):
        save_npz(interrupted(), torch.arange(5), [], tmp_path / "x.npz")
    with pytest.raises(OSError, match="no space"):
        save_folder(interrupted(), ["a"] * 5, tmp_path / "images")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("named", [[], [".x.json.partial"]])
def test_a_full_disk_is_reported_with_the_file_that_did_not_fit(tmp_path, named):
    words = r"x\.json could not be written \(No space left on device\); make room"
    with pytest.raises(OSError, match=words), atomic_path(tmp_path / "x.json"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *named)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../../X", "..", "a/../../../X", "x\0y"])
def test_class_names_cannot_lead_out_of_the_output_folder(name, tmp_path):
    with pytest.raises(ValueError, match=r"--output: the name .* leads out of"):
        save_folder(iter(IMAGES.split(5)), ["a", "a", "a", "a", name], tmp_path / "in" / "images")
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    for names, why in [([".net"] * 5, "'.net' is hidden"), (["a/"] * 4 + ["a"], "the class 'a/' is that of 'a' too")]:
        with pytest.raises(ValueError, match=rf"--output .*: the folder of .*{why}; give FILE.npz"):
            save_folder(iter(IMAGES.split(5)), names, tmp_path / "images")  # which would be read back as another
    save_folder(iter(IMAGES.split(5)), ["/abs"] * 5, tmp_path / "images")
    assert (tmp_path / "images" / "abs" / "000000.png").is_file()


def test_a_grid_named_pdf_is_written_as_pdf(tmp_path):
    save_grid(IMAGES, tmp_path / "fig.pdf", columns=3)
    assert (tmp_path / "fig.pdf").read_bytes().startswith(b"%PDF")


def test_a_grid_is_as_large_as_told_and_a_pdf_takes_all_that_are_not_refused(tmp_path):
    names = {"captions": ["a"] * 5, "column_names": ["b"] * 3}
    save_grid(IMAGES, tmp_path / "named.png", columns=3, **names)
    with Image.open(tmp_path / "named.png") as picture:
        assert picture.size == grid_size(5, (4, 6), 3, **names) == (3 * 62 + 2, 2 * (40 + 12 + 2) + 14 + 2)
    size, num = (2, 64), (LARGEST_PDF - 2) // 66
    fits = torch.zeros(num, 3, *size, dtype=torch.uint8)
    check_size(tmp_path / "row.PDF", num, size, num)
    save_grid(fits, tmp_path / "row.pdf", columns=num)
    check_size(tmp_path / "row.png", num + 1, size, num + 1)
    with pytest.raises(ValueError, match=r"row.PDF: it would have 65540x6 pixels, and a PDF at most 65,500 a side"):
        check_size(tmp_path / "row.PDF", num + 1, size, num + 1)
    with pytest.raises(OSError, match="broken data stream"):
        save_grid(torch.cat([fits, fits[:1]]), tmp_path / "row.pdf", columns=num + 1)


def test_the_weights_of_a_large_grid_are_read(tmp_path, monkeypatch):
    """Pillow refuses to open pictures of 13,400 pixels a side, such as those of four samples of 1,000 classes."""
    save_grid(IMAGES, tmp_path / "grid.png", columns=3, weights="hash")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert read_weights_hash(tmp_path / "grid.png") == "hash"
    (tmp_path / "grid.png").write_text("no picture")
    assert read_weights_hash(tmp_path / "grid.png") is None


def test_a_failed_write_of_a_grid_keeps_the_old_file(tmp_path, monkeypatch):
    save_grid(IMAGES, tmp_path / "grid.png", columns=3)
    before = (tmp_path / "grid.png").read_bytes()

    def halfway(picture, fp, *_, **__):
        Path(fp).write_bytes(before[:20])
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", halfway)
    with pytest.raises(OSError, match="No space"):
        save_grid(IMAGES.flip(0), tmp_path / "grid.png", columns=3)
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]
    assert (tmp_path / "grid.png").read_bytes() == before


def check_output(path, **mode):
    SAMPLE.check_flags(SAMPLE.SampleConfig("runs/x", output=str(path), **mode))


@pytest.mark.parametrize("name", ["x.jpg", "x.PNGG", "deep/x.npy", "x.zip", "x.json"])
def test_output_names_with_an_unknown_suffix_are_refused(name, tmp_path):
    words = re.escape(f"--output {tmp_path / name}: give FILE.png or FILE.pdf for a grid")
    with pytest.raises(ValueError, match=words):
        check_output(tmp_path / name)
    (tmp_path / name).mkdir(parents=True)
    check_output(tmp_path / name)
    for path in ("x.png", "x.PDF", "x.npz", "folder", "v1.5"):
        check_output(tmp_path / path)
    for path in ("x.npz", "folder"):
        with pytest.raises(ValueError, match=f"--output .*{path}: --interpolate draws one picture"):
            check_output(tmp_path / path, interpolate=2)


def test_second_pictures_lie_where_nothing_takes_them_for_samples(tmp_path):
    paths = {"x.png": "x-panel.png", "x.pdf": "x-panel.pdf", "x.npz": "x-panel.png", "v1.5": "v1.5-panel.png"}
    for output, expected in paths.items():
        assert SAMPLE.second_output(tmp_path / output, "panel") == tmp_path / expected


def test_classes_are_found_by_names_however_they_are_written():
    composed, apart = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")
    assert resolve_classes([composed], ["x", apart]) == resolve_classes([apart], ["x", composed]) == [1]
    assert resolve_classes(["007", "7", "no"], ["7", "no", "007"]) == [2, 0, 1]
    assert resolve_classes(["2", 2], ["0", "1", "10", "2"]) == [3, 2]  # a name, and from Python a label
    with pytest.raises(ValueError, match="--classes 01: no such class"):
        resolve_classes(["01"], ["a", "b"])


def test_an_unconditional_model_has_no_class_to_ask_for():
    assert resolve_classes([], []) == [0]
    with pytest.raises(ValueError, match="--classes cat: the model has no classes; leave it out"):
        resolve_classes(["cat"], [])


# Modes.


class Dropping(nn.Module):
    num_classes = 2

    def __init__(self):
        super().__init__()
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm2d(1)

    def forward(self, x_t, t, y):
        return self.drop(self.norm(x_t))


def test_sampling_uses_eval_mode_and_restores_training_mode():
    diffusion, model = GaussianDiffusion(variance="fixed_small"), Dropping()
    model.norm.eval()  # on purpose, as frozen statistics are
    modes = [part.training for part in model.modules()]
    settings = {"sampler": "ddim", "num_steps": 3, "guidance_scale": 2.0}
    drawn = sample(diffusion, model, randn(2, 1, 4, 4), labels(2), **settings)
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(drawn, sample(diffusion, model.eval(), randn(2, 1, 4, 4), labels(2), **settings))
    with pytest.raises(ValueError, match=r"--sampling\.sampler x: unknown"):
        sample(diffusion, model.train(), randn(2, 1, 4, 4), labels(2), sampler="x")
    with pytest.raises(RuntimeError):
        sample(diffusion, model, randn(2, 3, 4, 4), labels(2))  # one channel is what it takes
    assert all(part.training for part in model.modules())


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    draw, train = re.findall(r"```python\n(.+?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(draw.replace("num_per_class=4", "num_per_class=1, num_steps=2"), found)
    assert found["images"].shape == (2, 3, 64, 64)
    exec(train.replace("(64,", "(4,").replace("num_steps=8", "num_steps=2"), found)
    assert (found["drawn"].shape, found["drawn"].dtype) == ((4, 3, 64, 64), torch.uint8)
    assert found["model"].training
    assert not any(tmp_path.iterdir())


def test_what_a_killed_draw_left_is_in_no_later_one(tmp_path):
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with subprocess.Popen([sys.executable, "-c", kill]) as killed:
        killed.wait()
    with atomic_path(tmp_path / "images") as partial:
        left_over = Path(str(partial).replace(f".{os.getpid()}.", f".{killed.pid}."))
        (left_over / "a").mkdir(parents=True)
        (left_over / "a" / "000004.png").touch()
        partial.mkdir()
    save_folder(iter([IMAGES[:2]]), ["b"] * 2, tmp_path / "images")
    found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    assert found == ["images/b/000000.png", "images/b/000001.png"]


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    with atomic_path(tmp_path / "x") as first, atomic_path(tmp_path / "x") as second:
        first.write_text("first")
        second.write_text("second")
        write_atomic(tmp_path / "x", "third")
        assert (first.read_text(), second.read_text()) == ("first", "second")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "first"


def generator_that(draw, num_images, **process):
    """A generator of a process, with another function to draw the images of some indices."""

    class Drawing(Generator):
        def draw(self, indices):
            return draw(indices)

    parts = nn.Identity(), GaussianDiffusion(), PixelCodec(), labels(num_images), SamplingConfig(num_steps=1)
    return Drawing(*parts, (1, 1), 0, Mock(spec=Accelerator, **process))


def test_an_error_of_one_sampling_process_is_raised_by_all(monkeypatch):
    """Otherwise the others would wait for it; an image that cannot be drawn does not end a training."""
    error = AutoencoderError("not finite")
    process = {"is_main_process": True, "num_processes": 2, "process_index": 0}
    sent = []
    monkeypatch.setattr(generation, "gather_object", lambda own: sent.extend(own) or [*own, error])
    with pytest.raises(AutoencoderError, match="not finite"):
        list(generation.stream(generator_that(lambda mine: IMAGES[mine], 4, **process), batch_size=2))
    assert sent == [None]

    def ruined(mine):
        raise error

    monkeypatch.setattr(generation, "gather_object", lambda own: sent.extend(own) or own)
    with pytest.raises(AutoencoderError, match="not finite"):
        list(generation.stream(generator_that(ruined, 4, **process), batch_size=2))
    assert sent[-1] is error


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_a_panel_shows_the_first_images_on_any_number_of_processes(monkeypatch, num_processes):
    """What the main process draws first, which is what panels record, are the first images, and the order is kept."""
    monkeypatch.setattr(generation, "gather_object", lambda own: own)
    shares = []
    for rank in range(num_processes):
        process = {"is_main_process": rank == 0, "num_processes": num_processes, "process_index": rank}
        shares.append([])
        drawing = generator_that(lambda mine: shares[-1].append(mine) or mine, 8, gather=lambda mine: mine, **process)
        list(generation.stream(drawing, batch_size=2))
    assert shares[0][0].tolist() == [0, 1]
    rounds = [torch.cat(parts) for parts in zip(*shares, strict=True)]
    size = 2 * num_processes
    expected = torch.arange(8).split(size)
    assert [part[: len(own)].tolist() for part, own in zip(rounds, expected, strict=True)] == [
        own.tolist() for own in expected
    ]


def test_backups_never_overwrite_one_another(tmp_path, monkeypatch):
    """The clock may show the same second twice, or go back an hour."""
    monkeypatch.setattr("time.strftime", lambda form: "20260101-000000")
    path = tmp_path / "log.jsonl"
    for text in "abc":
        path.write_text(text)
        path.rename(unused_path(path))
    assert sorted(kept.read_text() for kept in tmp_path.iterdir()) == ["a", "b", "c"]
