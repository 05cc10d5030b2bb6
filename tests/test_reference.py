"""Reference files: read back as written, and refused if they belong to something else."""

from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from checkpoints.checkpoint import save_tensors
from evaluation.scoring import Scorer
from experiment.config import DataConfig, EvaluationConfig
from metrics.agreement import fit_probe
from metrics.features import Extractor, Features
from metrics.frechet import Moments
from metrics.programs import save_program
from metrics.reference import (
    ReferenceError,
    fit_cached_probe,
    load_features,
    read_adm,
    reference_path,
    save_features,
    write_adm,
)

KEY = {"source": "photos.zip", "source_hash": "abc", "split": "test", "extractor": "colour"}


class MeanColour(nn.Module):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        colour = images.float().mean(dim=(2, 3))
        return colour, colour / colour.sum(dim=1, keepdim=True)


@pytest.fixture(scope="module")
def extractor(tmp_path_factory):
    path = tmp_path_factory.mktemp("extractor") / "colour.pt"
    probe = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    return Extractor(save_program(MeanColour(), probe, path))


@pytest.fixture
def features():
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    return Features.of(x, x.softmax(dim=1), torch.arange(9) % 3)


def test_features_come_back_as_they_were(tmp_path, features):
    path = reference_path(tmp_path, KEY)
    assert path.name.startswith("photos-")
    save_features(features, path, KEY)
    found = load_features(path, KEY)
    assert torch.equal(found.features, features.features)
    assert torch.equal(found.labels, features.labels)
    assert torch.equal(found.moments.covariance, features.moments.covariance)
    assert (found.num, found.halves[1].num, found.spatial) == (9, 4, None)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_another_split_or_extractor_is_another_file_and_refused_in_words(tmp_path, features):
    other = {**KEY, "split": "train", "extractor": "inception"}
    assert reference_path(tmp_path, other) != reference_path(tmp_path, KEY)
    path = tmp_path / "reference.safetensors"
    save_features(features, path, KEY)
    with pytest.raises(ReferenceError, match="is of another extractor, split; delete it"):
        load_features(path, other)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ReferenceError, match="damaged"):
        load_features(path, KEY)


def test_a_flipped_bit_is_found(tmp_path, features):
    path = tmp_path / "reference.safetensors"
    save_features(features, path, KEY)
    content = path.read_bytes()
    number_of_images = content.index(rb"\"whole\": 9") + len(rb"\"whole\": ")
    for place in (len(content) - 3, number_of_images):
        flipped = bytearray(content)
        flipped[place] ^= 1
        path.write_bytes(bytes(flipped))
        with pytest.raises(ReferenceError, match="its checksum differs"):
            load_features(path, KEY)


def test_two_may_write_one_reference_at_once_and_neither_leaves_a_part(tmp_path, monkeypatch, features):
    path = tmp_path / "reference.safetensors"

    def meanwhile(tensors, partial, metadata):
        monkeypatch.undo()
        save_features(features, path, KEY)  # another evaluation begins and ends here
        save_file(tensors, partial, metadata=metadata)

    monkeypatch.setattr("metrics.reference.save_file", meanwhile)
    save_features(features, path, KEY)
    assert load_features(path, KEY).num == 9
    monkeypatch.setattr("metrics.reference.save_file", lambda tensors, partial, metadata: partial.write_text("") / 0)
    with pytest.raises(ZeroDivisionError):
        save_features(features, path, KEY)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("mu", "sigma"),
    [
        (np.full(3, np.nan), np.eye(3)),
        (np.zeros(3), np.eye(4)),
        (np.zeros(3), np.full((3, 3), np.inf)),
        (np.arange(3), np.eye(3)),
    ],
)
def test_malformed_moments_are_refused(tmp_path, extractor, mu, sigma):
    np.savez(tmp_path / "ref.npz", mu=mu, sigma=sigma, extractor=extractor.name, extractor_sha256=extractor.sha256)
    with pytest.raises(ReferenceError, match=r"mu and sigma are not a finite mean"):
        read_adm(tmp_path / "ref.npz", extractor)


