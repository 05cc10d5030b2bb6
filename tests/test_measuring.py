"""evaluate.py --autoencoder: numbers against direct computations, its files, and what is refused."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import replace
from pathlib import Path
from threading import Event
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from processes import run, script
from safetensors.torch import load_file, save_file
from scoring import score
from small_autoencoders import create, write

from autoencoders.codec import EMBEDDED, LatentCodec, create_codec
from data import open_dataset
from evaluation import autoencoder_scores as measuring
from evaluation.autoencoder_scores import (
    Distance,
    default_output,
    measure,
    open_distance,
    posterior,
    recommend,
    warn_unsuitable,
)
from evaluation.flags import SweptSampling
from evaluation.scoring import Row
from evaluation.sources import from_images
from experiment.config import DataFlags
from machine.lock import taking_turns
from metrics.pixelwise import psnr, spectrum, ssim
from metrics.programs import save_program
from metrics.scores import DEFAULT, Score

EVALUATE = script("evaluate.py")
CPU, NUM, SIZE = torch.device("cpu"), 24, 32
NONE = Distance("lpips", reason="no network")


class MeanColors(torch.nn.Module):
    """A TorchScript extractor that is also a perceptual network: mean colours of quarters, soft classes of them."""

    def forward(self, images: torch.Tensor):
        means = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)
        return means, torch.softmax(4 * means, dim=1)


@pytest.fixture(scope="module")
def images():
    held_out = open_dataset("shapes", split="test", image_size=SIZE, num_images=5 * NUM)
    assert len(held_out) == NUM
    return torch.stack([held_out[index][0] for index in range(NUM)])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Two autoencoders measured by the command: its folder, output and record."""
    folder = tmp_path_factory.mktemp("measured")
    save_program(MeanColors(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8), folder / "colors.pt")
    write("taesd", folder / "tiny")
    (folder / "tiny" / "metrics.json").write_text('{"psnr_images_tenth": 90.0}')
    flags = ("--data.num_images", 5 * NUM, "--data.image_size", SIZE, "--extractor", "colors.pt", "--batch_size", 7)
    names = ("--autoencoder", "embedded,tiny", "--perceptual", "colors.pt", "--metrics", f"[{','.join(DEFAULT)},cas]")
    done = run("evaluate.py", *names, *flags, cwd=folder)
    return folder, done.stdout, json.loads((folder / "embedded-tiny-autoencoder.json").read_text())


def settings(output):
    """Settings of a short measurement in the folder of `measured`."""
    few = DataFlags(num_images=5 * NUM, image_size=SIZE)
    names = {"autoencoder": "tiny", "perceptual": "colors.pt", "extractor": "colors.pt", "metrics": ["fid"]}
    return EVALUATE.EvaluateConfig(**names, num_samples=8, data=few, output=output)


def test_measurements_with_one_output_write_their_files_in_turns(measured, monkeypatch):
    """The record of one once lay beside the pictures of another."""
    monkeypatch.chdir(measured[0])
    arrived = Event()
    monkeypatch.setattr(measuring, "taking_turns", lambda folder: arrived.set() or taking_turns(folder))
    with ThreadPoolExecutor(1) as threads, taking_turns(Path("turns")):
        done = threads.submit(EVALUATE.main, settings("turns/one.json"))
        while not arrived.wait(0.1):
            assert not done.done()
        assert not [path for path in Path("turns").iterdir() if "unfinished" not in path.name]
    done.result()
    written = {"one.json", "one-reconstructions.png", "one-spectrum.png"}
    assert {path.name for path in Path("turns").iterdir()} == written


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_measured(measured, monkeypatch):
    monkeypatch.chdir(measured[0])
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match=r"--output tiny/autoencoder\.json: nothing can be written in "):
        EVALUATE.main(settings(None))


