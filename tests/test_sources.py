"""Sources of samples and their fair references: every kind of source, matched by class name."""

import hashlib
import json
import math
import shutil
import zipfile
from dataclasses import asdict, replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from processes import script
from safetensors.torch import load_file, save_file
from torch import nn

from ablation.tables import check_columns
from autoencoders.codec import create_codec
from checkpoints.checkpoint import make_metadata, open_checkpoint
from data.shapes import ShapesDataset
from data.subsets import map_labels
from evaluation.baselines import Controls
from evaluation.record import notes, write_json
from evaluation.scoring import Scorer, summarise
from evaluation.sources import Source, from_dataset, from_images, matching_images, read_samples, reconstructions
from experiment import imports
from experiment.build import merge_data_flags
from experiment.cli import parse
from experiment.config import DataConfig, DataFlags, EvaluationConfig, LogConfig, SamplingConfig
from experiment.inputs import check_inputs
from metrics.features import Extractor, Features
from metrics.fidelity import compute_scores
from metrics.programs import save_program
from metrics.scores import METRICS, column_title
from sampling.generation import Generator
from sharing.studio import Studio
from training.inspection import open_best

CPU = torch.device("cpu")
DATA = DataConfig(num_images=60, image_size=32, difficulty="hard")


class Thumbnail(nn.Module):
    """An extractor: features are a small copy's pixels, probabilities meaningless."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        small = nn.functional.adaptive_avg_pool2d(images.float(), 8).flatten(1)
        return small, torch.softmax(small[:, :4] / 255, dim=1)


@pytest.fixture(scope="module")
def thumbnail(tmp_path_factory):
    path = tmp_path_factory.mktemp("extractor") / "thumbnail.pt"
    return save_program(Thumbnail(), torch.zeros(2, 3, 32, 32, dtype=torch.uint8), path)


def shapes(split, num=60):
    return ShapesDataset(num, split=split, image_size=32, difficulty="hard")


def counts(source):
    labels = torch.cat([batch.labels for batch in source.batches(torch.arange(source.num_images), 7)])
    assert torch.equal(labels, source.labels)
    return labels.bincount(minlength=10).tolist()


def test_a_subset_has_every_class_where_labels_come_in_turn():
    """Every tenth of the labels i % 10 would be a single class."""
    assert counts(from_dataset(shapes("train", 1000), "training images", 100)) == [10] * 10


def test_references_are_matched_to_samples_by_class_name():
    samples = from_dataset(shapes("train"), "samples", 20)
    other = shapes("test", 100)
    other.classes, other.labels = other.classes[::-1], 9 - other.labels
    found, index = matching_images(samples, other, "held-out images", "--baselines")
    assert [other.classes[label] for label in found.labels] == [samples.classes[label] for label in samples.labels]
    assert len(index.unique()) == found.provenance["num_different"] == 20
    other.labels[other.labels == 9] = 3
    with pytest.raises(ValueError, match="--baselines: the held-out images have no image of the class circle"):
        matching_images(samples, other, "held-out images", "--baselines")
    with pytest.raises(ValueError, match=r"--per_class: the class b \(1 such\) has no namesake among c, a"):
        map_labels(torch.tensor([0, 1]), ["a", "b"], ["c", "a"], "--per_class")
    assert map_labels(torch.tensor([1, 0]), ["a", "b"], ["b", "a"], "--per_class").tolist() == [0, 1]


def test_a_drawn_reconstruction_depends_on_seed_and_index_alone():
    codec, images = create_codec("embedded"), from_dataset(shapes("train"), "training images", 5)
    drawn = reconstructions(images, codec, CPU, seed=3)
    one, two = (torch.cat([b.images for b in drawn.batches(torch.arange(5), size)]) for size in (5, 2))
    assert (one.int() - two.int()).abs().max() <= 1
    assert not torch.equal(one, reconstructions(images, codec, CPU).images(torch.arange(5)))


def test_planted_copies_are_found_and_unseen_images_are_not_taken_for_copies(tmp_path, monkeypatch, thumbnail):
    """The same autoencoder blurs all images, so the only difference is whether an image was trained on."""
    monkeypatch.chdir(tmp_path)
    codec, (train, test), found = create_codec("embedded"), map(shapes, ("train", "test")), {}
    scorer = Scorer(EvaluationConfig(str(thumbnail), metrics=["kid"], seed=1), Accelerator(cpu=True))
    for name, dataset in (("copies", shapes("train")), ("unseen", shapes("test", 400))):
        source = reconstructions(from_dataset(dataset, name, 40, seed=5), codec, CPU, seed=7)
        copies, (unseen, _) = matching_images(source, train, "", ""), matching_images(source, test, "", "")
        found[name] = scorer.memorisation(
            scorer.extract(source), Controls(from_dataset(train, ""), *copies, unseen), DATA, codec
        )
    assert found["copies"].closer > 0.95
    assert 0.3 < found["unseen"].closer < 0.7
    for each in found.values():
        assert each.copies > 0.95
        assert each.found > 0.95
    assert len(list((tmp_path / "cache" / "references").glob("shapes-*.safetensors"))) == 1


def write_images(images, folder):
    """Write images as PNGs in a folder per class, and return their pixels [n h w 3]."""
    pictures = images.images(torch.arange(images.num_images)).permute(0, 2, 3, 1).numpy()
    for number, picture in enumerate(pictures):
        path = folder / images.classes[images.labels[number]] / f"{number:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    return pictures


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The same twelve images as a folder, a zip and an npz."""
    folder = tmp_path_factory.mktemp("drawn")
    images = from_dataset(shapes("test"), "samples")
    pictures = write_images(images, folder / "drawn")
    np.savez(folder / "drawn.npz", arr_0=pictures, arr_1=images.labels.numpy(), classes=np.array(images.classes))
    with zipfile.ZipFile(folder / "drawn.zip", "w") as archive:
        for path in sorted((folder / "drawn").rglob("*.png")):
            archive.write(path, path.relative_to(folder / "drawn"))
    return folder


