"""Scores against sets whose answers are known by construction."""

from __future__ import annotations

import hashlib
import math
import socket
import urllib.error
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch_fidelity
from scoring import score
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from metrics.classifier import train_classifier
from metrics.extractors import ExtractorError, ProgramExtractor
from metrics.features import Extractor, Features
from metrics.fidelity import Scores, class_distances, classifier_score, compare, kernel_distance
from metrics.frechet import Moments
from metrics.image_batches import image_batches
from metrics.manifold import count_neighbours
from metrics.programs import load_program, save_program
from metrics.scores import DEFAULT
from metrics.self_check import self_check

PROBE = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)


class MeanColour(nn.Module):
    """Features: the mean of each channel. Probabilities: its share of the light, undefined in the dark."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        colour = images.float().mean(dim=(2, 3))  # [n 3]
        return colour, colour / colour.sum(dim=1, keepdim=True)


class Logits(MeanColour):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        colour, _ = super().forward(images)
        return colour, colour


class TensorDataset(Dataset):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


class Labelled(TensorDataset):
    """Images with labels beside them, as a dataset of photographs has."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], index


@pytest.fixture(scope="module")
def colour_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_program(MeanColour(), PROBE, tmp_path_factory.mktemp("extractors") / "mean_colour.pt")


@pytest.fixture(scope="module")
def colour(colour_file: Path) -> Extractor:
    return Extractor(colour_file)


def random_images(num: int, *, seed: int = 0, low: int = 0, high: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tint = torch.randint(low, high, (num, 3, 1, 1), generator=generator)
    grain = torch.randint(0, 9, (num, 3, 8, 8), generator=generator)
    return (tint + grain).clamp(1, 255).to(torch.uint8)


def greys(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)


def gaussian(num: int, mean: list[float], covariance: list[list[float]], *, seed: int) -> Features:
    """Features whose sample mean and covariance are exactly these."""
    z = torch.randn(num, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    z = z - z.mean(dim=0)
    z = z @ torch.linalg.inv(torch.linalg.cholesky(z.T @ z / (num - 1))).T  # white to the last digit
    x = z @ torch.linalg.cholesky(torch.tensor(covariance, dtype=torch.float64)).T
    return Features.of(x + torch.tensor(mean, dtype=torch.float64))


def value(scores: Scores, name: str) -> float:
    found = scores.scores[name].value
    assert found is not None, scores.scores[name].reason
    return found


# --- known answers


def test_equal_sets(colour: Extractor) -> None:
    images = random_images(60)
    scores = score(images, images, extractor=colour)
    assert value(scores, "frechet_distance[mean_colour]") == pytest.approx(0, abs=1e-6)
    assert value(scores, "precision") == value(scores, "recall") == 1
    assert value(scores, "kernel_distance[mean_colour]") <= 0  # the unbiased estimate goes below


def test_frechet_distance_of_two_gaussians(colour: Extractor) -> None:
    """tr (AB)^(1/2) of 2x2 matrices is (tr AB + 2 det(AB)^(1/2))^(1/2); these do not commute."""
    a, b = [[4.0, 1.0], [1.0, 2.0]], [[1.0, -0.5], [-0.5, 3.0]]
    product = torch.tensor(a) @ torch.tensor(b)
    trace = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    expected = (3.0**2 + 1.0**2) + (4 + 2) + (1 + 3) - 2 * trace

    samples, reference = gaussian(50, [3.0, 0.0], a, seed=0), gaussian(80, [0.0, 1.0], b, seed=1)
    scores = compare(samples, reference, colour, metrics=["fid"])
    assert list(scores.scores) == ["frechet_distance[mean_colour]"]
    assert value(scores, "frechet_distance[mean_colour]") == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_of_one_feature(colour: Extractor) -> None:
    samples, reference = gaussian(20, [2.0], [[4.0]], seed=0), gaussian(30, [0.0], [[1.0]], seed=1)
    scores = compare(samples, reference, colour, metrics=["fid"])
    assert value(scores, "frechet_distance[mean_colour]") == pytest.approx(2**2 + (2 - 1) ** 2, rel=1e-5)


def test_precision_and_recall_are_not_swapped(colour: Extractor) -> None:
    """9 of 15 samples lie among the reference, whose other half no sample comes near."""
    reference = greys([*range(100, 120, 2), *range(200, 220, 2)])
    samples = greys([*range(101, 119, 2), *range(10, 22, 2)])
    scores = score(samples, reference, extractor=colour)
    assert value(scores, "precision") == pytest.approx(9 / 15)
    assert value(scores, "recall") == pytest.approx(10 / 20)

    swapped = score(reference, samples, extractor=colour)
    assert value(swapped, "precision") == pytest.approx(10 / 20)


def test_classifier_score_takes_probabilities(colour: Extractor) -> None:
    """Sure of each image, and all classes as often: the score is their number. All grey: it is one."""
    pure = torch.zeros(30, 3, 8, 8, dtype=torch.uint8)
    pure[torch.arange(30), torch.arange(30) % 3] = 200
    for images, expected in (pure, 3.0), (greys([100] * 30), 1.0):
        assert value(score(images, pure, colour, ["is"]), "classifier_score[mean_colour]") >= 1
        logits = colour(image_batches(images), len(images), metrics=["is"], progress=False).logits
        whole = classifier_score(logits, splits=1)
        assert whole.value == pytest.approx(expected, rel=1e-5)
        assert whole.std is None


def test_kernel_distance_of_whole_sets(colour: Extractor) -> None:
    """The unbiased estimate written out (Bińkowski et al. 2018, eq. 4); the subset is cut to the sets."""
    x = gaussian(20, [1.0, 0.0], [[1.0, 0.0], [0.0, 1.0]], seed=0)
    y = gaussian(20, [0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]], seed=1)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a.double() @ b.double().T / 2 + 1) ** 3

    def within(a: Tensor) -> Tensor:
        gram = kernel(a, a)
        return (gram.sum() - gram.trace()) / (20 * 19)

    expected = within(x.features) + within(y.features) - 2 * kernel(x.features, y.features).mean()
    scores = compare(x, y, colour, metrics=["kid"])
    assert value(scores, "kernel_distance[mean_colour]") == pytest.approx(float(expected), rel=1e-6)
    assert scores.scores["kernel_distance[mean_colour]"].std is None  # one subset: nothing varies