def test_measurements_are_kept_when_those_of_the_next_autoencoder_fail(measured, monkeypatch):
    monkeypatch.chdir(measured[0])
    (weights,) = Path(shutil.copytree("tiny", "ruined")).glob("*.safetensors")
    save_file({name: tensor * torch.nan for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(ValueError, match="not finite"):
        EVALUATE.main(replace(settings("kept/ruined.json"), autoencoder="tiny,ruined"))
    (kept,) = Path("kept").iterdir()
    assert kept.name.startswith("ruined.json.unfinished-")
    assert [row["name"] for row in json.loads(kept.read_text())["rows"]] == ["tiny"]
    EVALUATE.main(settings("kept/ruined.json"))
    assert not [*Path("kept").glob("*unfinished*")]


@pytest.mark.parametrize(("row", "name"), [(0, "embedded"), (1, "tiny")])
def test_scores_are_those_of_the_pairs(measured, images, row, name):
    folder, said, record = measured
    codec = create_codec(name if name == "embedded" else str(folder / name))
    back = codec.decode(codec.encode(images))
    found = {metric: one["value"] for metric, one in record["rows"][row]["scores"].items()}
    assert found["psnr"] == pytest.approx(psnr(images, back).mean().item(), rel=1e-5)
    assert found["ssim"] == pytest.approx(ssim(images, back).mean().item(), rel=1e-5)
    features, theirs = (MeanColors()(each)[0] for each in (images, back))
    distance = (features - theirs).square().mean().item()
    assert found["perceptual_distance[colors]"] == pytest.approx(distance, rel=1e-3)
    direct = score(back, images, extractor=str(folder / "colors.pt")).scores
    for metric in ("frechet_distance[colors]", "kernel_distance[colors]", "precision", "density"):
        assert found[metric] == pytest.approx(direct[metric].value, rel=1e-4, abs=1e-7), metric
    spectra = record["spectrum"]
    assert spectra["held-out images"] == pytest.approx(spectrum(images).mean(dim=0).tolist(), rel=1e-6)
    assert spectra[name] == pytest.approx(spectrum(back).mean(dim=0).tolist(), rel=1e-4, abs=1e-9)
    assert spectra["cycles_per_pixel"][-1] == 0.5
    assert f"| {name} " in said


def test_records_have_what_is_needed_to_reproduce_them(measured):
    _, said, record = measured
    first, second = (row["samples"] for row in record["rows"])
    codec = create_codec("embedded")
    assert first["autoencoder"] == codec.provenance
    assert first["kind"] == "reconstructions"
    assert second["autoencoder"]["autoencoder"] == "tiny"
    assert min(row[speed] for row in (first, second) for speed in ("encode img/s", "decode img/s")) > 0
    assert len(record["perceptual"]["sha256"]) == 64
    assert record["num_samples"] == record["num_reference"] == NUM
    assert {"commit", "versions", "extractor_sha256", "reference"} <= record.keys()
    assert "spatial_frechet_distance[colors]: none: colors has no spatial features; Inception has" in said
    assert "cas[colors]: none: it would be trained and tested on the same images" in said
    assert "latents of embedded: 4 channels, 1/8 of the side; mean " in said
    assert "not FID" in said


def test_the_summary_recommends_an_autoencoder_and_warns_of_unsuitable_images(measured):
    _, said, record = measured
    *_, take, outside, _ = said.strip().splitlines()
    title = "frechet_distance[colors]"
    first, second = (row["scores"][title]["value"] for row in record["rows"])
    best, other = ("embedded", "tiny") if first < second else ("tiny", "embedded")
    assert take.startswith(f"Take {best}: {title}, ")
    assert f"({other} {max(first, second):.2f}" in take or f"({other} {max(first, second):.4f})" in take
    assert "from latents of 4x" in take
    psnr = record["rows"][1]["scores"]["psnr"]["value"]
    assert outside.startswith(f"These images lie outside of what tiny was made for: they come back at {psnr:.1f} dB")
    assert "embedded" not in outside


def row(name, speed, **scores):
    return Row(name, {title: Score(*value) for title, value in scores.items()}, {"decode img/s": speed}, [])


def test_the_fastest_autoencoder_is_chosen_among_those_within_the_error():
    rows = [
        row("a", 10, agreement=(0.80, 0.02)),
        row("b", 40, agreement=(0.78, 0.02)),
        row("c", 90, agreement=(0.6, 0.02)),
    ]
    said = recommend(rows, {"a": (32, 8, 8), "b": (16, 8, 8), "c": (4, 8, 8)})
    assert said.startswith("Take b: the fastest of 2 that agreement does not tell apart, 0.7800 ± 0.0200 (a 0.8000 ±")
    assert "40 img/s (a 10 img/s, c 90 img/s) from latents of 16x8x8 (a 32x8x8, c 4x8x8)" in said


def test_a_blurred_one_is_not_chosen_for_its_speed():
    """As `embedded` was on 36 photographs, whose classes a small classifier names from what it leaves of them."""
    rows = [
        row("a", 10, agreement=(0.83, 0.06), psnr=(24.5,)),
        row("b", 40, agreement=(0.81, 0.06), psnr=(21.4,)),
        row("c", 20, agreement=(0.82, 0.06), psnr=(23.9,)),
    ]
    said = recommend(rows, {"a": (32, 8, 8), "b": (4, 8, 8), "c": (16, 8, 8)})
    assert said.startswith(
        "Take c: the fastest within 1 dB of the best psnr, of 3 that agreement does not tell apart, 0.82"
    )


@pytest.mark.parametrize("text", [None, "[1]", "{", '{"psnr_images_tenth": null}', '{"psnr_images_tenth": 19}'])
def test_an_autoencoder_without_that_figure_or_at_home_says_nothing(tmp_path, text):
    if text:
        (tmp_path / "metrics.json").write_text(text)
    assert warn_unsuitable(row("a", 1, psnr=(20.0,)), Mock(spec=LatentCodec, source=str(tmp_path))) is None


def test_the_score_that_decides_is_one_that_all_have():
    rows = [row("a", 1, fid=(None,), psnr=(20.0,)), row("b", 1, fid=(3.0,), psnr=(21.0,))]
    assert recommend(rows, {"a": (4, 8, 8), "b": (4, 8, 8)}).startswith("Take b: psnr, 21.00 (a 20.00)")
    rows = [row("a", 1, psnr=(None,)), row("b", 1, psnr=(21.0,))]
    assert recommend(rows, {}) == "No score is available for all of them, so there is no recommendation."


def test_pictures_stand_beside_the_record(measured):
    folder, said, _ = measured
    names = [f"embedded-tiny-autoencoder{end}" for end in (".json", "-reconstructions.png", "-spectrum.png")]
    assert said.strip().splitlines()[-1] == "written: " + ", ".join(names)
    with Image.open(folder / names[1]) as grid:
        rows = grid.height // (4 * SIZE)
        assert rows == 5  # inputs, and of each what came back and its difference
        assert len(np.unique(np.asarray(grid))) > 50
    with Image.open(folder / names[2]) as plot:
        assert len(np.unique(np.asarray(plot))) > 20


def test_statistics_are_those_of_many_draws(images):
    codec, accelerator = create_codec("embedded"), Accelerator(cpu=True)
    source = from_images(images, "images")
    found = measure(codec, source, NONE, accelerator, batch_size=10).latents
    stored, generator = codec.prepare(images), torch.Generator().manual_seed(0)
    shape = (NUM, *codec.latent_shape(SIZE, SIZE))
    draws = torch.cat([codec.draw(stored, torch.randn(shape, generator=generator)) for _ in range(200)]).double()
    channels = draws.transpose(0, 1).flatten(1)  # [c n]
    torch.testing.assert_close(torch.tensor(found["mean"]).double(), channels.mean(dim=1), atol=0.01, rtol=0)
    torch.testing.assert_close(torch.tensor(found["std"]).double(), channels.std(dim=1), atol=0.01, rtol=0)
    correlation = torch.tensor(found["correlation"]).double()
    torch.testing.assert_close(correlation, channels.corrcoef(), atol=0.02, rtol=0)
    spread = codec.autoencoder.encode(images.float() / 127.5 - 1).latent_dist.std * codec.scale
    expected = spread.square().mean(dim=(0, 2, 3)).sqrt().tolist()
    assert found["posterior_std"] == pytest.approx(expected, rel=1e-4)
    z = codec.autoencoder.encode(images.float() / 127.5 - 1).latent_dist.mean
    activity = z.var(dim=0, correction=0).mean(dim=(1, 2)).tolist()
    assert found["activity"] == pytest.approx(activity, rel=1e-4)
    assert found["dead_channels"] == 0


def test_a_channel_that_never_changes_is_dead_whatever_the_scale(tmp_path, images):
    autoencoder = create("sd", scaling_factor=50.0)
    with torch.no_grad():
        autoencoder.quant_conv.weight *= 10
        autoencoder.quant_conv.weight[1] = 0
        autoencoder.quant_conv.bias[1] = 3
    autoencoder.save_pretrained(tmp_path / "dead")
    codec = create_codec(str(tmp_path / "dead"))
    mean, _ = posterior(codec, images)
    assert mean[:, 1].std() < 1e-3
    found = measure(codec, from_images(images, "images"), NONE, Accelerator(cpu=True), 8)
    assert found.latents["dead_channels"] == 0.25
    assert found.latents["activity"][1] < 1e-6 < found.latents["activity"][0]
    assert found.scores["lpips"].reason == "no network"
    assert found.scores["psnr"].value is not None  # the rest goes on


def test_processes_share_the_images(monkeypatch, images):
    codec, source, parts = create_codec("embedded"), from_images(images, "images"), []
    alone = measure(codec, source, NONE, Accelerator(cpu=True), 10)
    monkeypatch.setattr(measuring, "gather_object", lambda own: parts.extend(own) or parts)
    for index in (1, 0):  # the last one has both parts
        diffusion = Mock(spec=Accelerator, device=CPU, process_index=index, num_processes=2, is_main_process=False)
        together = measure(codec, source, NONE, diffusion, 7)
    assert len(parts) == 2
    for name in ("psnr", "ssim"):
        assert together.scores[name].value == pytest.approx(alone.scores[name].value, rel=1e-6)
    assert together.reconstructed_power == pytest.approx(alone.reconstructed_power, rel=1e-4)
    assert together.latents["std"] == pytest.approx(alone.latents["std"], rel=1e-6)


def test_failed_downloads_become_a_reason_and_wrong_files_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    for network in ("lpips", "vgg19"):
        found = open_distance(network, None, CPU)
        assert found.network is None
        assert "could not be downloaded; put" in found.reason or "could not be downloaded (no network)" in found.reason
    (tmp_path / "text.pt").write_text("no network")
    for network, heads, words in (
        ("none.pt", None, "--perceptual none.pt: no such file; give vgg19, lpips"),
        (str(tmp_path / "text.pt"), None, "--perceptual .*text.pt: not a TorchScript file"),
        ("vgg19", "vgg.pth", "--heads vgg.pth: they are of --perceptual lpips, not of vgg19"),
        ("lpips", "none.pth", "--heads none.pth: no such file; give the lpips package's"),
    ):
        with pytest.raises(ValueError, match=words):
            open_distance(network, heads, CPU)


MISTAKES = {
    "nothing": ({}, "--samples: give a run, a folder, a zip or an npz; or --autoencoder"),
    "trials": ({"autoencoder": "embedded", "trials": 3}, "--trials 3: it is about samples; give --samples"),
    "sampling": (
        {"autoencoder": "embedded", "sampling": SweptSampling("ddim")},
        "--sampling: it is about samples",
    ),
    "checkpoint": ({"autoencoder": "embedded", "checkpoint": "runs/x"}, "--checkpoint runs/x: it is about samples"),
    "network": (
        {"samples": "runs/x", "perceptual": "vgg19"},
        "--perceptual vgg19: it measures an autoencoder; leave it out",
    ),
    "heads": ({"samples": "runs/x", "heads": "vgg.pth"}, "--heads vgg.pth: it measures an autoencoder; leave it out"),
    "pixels": ({"autoencoder": "pixel"}, "--autoencoder pixel: it reconstructs every image exactly"),
    "one of two": ({"autoencoder": "embedded, ./none"}, "--autoencoder ./none: no such folder"),
    "metric": ({"autoencoder": "embedded", "metrics": ["psnr"]}, "--metrics psnr: choose from fid"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_name_the_flag(mistake):
    given, words = MISTAKES[mistake]
    with pytest.raises(ValueError, match=words):
        EVALUATE.main(EVALUATE.EvaluateConfig(**given))


def test_records_go_to_the_autoencoders_folder_or_are_named_after_it(tmp_path):
    def codec(source):
        return Mock(spec=LatentCodec, source=str(source))

    (tmp_path / "a" / "vae").mkdir(parents=True)
    mine, embedded = codec(tmp_path / "a" / "vae"), codec("embedded")
    assert default_output([mine]) == tmp_path / "a" / "vae" / "autoencoder.json"
    for name, codecs in {
        "a-vae-embedded": [mine, embedded],
        "embedded": [embedded],
        "me-vae": [codec("me/vae")],
        "assets-autoencoder": [codec(EMBEDDED["embedded"])],
    }.items():
        assert str(default_output(codecs)) == f"{name}-autoencoder.json"


def test_rows_of_autoencoders_of_one_name_are_told_apart(monkeypatch):
    drawn, embedded = [], LatentCodec()
    monkeypatch.setattr(measuring, "save_labelled", lambda rows, *_, **__: drawn.append([name for name, _ in rows]))
    images = from_images(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "images")
    for sources in (["runs/a/autoencoder", "runs/b/autoencoder", "mine/vae"], ["runs/a/autoencoder"]):
        codecs = [copy(embedded) for _ in sources]
        for codec, source in zip(codecs, sources, strict=True):
            codec.source = source
        measuring.draw_reconstructions(images, codecs, CPU, Path("unwritten.png"))
    assert drawn[0][1::2] == ["runs/a/autoencoder", "runs/b/autoencoder", "vae"]
    assert drawn[1][1::2] == ["reconstruction"]