def test_adm_batches_are_written_and_read(tmp_path, features, extractor):
    images = torch.randint(0, 256, (9, 3, 8, 8), dtype=torch.uint8)
    spatial = Moments(torch.zeros(2).double(), torch.eye(2).double(), 9)
    features = Features(features.moments, spatial)
    write_adm(tmp_path / "ref.npz", features, images, extractor)
    with np.load(tmp_path / "ref.npz") as file:
        assert {"arr_0", "mu", "sigma", "mu_s", "sigma_s"} <= set(file.files)
        assert file["arr_0"].shape == (9, 8, 8, 3)
    found, pictures = read_adm(tmp_path / "ref.npz", extractor, (8, 8))
    assert torch.equal(found.moments.mean, features.moments.mean)
    assert torch.equal(found.spatial.covariance, spatial.covariance)
    assert torch.equal(pictures, images)


def test_adm_batches_of_another_extractor_or_resolution_are_refused(tmp_path, features, extractor):
    path = tmp_path / "adm.npz"
    np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048), arr_0=np.zeros((4, 64, 64, 3), np.uint8))
    with pytest.raises(
        ReferenceError, match=r"its mu and sigma are of the extractor inception, the samples' .* colour"
    ):
        read_adm(path, extractor)
    with pytest.raises(ReferenceError, match="its images are 64x64, the samples 32x32"):
        read_adm(path, extractor, (32, 32))
    np.savez(path, nothing=np.zeros(3))
    with pytest.raises(ReferenceError, match="not mu and sigma or arr_0"):
        read_adm(path, extractor)
    path.write_bytes(b"PK no zip")
    with pytest.raises(ValueError, match="not a whole npz file"):
        read_adm(path, extractor)


def test_a_reference_of_images_alone(tmp_path, extractor):
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    found, images = read_adm(tmp_path / "images.npz", extractor)
    assert found is None
    assert images.shape == (4, 3, 8, 8)


def test_a_full_disk_is_told_in_words_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("metrics.reference.save_file", full)
    monkeypatch.setattr("checkpoints.checkpoint.save_file", full)
    with pytest.raises(ReferenceError, match=r"--data.cache: .* could not be written .*No space left"):
        save_features(Features.of(torch.zeros(3, 2)), tmp_path / "x.safetensors", {})
    with pytest.raises(OSError, match=r"y.safetensors could not be written \(I/O error: No space left"):
        save_tensors({"weight": torch.zeros(1)}, tmp_path / "y.safetensors", {})
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_probe_learns_from_the_whole_training_split(tmp_path):
    """A model that saw a tenth of the images is judged as one that saw all."""
    rng = np.random.default_rng(0)
    for number in range(20):
        path = tmp_path / "images" / ("dark", "light")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(120 * (number % 2), 130 + 120 * (number % 2), (8, 8, 3), dtype=np.uint8)).save(
            path
        )
    program = save_program(MeanColour(), torch.full((2, 3, 8, 8), 100, dtype=torch.uint8), tmp_path / "colour.pt")
    evaluation = EvaluationConfig(extractor=str(program), metrics=["agreement"])
    scorer = Scorer(evaluation, Accelerator(cpu=True))
    data = DataConfig(path=str(tmp_path / "images"), image_size=8, cache=str(tmp_path / "cache"))
    probes = [scorer.reference(replace(data, train_fraction=fraction)).features.probe for fraction in (1.0, 0.1)]
    assert torch.equal(probes[0].weight, probes[1].weight)


def test_a_probe_is_fitted_once_and_read_again(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 3
    features = Features.of(torch.randn(30, 4, generator=generator) + labels[:, None], labels=labels)
    file, key = tmp_path / "train-0.safetensors", {"source": "train"}
    with monkeypatch.context() as read_only:
        read_only.setattr("metrics.reference.save_file", Mock(side_effect=PermissionError("read-only")))
        fit_cached_probe(features, 3, file, key)
    assert not [*tmp_path.iterdir()]
    fitted = fit_cached_probe(features, 3, file, key)
    whole = fit_probe(features.features, labels, 3)
    assert all(torch.equal(getattr(fitted, name), value) for name, value in vars(whole).items())
    monkeypatch.setattr("metrics.reference.fit_probe", None)
    again = fit_cached_probe(features, 3, file, key)
    assert all(torch.equal(getattr(again, name), value) for name, value in vars(whole).items())
    with pytest.raises(ReferenceError, match=r"train-0-probe.safetensors is of another source; delete it"):
        fit_cached_probe(features, 3, file, {"source": "other"})
    (tmp_path / "train-0-probe.safetensors").write_bytes(b"half")
    with pytest.raises(ReferenceError, match=r"train-0-probe.safetensors is damaged"):
        fit_cached_probe(features, 3, file, key)