def evaluate(*arguments):
    program = script("evaluate.py")
    config = parse(program.EvaluateConfig, ["--precision", "fp32", *map(str, arguments)])
    check_inputs(config)
    program.main(config)


@pytest.mark.parametrize("kind", ["drawn", "drawn.zip", "drawn.npz"])
def test_every_kind_of_image_source_is_scored(tmp_path, monkeypatch, drawn, thumbnail, capsys, kind):
    monkeypatch.chdir(tmp_path)
    data = ("--data.image_size", 32, "--data.num_images", 60, "--data.difficulty", "hard", "--per_class", "true")
    flags = ("--extractor", thumbnail, "--metrics", "[fid,kid]", "--output", "scores.json", *data)
    evaluate("--samples", drawn / kind, "--latex", "true", *flags)
    record = json.loads((tmp_path / "scores.json").read_text())
    assert record["scores"]["frechet_distance[thumbnail]"]["value"] == pytest.approx(
        0, abs=1e-3
    )  # the reference itself
    assert record["num_samples"] == record["samples"]["num_images"] == 12
    assert next(iter(record["per_class"])) == "circle"
    said = capsys.readouterr().out
    sha256 = hashlib.sha256(thumbnail.read_bytes()).hexdigest()
    assert f"12 samples against 12 images, on thumbnail (sha256 {sha256[:12]})" in said
    assert "\nreference: test of 12 from 60, shapes\n" in said
    assert "± of frechet_distance[thumbnail], halves: half the difference of two random halves" in said
    assert (tmp_path / "scores.tex").read_text().splitlines()[4].startswith(kind + " & ")


