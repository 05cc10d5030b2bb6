"""Checkpoints that are damaged, malformed, of another model or of other data are refused in words."""

import shutil

import pytest
import torch
from safetensors.torch import save_file
from saved_checkpoints import IDENTITY, objects, save_trained, state

from checkpoints.checkpoint import open_checkpoint, read_metadata, read_tensors, save_tensors
from checkpoints.training_state import resume
from checkpoints.warm_start import warm_start
from machine.checkpoint_folder import (
    CheckpointError,
    checkpoint_to_resume,
)
from models import ModelSpec


@pytest.fixture
def saved(tmp_path):
    return save_trained(tmp_path)


def flipped(path, where):
    """Change one byte of the first tensor, or of the classes in the metadata."""
    content = bytearray(path.read_bytes())
    start = content.index(b'"classes":"[') + 14 if where == "metadata" else 8 + int.from_bytes(content[:8], "little")
    content[start] ^= 1
    path.unlink()  # of snapshots there is a second name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("where", ["weights", "metadata"])
@pytest.mark.parametrize(
    "read",
    [
        lambda path: open_checkpoint(path).load_model(),
        lambda path: open_checkpoint(shutil.copy(path, path.parent / "lone.safetensors")).load_model(),
        lambda path: warm_start(objects()[0], str(path)),
        lambda path: resume(path.parent, state(*objects())),
        read_tensors,
    ],
)
def test_every_reader_finds_a_flipped_bit(saved, where, read):
    folder, _ = saved
    with pytest.raises(CheckpointError, match=rf"its {where} have another checksum"):
        read(flipped(folder / "ema.safetensors", where))


def test_checkpoints_from_before_they_had_checksums_still_load(saved):
    folder, (_, ema, _) = saved
    path = folder / "ema.safetensors"
    names = ("config", "spec", "classes", "step", "commit")
    save_file(read_tensors(path), path, metadata={name: read_metadata(path)[name] for name in names})
    checkpoint = open_checkpoint(path)
    assert torch.equal(checkpoint.load_model().patch.weight, ema.model.patch.weight)
    checkpoint.check_identity(train={"split": "any", "classes": ["a", "b", "c"]})
    with pytest.raises(CheckpointError, match=r"--data.path: .* another train, whose classes was"):
        checkpoint.check_identity(train={"classes": ["a", "b", "z"]})


@pytest.mark.parametrize(
    ("part", "other", "flag"),
    [("codec", {"sha256": "d"}, "--autoencoder"), ("test", {"split": "test-2"}, "--data.path")],
)
def test_other_data_and_autoencoders_are_told_by_their_content(saved, part, other, flag):
    checkpoint = open_checkpoint(saved[0])
    checkpoint.check_identity(**IDENTITY | {"train": {"source": "moved.zip", "split": "train-1"}})
    with pytest.raises(CheckpointError, match=f"{flag}: .* was trained with another {part}, whose"):
        checkpoint.check_identity(**{part: other})


@pytest.mark.parametrize(
    "metadata",
    [{"spec": "{}"}, {"spec": "[]"}, {"classes": "{"}, {"classes": '["a"]'}, {"step": "one"}, {"config": '{"x": 1}'}],
)
def test_malformed_metadata_are_told(saved, metadata):
    path = saved[0] / "ema.safetensors"
    save_tensors(read_tensors(path), path, read_metadata(path) | metadata)
    with pytest.raises(CheckpointError, match="its metadata are malformed"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nowhere", "does not exist; give a run's folder"),
        (lambda folder: folder, "holds no checkpoint"),
        (lambda folder: _foreign(folder), "not written by train.py"),
        (lambda folder: _text(folder), "cut short or not a safetensors file"),
    ],
)
def test_what_is_no_checkpoint_is_told(tmp_path, make, message):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(make(tmp_path))


def _foreign(folder):
    save_file({"weight": torch.zeros(2)}, folder / "foreign.safetensors")
    return folder / "foreign.safetensors"


def _text(folder):
    (folder / "text.safetensors").write_text("not tensors at all")
    return folder / "text.safetensors"


def test_checkpoint_cut_short_is_told(saved):
    folder, _ = saved
    weights = folder / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut short"):
        open_checkpoint(folder)


def test_checkpoint_of_another_model_is_told(saved):
    folder, _ = saved
    other = objects(ModelSpec("DiT", {"dim": 32, "depth": 2, "num_heads": 2}, (4, 4), 4, 8, 3))
    with pytest.raises(CheckpointError, match=r"is of another model: \d+ tensors"):
        resume(folder, state(*other))


def test_nothing_to_resume(tmp_path):
    with pytest.raises(CheckpointError, match=r"--resume .*: nothing to resume, .* holds no whole checkpoint"):
        checkpoint_to_resume(tmp_path)