def test_kernel_subset_is_cut_to_the_smaller_set(colour: Extractor) -> None:
    samples, reference = random_images(25), random_images(40, seed=1)
    found = score(samples, reference, extractor=colour).scores["kernel_distance[mean_colour]"]
    assert found.spread == "standard deviation over 100 subsets of 25 images, no standard error"
    assert found.std is not None


def test_agrees_with_torch_fidelity(colour_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own entry point, in float32 and from the same registered extractor."""
    samples, reference = random_images(60), random_images(90, seed=1, low=40)

    class Registered(FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str, **_: object):
            super().__init__(name, features_list)
            self.module = ProgramExtractor(feature_extractor_weights_path)

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            outputs = dict(zip(("features", "logits"), self.module(images), strict=True))
            return tuple(outputs[name] for name in self.features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return "features", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits" if metric == "isc" else "features"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

    monkeypatch.setitem(FEATURE_EXTRACTORS_REGISTRY, "program", Registered)
    theirs = torch_fidelity.calculate_metrics(
        input1=TensorDataset(samples),
        input2=TensorDataset(reference),
        feature_extractor="program",
        feature_extractor_weights_path=str(colour_file),
        **dict.fromkeys(("isc", "fid", "kid", "prc"), True),
        **dict.fromkeys(("cuda", "cache", "verbose"), False),
        save_cpu_ram=True,
        kid_subset_size=50,
        rng_seed=5,
    )
    extractor = Extractor(colour_file)
    scores = score(samples, reference, extractor=extractor, seed=5)
    x, y = (extractor(image_batches(each), len(each), progress=False).features for each in (samples, reference))
    kernel = kernel_distance(x.double(), y.double(), subset_size=50, seed=5)
    scores.scores["kernel_distance[mean_colour]"] = kernel
    keys = {
        "frechet_distance[mean_colour]": "frechet_inception_distance",
        "classifier_score[mean_colour]": "inception_score_mean",
        "kernel_distance[mean_colour]": "kernel_inception_distance_mean",
        "precision": "precision",
        "recall": "recall",
    }
    for name, key in keys.items():
        assert value(scores, name) == pytest.approx(theirs[key], rel=1e-4)


def test_moments_alone_give_the_same_distance(colour: Extractor) -> None:
    """Nothing is kept of single images, and the other metrics say why they are missing."""
    samples, reference = random_images(60), random_images(90, seed=1, low=40)
    both = [
        colour(image_batches(images, 7), len(images), metrics=["fid"], progress=False)
        for images in (samples, reference)
    ]
    assert all(one.features is None and one.logits is None for one in both)
    kept = colour(image_batches(samples, 9), len(samples), metrics=["kid"], progress=False)
    for lean_half, half in zip(both[0].halves, kept.halves, strict=True):
        torch.testing.assert_close(lean_half.covariance, half.covariance)
    lean = compare(*both, colour)
    full = score(samples, reference, extractor=colour)
    name = "frechet_distance[mean_colour]"
    assert value(lean, name) == pytest.approx(value(full, name), rel=1e-9)
    assert lean.scores["precision"].reason == "the reference holds moments, not the features of each image"


def test_spatial_distance_is_the_frechet_distance_of_spatial_features(colour: Extractor) -> None:
    """Known Gaussians; and without spatial features on both sides, no number."""
    x = gaussian(20, [0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]], seed=0)
    near = Moments(torch.tensor([0.0, 0.0]).double(), torch.diag(torch.tensor([4.0, 1.0])).double(), 20)
    far = Moments(torch.tensor([3.0, 0.0]).double(), torch.diag(torch.tensor([1.0, 1.0])).double(), 20)
    samples, reference = replace(x, spatial=near), replace(x, spatial=far)
    name = "spatial_frechet_distance[mean_colour]"
    assert value(compare(samples, reference, colour, metrics=["sfid"]), name) == pytest.approx(3**2 + (2 - 1) ** 2)
    assert compare(samples, x, colour, metrics=["sfid"]).scores[name].value is None


def test_classes_have_distances_of_their_own(colour: Extractor) -> None:
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([0] * 19 + [1] * 19 + [2] * 2)
    shifted = x + torch.where(labels == 1, 3.0, 0.0)[:, None]
    found = class_distances(Features.of(shifted, labels=labels), Features.of(x, labels=labels), min_images=10)
    assert found[0].value == pytest.approx(0, abs=1e-9)
    assert found[1].value == pytest.approx(3.0**2 * 2)
    assert found[2].reason == "too few images: 2, and it needs 10"
    with pytest.raises(ValueError, match="--per_class"):
        class_distances(Features.of(x), Features.of(x, labels=labels))


def test_self_check_knows_its_answers(colour: Extractor, monkeypatch: pytest.MonkeyPatch) -> None:
    assert self_check(colour).count("ok  ") == 8
    monkeypatch.setattr("metrics.self_check.frechet_distance", lambda a, b: 12.0)
    with pytest.raises(ValueError, match="Fréchet distance of two Gaussians gave 12, the known answer is 11"):
        self_check(colour)


# --- what a reader needs to trust a score


def test_provenance(colour_file: Path) -> None:
    samples, reference = random_images(30), random_images(40, seed=1)
    scores = score(samples, reference, extractor=colour_file, seed=7)
    assert Extractor(colour_file).sha256 == hashlib.sha256(colour_file.read_bytes()).hexdigest()
    assert scores.num_samples == 30
    assert scores.settings["kid"] == {"subsets": 100, "subset_size": 1000, "seed": 7}
    assert scores.settings["is"] == {"splits": 10, "seed": 7}
    assert scores.settings["recall"] == {"neighbourhood": 3, "density_neighbourhood": 5}


def test_order_and_batches_do_not_matter(colour: Extractor) -> None:
    samples, reference = random_images(30), random_images(40, seed=1)
    scores = score(samples, reference, extractor=colour)
    again = score(Labelled(samples), Labelled(reference), extractor=colour, batch_size=7)
    assert again == scores


def test_too_few_images_are_null_with_the_reason(colour: Extractor) -> None:
    scores = score(random_images(1), random_images(40, seed=1), extractor=colour)
    of_many = {name: one for name, one in scores.scores.items() if name not in ("density", "coverage")}
    assert len(of_many) == 6
    for name, one in of_many.items():
        assert one.value is None
        assert one.reason is not None
        assert one.reason.startswith("mean_colour has no spatial" if "spatial" in name else "too few images: 1, ")
    few = score(random_images(9), random_images(5, seed=1), extractor=colour, metrics=["density"])
    assert few.scores["density"].reason == "too few images: 5, and it needs 6"

    three = score(random_images(3), random_images(40, seed=1), extractor=colour)
    assert three.scores["precision"].value is None  # the third neighbour takes four images
    assert three.scores["frechet_distance[mean_colour]"].value is not None


# --- what a user can get wrong


def test_images_that_are_none(colour: Extractor) -> None:
    with pytest.raises(ValueError, match="samples: there are no images"):
        score(random_images(0), random_images(4), extractor=colour)
    with pytest.raises(ValueError, match=r"reference: images are float32 \[3, 8, 8\]; extractors take uint8 RGB"):
        score(random_images(4), Labelled(torch.rand(4, 3, 8, 8)), extractor=colour)


def test_unknown_metric(colour: Extractor) -> None:
    with pytest.raises(ValueError, match="--metrics fidd: choose from fid, sfid, is, kid, precision"):
        score(random_images(4), random_images(4), extractor=colour, metrics=["fidd"])


def test_features_that_are_not_finite(colour: Extractor) -> None:
    with pytest.raises(ExtractorError, match=r"mean_colour: not finite on 2 of 3 images \(samples\)"):
        score(greys([0, 10, 0]), random_images(4), extractor=colour)


def test_logits_are_refused(tmp_path: Path) -> None:
    path = save_program(Logits(), PROBE, tmp_path / "logits.pt")
    with pytest.raises(ExtractorError, match="--extractor logits: its second output is not class probabilities"):
        score(random_images(4), random_images(4), extractor=path)


class Lacking:
    """A network on a device that cannot run it, as Apple's where float64 or an operation is asked for."""

    def __init__(self, module: nn.Module, error: Exception) -> None:
        self.module, self.error = module, error

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        if images.device.type != "cpu":
            raise self.error
        return self.module(images)

    def to(self, device: torch.device) -> Lacking:
        return self


@pytest.mark.parametrize("error", [TypeError("no float64"), NotImplementedError("aten::x"), RuntimeError("float64")])
def test_an_extractor_runs_on_the_cpu_where_its_device_lacks_what_it_needs(
    error: Exception, colour: Extractor, colour_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = Extractor(colour_file)
    elsewhere.module, elsewhere.device = Lacking(elsewhere.module, error), torch.device("meta")  # pyright: ignore
    pair = random_images(6), random_images(6, seed=1)
    ours, theirs = (score(*pair, extractor=each, batch_size=2) for each in (elsewhere, colour))
    assert ours.scores == theirs.scores
    said = "--extractor mean_colour: meta lacks what it needs; it runs on the CPU\n"
    assert capsys.readouterr().err.count(said) == 1


def test_another_failure_on_a_device_is_not_hidden_by_the_cpu(colour_file: Path) -> None:
    elsewhere = Extractor(colour_file)
    failing = Lacking(elsewhere.module, RuntimeError("two devices"))
    elsewhere.module, elsewhere.device = failing, torch.device("meta")  # pyright: ignore
    with pytest.raises(ExtractorError, match=r"it failed on uint8 \[n 3 h w\] images \(two devices\)"):
        score(random_images(4), random_images(4), extractor=elsewhere)


def test_files_that_are_no_extractor(tmp_path: Path, colour_file: Path) -> None:
    with pytest.raises(ExtractorError, match="--extractor nothing: no such file, nor one of inception, vgg16, clip-"):
        Extractor("nothing")
    (tmp_path / "cut.pt").write_bytes(colour_file.read_bytes()[:500])
    with pytest.raises(ExtractorError, match=r"--extractor .*cut\.pt: not a TorchScript file"):
        Extractor(tmp_path / "cut.pt")
    one_output = save_program(nn.Flatten(), PROBE, tmp_path / "flat.pt")
    with pytest.raises(ExtractorError, match="--extractor flat: "):
        score(random_images(4), random_images(4), extractor=one_output)
    with pytest.raises(ExtractorError, match="brings its own weights"):
        Extractor(colour_file, weights_path=colour_file)


@pytest.mark.parametrize("name", ["inception", "clip-rn50"])
def test_no_network_is_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        assert socket.getdefaulttimeout() is not None  # or it would hang where packets vanish
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ExtractorError) as caught:
        Extractor(name)
    message = str(caught.value)
    assert "\n" not in message
    for words in (
        f"--extractor {name}",
        "no route to host",
        "--weights_path FILE",
        "FILE.pt2",
        "make demo",
    ):
        assert words in message
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert socket.getdefaulttimeout() is None


# --- Inception


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the format that torch-fidelity downloads: a state dict."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: object, **__: object) -> None:
            pass

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Unloaded("random", ["2048"], feature_extractor_weights_path=str(folder / "empty.pth"))
    torch.save(module.state_dict(), folder / "weights.pth")
    return folder / "weights.pth"


def test_inception_with_a_file_of_weights(inception_weights: Path) -> None:
    samples, reference = random_images(2, seed=3), random_images(3, seed=4)
    extractor = Extractor("inception", weights_path=inception_weights)
    x, y = (extractor(image_batches(each, 2), len(each), progress=False) for each in (samples, reference))
    scores = compare(x, y, extractor)
    assert list(scores.scores) == list(DEFAULT)
    known = {name for name, one in scores.scores.items() if one.value is not None}
    assert known == {"fid", "sfid", "kid"}  # the others want more images
    assert x.spatial is not None
    assert x.spatial.mean.shape == x.spatial.covariance.shape[:1] == (7 * 17 * 17,)
    neighbours = count_neighbours(x.features, y.features, neighbourhood=1)
    assert neighbours["precision"].value is not None
    assert not extractor.published_weights
    assert classifier_score(x.logits, splits=1).value >= 1
    assert (extractor.name, x.features.shape[1]) == ("inception", 2048)
    assert len(extractor.sha256) == 64


def test_weights_of_something_else(tmp_path: Path, colour_file: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ExtractorError, match=r"--weights_path .*other\.pth: these are not the weights of inception"):
        Extractor("inception", weights_path=tmp_path / "other.pth")
    with pytest.raises(ExtractorError, match=r"--weights_path .*nowhere\.pth: no such file"):
        Extractor("inception", weights_path=tmp_path / "nowhere.pth")
    with pytest.raises(ExtractorError, match="loads dinov2-vit-s-14 from torch hub's cache alone"):
        Extractor("dinov2-vit-s-14", weights_path=colour_file)


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_weights_are_not_unpickled(tmp_path: Path) -> None:
    torch.save({"weight": Trap(tmp_path / "sprung")}, tmp_path / "trap.pth")
    with pytest.raises(ExtractorError, match="not the weights of inception"):
        Extractor("inception", weights_path=tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()


# --- the classifier that stands in for Inception where there is no network


def stripes(num: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Level, upright and slanted stripes, in any two colours."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % 3
    rows, columns = torch.meshgrid(torch.arange(24), torch.arange(24), indexing="ij")
    phases = torch.stack([rows, columns, rows + columns])[labels]
    shift = torch.randint(0, 8, (num, 1, 1), generator=generator)
    bright = ((phases + shift) % 8 < 4)[:, None]
    light = torch.randint(160, 256, (num, 3, 1, 1), generator=generator)
    dark = torch.randint(0, 96, (num, 3, 1, 1), generator=generator)
    return torch.where(bright, light, dark).to(torch.uint8), labels


def test_classifier_learns_and_serves_as_extractor(tmp_path: Path) -> None:
    images, labels = stripes(300, seed=0)
    held_out, held_out_labels = stripes(90, seed=1)
    classifier = train_classifier(images, labels, 3, batch_size=30, progress=False)
    assert (classifier.predict(held_out) == held_out_labels).float().mean() >= 0.98

    path = classifier.save(tmp_path / "stripes.pt")
    assert [found.name for found in tmp_path.iterdir()] == ["stripes.pt"]  # nothing half-written beside it
    for mine, loaded in zip(classifier(held_out), load_program(path)(held_out), strict=True):
        torch.testing.assert_close(mine, loaded)

    scores = score(held_out, images, extractor=path)
    assert 2.5 < value(scores, "classifier_score[stripes]") <= 3
    noise = random_images(90)
    worse = score(noise, images, extractor=path)
    name = "frechet_distance[stripes]"
    assert value(scores, name) < value(worse, name)


def test_classifier_is_its_seed() -> None:
    images, labels = stripes(30, seed=0)
    one, same, other = (
        train_classifier(images, labels, 3, seed=seed, epochs=1, progress=False).to_logits.weight for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_classifier_refuses_foreign_labels() -> None:
    images, labels = stripes(6, seed=0)
    with pytest.raises(ValueError, match=r"labels from 0 to 2: classes are 0\.\.1"):
        train_classifier(images, labels, 2, progress=False)