def test_scores_are_printed_before_a_failed_write_and_infinity_is_json(tmp_path, monkeypatch, drawn, thumbnail, capsys):
    """`--clip .inf` had no place in strict JSON; scores are printed before any file is written."""
    no_limit = asdict(SamplingConfig(num_steps=150, clip=math.inf, guidance_interval=[0.2, math.inf]))
    write_json({"samples": no_limit}, tmp_path / "scores.json")
    samples = json.loads((tmp_path / "scores.json").read_text())["samples"]
    assert (samples["clip"], samples["guidance_interval"], samples["num_steps"]) == ("inf", [0.2, "inf"], 150)
    monkeypatch.chdir(tmp_path)
    data = ("--data.image_size", 32, "--data.num_images", 60, "--data.difficulty", "hard")
    monkeypatch.setattr("evaluation.record.write_json", Mock(side_effect=OSError("No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        evaluate("--samples", drawn / "drawn.npz", "--extractor", thumbnail, *data)
    assert "12 samples against 12 images, on thumbnail" in capsys.readouterr().out


def test_scores_of_folders_that_differ_after_a_dot_have_different_files(tmp_path, monkeypatch, drawn, thumbnail):
    monkeypatch.chdir(tmp_path)
    data = ("--data.image_size", 32, "--data.num_images", 60, "--data.difficulty", "hard")
    for name in ("guidance-1.5", "guidance-1.25"):
        shutil.copytree(drawn / "drawn", tmp_path / name)
        evaluate("--samples", name, "--extractor", thumbnail, "--metrics", "[fid]", *data)
    assert {path.name for path in tmp_path.glob("*.json")} == {f"guidance-{x}-scores.json" for x in ("1.5", "1.25")}


MINE = """
from experiment.registry import register

@register("metric", "gap", better="lower", title="gap of means", digits=1)
def gap(samples, reference):
    return (samples.mean(0) - reference.mean(0)).norm()

@register("metric", "light", needs="images", better="higher", bounds=(0.0, 1.0))
def light(samples, reference):
    return samples.double().mean() / 255
"""


def test_a_registered_metric_is_scored_reported_and_selects_the_best_checkpoint(
    tmp_path, monkeypatch, drawn, thumbnail, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(imports, "_loaded", {})
    (tmp_path / "mine.py").write_text(MINE)
    data = ("--data.image_size", 32, "--data.num_images", 60, "--data.difficulty", "hard")
    flags = ("--extractor", thumbnail, "--imports", "mine.py", "--metrics", "[gap,light]", "--output", "scores.json")
    known = {**METRICS}
    try:
        for _ in range(2):  # the second time the reference comes from its file
            evaluate("--samples", drawn / "drawn.npz", *flags, *data)
        found = json.loads((tmp_path / "scores.json").read_text())["scores"]
        assert found["gap"]["value"] == pytest.approx(0, abs=1e-3)  # the reference itself
        with np.load(drawn / "drawn.npz") as file:
            assert found["light"]["value"] == pytest.approx(file["arr_0"].mean() / 255)
        assert "| samples   | gap | light  |" in capsys.readouterr().out
        assert column_title("gap") == "gap of means ↓"
        scoring = EvaluationConfig(extractor=str(thumbnail), metrics=["gap", "light"])
        assert [open_best(LogConfig(best=name, evaluate_every=1), scoring).lower for name in ("gap", "light")] == [
            True,
            False,
        ]
        check_columns(["gap", "GFLOPs"])
    finally:
        for name in METRICS.keys() - known:
            del METRICS[name]


def test_folders_that_are_not_samples_are_refused_or_reported(tmp_path, monkeypatch, folder, drawn, thumbnail, capsys):
    """A run's grids are pictures of samples, not samples. A folder may have the name of the procedural dataset. Loose
    images are reported as left out. Scores of a fixed set do not replace those of the run in whose folder it lies."""
    monkeypatch.chdir(tmp_path)
    run, flags = folder / "runs" / "tiny", ("--extractor", thumbnail, "--metrics", "[fid]")
    with pytest.raises(ValueError, match=r"--checkpoint .*tiny/: it is for a fixed set of images, and .*tiny is a run"):
        evaluate("--samples", run, "--checkpoint", f"{run}/", *flags)
    with pytest.raises(ValueError, match=r"--samples .*samples: 00000004.png has .* pixels, not the reference's 32"):
        evaluate("--samples", run / "samples", "--checkpoint", run, *flags)
    shutil.copytree(drawn / "drawn" / "star", tmp_path / "shapes" / "star")
    shutil.copy(next((tmp_path / "shapes" / "star").iterdir()), tmp_path / "shapes" / "loose.png")
    shutil.copytree(drawn / "drawn" / "circle", tmp_path / "shapes" / "circle")
    (tmp_path / "scores.json").write_text("the run's own")
    evaluate("--samples", "shapes", "--checkpoint", run, *flags)
    record = json.loads((tmp_path / "shapes-scores.json").read_text())
    assert record["num_samples"] == len([*(tmp_path / "shapes").glob("*/*.png")])
    assert "--samples shapes: left out 1 in no class folder (loose.png)" in capsys.readouterr().out
    assert (tmp_path / "scores.json").read_text() == "the run's own"


def test_a_spread_is_named_for_what_it_is(thumbnail):
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    samples, reference = Features.of(x, x), Features.of(torch.cat([x + 1, x]))
    extractor = Extractor(thumbnail)
    scores = compute_scores(samples, reference, extractor, metrics=["is", "kid"])
    row = summarise(Source("run", 60, iter, {}), [scores])
    assert notes([row], extractor) == [
        "± of classifier_score[thumbnail]: standard deviation over 10 splits",
        "± of kernel_distance[thumbnail]: standard deviation over 100 subsets of 60 images, no standard error",
        "classifier_score[thumbnail]: biased low, with 10 splits of 6 images; compare equal counts only",
    ]
    trials = notes([summarise(Source("run", 60, iter, {}), [scores, scores])], extractor)
    assert "kernel_distance[thumbnail]: standard deviation over 2 trials" in trials[0]
    too_few = compute_scores(Features.of(x[:1], x[:1]), reference, extractor, metrics=["is"])
    assert notes([summarise(Source("run", 1, iter, {}), [too_few])], extractor) == []


def test_a_checkpoints_images_may_have_moved_and_are_no_others():
    trained_on = DataConfig(path="a.zip", image_size=32, split_seed=3)
    moved = merge_data_flags(trained_on, DataFlags(path="b.zip", cache="elsewhere"))
    assert moved == DataConfig(path="b.zip", cache="elsewhere", image_size=32, split_seed=3)
    with pytest.raises(ValueError, match=r"--data\.image_size 128: the checkpoint's images have 32; leave it out"):
        merge_data_flags(trained_on, DataFlags(image_size=128))
    usual = DataConfig()
    with pytest.raises(ValueError, match=r"--data\.image_size 64: the checkpoint's images have 32"):
        merge_data_flags(trained_on, DataFlags(image_size=usual.image_size))
    assert merge_data_flags(trained_on, DataFlags(path=usual.path)).path == usual.path
    assert merge_data_flags(None, DataFlags(image_size=32)) == DataConfig(image_size=32)


def test_samples_are_opened_before_the_reference_is_computed(tmp_path, monkeypatch, drawn, thumbnail):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for samples, message in {
        tmp_path / "empty": "--samples .*empty: no images in it",
        drawn / "drawn.npz": "its images have 32x32 pixels, not the reference's 64",
        tmp_path / "nothing": "--samples .*nothing does not exist; give a run's folder",
    }.items():
        with pytest.raises(ValueError, match=message):
            evaluate("--samples", samples, "--extractor", thumbnail)
    flags = ("--extractor", thumbnail, "--data.image_size", 32, "--metrics", "[fid]", "--per_class", "true")
    with pytest.raises(ValueError, match="--per_class: it looks at images one by one"):
        evaluate("--samples", drawn / "drawn.npz", *flags)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("labels", [np.arange(12.0), np.arange(11), np.arange(12)])
def test_malformed_labels_are_refused(tmp_path, labels):
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((12, 8, 8, 3), np.uint8), arr_1=labels, classes=np.array(["a", "b"]))
    with pytest.raises(ValueError, match="arr_1 holds no label of each image among its 2 classes"):
        read_samples(str(tmp_path / "x.npz"), 8, None)


def test_samples_of_an_npz_are_told_from_those_that_replace_them(tmp_path):
    described = []
    for value in (0, 1):
        np.savez(tmp_path / "x.npz", arr_0=np.full((2, 8, 8, 3), value, np.uint8))
        described += [read_samples(str(tmp_path / "x.npz"), 8, None).provenance] * 2
    assert described[0] == described[1] != described[2]


def test_another_split_than_the_checkpoints_is_refused(tmp_path, monkeypatch, folder, thumbnail):
    """Otherwise images that the checkpoint was trained on may be among the held-out ones."""
    monkeypatch.chdir(tmp_path)
    pictures = write_images(from_dataset(shapes("train"), "images", 20), tmp_path / "other")
    with pytest.raises(ValueError, match=r"--data\.path: .* was trained with another test"):
        evaluate("--samples", folder / "runs" / "tiny", "--extractor", thumbnail, "--data.path", "other")
    np.savez("reference.npz", arr_0=pictures)
    flags = ("--reference", "reference.npz", "--memorisation", "true", "--num_samples", 4)
    with pytest.raises(ValueError, match=r"--data\.path: .* was trained with another test"):
        evaluate("--samples", folder / "runs" / "tiny", "--extractor", thumbnail, "--data.path", "other", *flags)
    assert not (tmp_path / "cache").exists()


def test_nearest_images_refuse_another_training_split(folder):
    studio = Studio([str(folder / "runs" / "tiny")], "fp32")
    ((run, checkpoint),) = studio.checkpoints.items()
    assert next(studio.read_layouts(run)) == 0
    studio.checkpoints[run] = replace(checkpoint, identity={"train": {"split": "of other images"}})
    with pytest.raises(ValueError, match=r"--data\.path: .* was trained with another train"):
        next(studio.read_layouts(run))


def test_another_split_than_the_checkpoints_is_not_reconstructed(tmp_path, monkeypatch, folder):
    """Nor are other classes denoised under its labels: a label is a number, which means another class elsewhere."""
    monkeypatch.chdir(tmp_path)
    run, program = folder / "runs" / "tiny", script("sample.py")
    flags = ["--reconstruct", "300", "--precision", "fp32", "--output", "x.png"]
    write_images(from_dataset(shapes("train"), "images", 20), tmp_path / "other")

    def sample(checkpoint, *more):
        program.main(parse(program.SampleConfig, ["--checkpoint", str(checkpoint), *flags, *more]))

    with pytest.raises(ValueError, match=r"--data\.path: .* was trained with another test"):
        sample(run, "--data.path", "other")
    found = open_checkpoint(run)  # one from before checkpoints knew their split
    older = make_metadata(found.config, found.step, spec=found.spec, classes=found.classes)
    save_file(load_file(found.path), tmp_path / "older.safetensors", metadata=older)
    seen = []
    monkeypatch.setattr(
        "sampling.reconstruction.reconstruct",
        lambda generator, images, labels, t: (seen.append(labels), (torch.stack([images] * 4, dim=1), t))[1],
    )
    sample(tmp_path / "older.safetensors", "--data.path", "other", "--classes", "[star]")
    assert {found.classes[label] for label in seen[0].tolist()} == {"star"}
    (tmp_path / "other" / "star").rename(tmp_path / "other" / "zebra")
    with pytest.raises(ValueError, match=r"--reconstruct: the class zebra .* has no namesake"):
        sample(tmp_path / "older.safetensors", "--data.path", "other")


def test_an_autoencoder_that_has_changed_is_refused(folder, capsys):
    """A folder may hold other weights by now. An autoencoder that is given may have another decoder; if its latents
    differ, the error names the flag."""
    checkpoint = open_checkpoint(folder / "runs" / "tiny")
    assert checkpoint.open_codec(None).source == checkpoint.open_codec("embedded").source

    def trained_with(**other):
        return replace(checkpoint, identity={"codec": checkpoint.identity["codec"] | other})

    for name in ("sha256", "decoder_sha256"):
        with pytest.raises(ValueError, match=f"--autoencoder: .* was trained with another codec, whose {name} was"):
            trained_with(**{name: "d"}).open_codec(None)
    trained_with(decoder_sha256="d").open_codec("embedded")
    assert capsys.readouterr().out == ""
    trained_with(sha256="d").open_codec("embedded")
    assert "--autoencoder embedded: its latents differ" in capsys.readouterr().out


def test_ruined_weights_get_no_score(tmp_path, monkeypatch, folder, thumbnail):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "runs" / "tiny" / "checkpoints" / "00000004", tmp_path / "ruined")
    path = tmp_path / "ruined" / "ema.safetensors"
    weights = {name: tensor * float("nan") for name, tensor in load_file(path).items()}
    config = open_checkpoint(path)
    metadata = make_metadata(config.config, config.step, spec=config.spec, classes=config.classes)
    save_file(weights, path, metadata=metadata)
    with pytest.raises(ValueError, match="not finite"):
        evaluate("--samples", path, "--extractor", thumbnail, "--num_samples", 4)
    assert not (tmp_path / "ruined" / "scores.json").exists()


def test_a_process_whose_share_of_few_images_is_none_has_no_batches():
    """Otherwise it would fail on them, and the others would wait for it."""
    none, image = torch.arange(0), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    assert not list(from_images(image, "one").batches(none, 8))
    assert not list(Generator.batches(Mock(spec=Generator), none, 8))
