"""The checkpoint that comes with every clone, so that real samples can be drawn before any training."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from processes import ROOT, script

from autoencoders.codec import create_codec
from checkpoints.checkpoint import CheckpointError, open_checkpoint, read_tensors
from checkpoints.hub import HubError
from checkpoints.warm_start import changes_of_meaning, warm_start
from experiment.config import DiffusionConfig
from sampling.pipeline import load
from sharing.model_card import card_files

EVALUATE, SAMPLE = script("evaluate.py"), script("sample.py")


@pytest.fixture(scope="module")
def embedded():
    return open_checkpoint("embedded")


def test_it_is_small_and_has_its_card_and_its_notice():
    folder = ROOT / "assets" / "checkpoint"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10_000_000
    assert "license: " in (folder / "README.md").read_text()
    assert "assets/checkpoint/ema.safetensors" in (ROOT / "NOTICE").read_text()


def test_it_needs_nothing_but_the_clone(embedded):
    embedded.open_codec(None)
    assert all(weight.dtype == torch.float16 for weight in read_tensors(embedded.path).values() if weight.ndim)
    assert {parameter.dtype for parameter in embedded.load_model().parameters()} == {torch.float32}


def test_the_embedded_checkpoint_writes_samples_to_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    SAMPLE.main(SAMPLE.SampleConfig("embedded", classes=["sunflower", "airplanes"], num_per_class=1))
    assert (tmp_path / "runs" / "embedded-checkpoint" / "samples.png").stat().st_size > 5000


def test_from_python_it_draws_what_the_command_draws(tmp_path):
    SAMPLE.main(SAMPLE.SampleConfig("embedded", str(tmp_path / "a.npz"), classes=["sunflower", "2"], num_per_class=1))
    pipeline = load("embedded")
    drawn, images = pipeline.sample(["sunflower", 2], num_per_class=1), np.load(tmp_path / "a.npz")["arr_0"]
    assert np.array_equal(drawn.permute(0, 2, 3, 1).numpy(), images)
    for alone in ("10", 10, pipeline.classes[10]):  # a text is one class, not one for each letter
        assert pipeline.generator(alone, num_per_class=1).labels.tolist() == [10]
    for classes, settings, words in [
        (["sunflwer"], {}, "did you mean sunflower"),
        ([101], {}, "--classes 101: no such class"),
        ([], {"num_per_class": -1}, r"num_per_class -1: must lie in \[1, inf\)"),
        ([], {"batch_size": 0}, r"batch_size 0: must lie in \[1, inf\)"),
        ([], {"seed": -1}, "seed -1: must lie in"),
        ([], {"steps": 3}, "steps: unknown"),
    ]:
        with pytest.raises(ValueError, match=words):
            pipeline.sample(classes, **settings)


def test_nothing_is_written_into_the_clone_where_it_is_given_by_its_path(embedded, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert open_checkpoint("assets/checkpoint").run == embedded.run


@pytest.mark.parametrize("held", ["checkpoints/00000001/ema.safetensors", "ema.safetensors"])
def test_a_folder_named_embedded_with_a_checkpoint_is_refused_as_ambiguous(tmp_path, monkeypatch, held):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "embedded" / "samples").mkdir(parents=True)
    open_checkpoint("embedded")
    (tmp_path / "embedded" / held).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "embedded" / held).touch()
    with pytest.raises(HubError, match="embedded: the clone's own checkpoint, or this folder's"):
        open_checkpoint("embedded")


def test_it_is_scored_by_name_as_a_run_is():
    EVALUATE.check(EVALUATE.EvaluateConfig(samples="embedded", trials=2))  # refused of a fixed set of images
    assert EVALUATE.is_run("embedded")


def test_a_training_starts_from_it(embedded):
    assert "took" in (words := warm_start(embedded.spec.build(), "embedded"))
    assert "not in" not in words
    same, codec = replace(embedded.config.diffusion, times="uniform"), create_codec(embedded.autoencoder)
    (warning,) = changes_of_meaning("embedded", create_codec("pixel"), same)
    assert warning.startswith("warning: --autoencoder: ")
    assert "was trained with another codec" in warning
    for told in (same, replace(same, guidance_max=5.0)):  # at scale 1 it means the same; times are of training alone
        assert changes_of_meaning("embedded", codec, told) == []
    for diffusion, what in [(replace(same, prediction="velocity"), "prediction x_0"), (DiffusionConfig(), "kind flow")]:
        (warning,) = changes_of_meaning("embedded", codec, diffusion)
        assert warning == f"its output had another meaning, which has to be relearned: --diffusion.{what}"
    fresh, names = replace(embedded.spec, num_classes=2).build(), ["of one's own", "pizza"]
    assert warm_start(fresh, "embedded", names, whole=True).endswith(
        "; 1 of 2 classes keep their label embeddings"
    )  # its file is in half
    known = embedded.load_model().cond.label.weight[[embedded.classes.index("pizza"), -1]]
    assert torch.equal(fresh.cond.label.weight[1:], known)


def test_what_is_published_of_it_is_its_own(embedded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert card_files(embedded) == {}
    with pytest.raises(CheckpointError, match="or embedded"):
        open_checkpoint(tmp_path / "embeded")
