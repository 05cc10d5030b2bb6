"""Scores against sets whose answers are known by construction."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch_fidelity
from mean_colour import random_images
from scoring import score, value
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from metrics.extractors import ExtractorError, ProgramExtractor
from metrics.features import Extractor, Features
from metrics.fidelity import class_distances, classifier_score, compute_scores, kernel_distance
from metrics.frechet import Moments
from metrics.image_batches import image_batches
from metrics.self_check import self_check


class TensorDataset(Dataset):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


class Labelled(TensorDataset):
    """Images with labels, as in a dataset of photographs."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], index


def greys(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)


def gaussian(num: int, mean: list[float], covariance: list[list[float]], *, seed: int) -> Features:
    """Features whose sample mean and covariance are exactly as given."""
    z = torch.randn(num, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    z = z - z.mean(dim=0)
    z = z @ torch.linalg.inv(torch.linalg.cholesky(z.T @ z / (num - 1))).T  # white to the last digit
    x = z @ torch.linalg.cholesky(torch.tensor(covariance, dtype=torch.float64)).T
    return Features.of(x + torch.tensor(mean, dtype=torch.float64))


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
    scores = compute_scores(samples, reference, colour, metrics=["fid"])
    assert list(scores.scores) == ["frechet_distance[mean_colour]"]
    assert value(scores, "frechet_distance[mean_colour]") == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_of_one_feature(colour: Extractor) -> None:
    samples, reference = gaussian(20, [2.0], [[4.0]], seed=0), gaussian(30, [0.0], [[1.0]], seed=1)
    scores = compute_scores(samples, reference, colour, metrics=["fid"])
    assert value(scores, "frechet_distance[mean_colour]") == pytest.approx(2**2 + (2 - 1) ** 2, rel=1e-5)


def test_precision_and_recall_are_not_swapped(colour: Extractor) -> None:
    """9 of 15 samples lie among the reference, and no sample comes near half of the reference."""
    reference = greys([*range(100, 120, 2), *range(200, 220, 2)])
    samples = greys([*range(101, 119, 2), *range(10, 22, 2)])
    scores = score(samples, reference, extractor=colour)
    assert value(scores, "precision") == pytest.approx(9 / 15)
    assert value(scores, "recall") == pytest.approx(10 / 20)

    swapped = score(reference, samples, extractor=colour)
    assert value(swapped, "precision") == pytest.approx(10 / 20)


def test_classifier_score_takes_probabilities(colour: Extractor) -> None:
    """If every image is certain and classes are equally frequent, the score is their number; if all are uniform, it is
    1."""
    pure = torch.zeros(30, 3, 8, 8, dtype=torch.uint8)
    pure[torch.arange(30), torch.arange(30) % 3] = 200
    for images, expected in (pure, 3.0), (greys([100] * 30), 1.0):
        assert value(score(images, pure, colour, ["is"]), "classifier_score[mean_colour]") >= 1
        logits = colour(image_batches(images), len(images), metrics=["is"], progress=False).logits
        whole = classifier_score(logits, splits=1)
        assert whole.value == pytest.approx(expected, rel=1e-5)
        assert whole.std is None


def test_kernel_distance_of_whole_sets(colour: Extractor) -> None:
    """The unbiased estimate, written out (Bińkowski et al. 2018, eq. 4); the subset size is limited to that of the
    sets."""
    x = gaussian(20, [1.0, 0.0], [[1.0, 0.0], [0.0, 1.0]], seed=0)
    y = gaussian(20, [0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]], seed=1)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a.double() @ b.double().T / 2 + 1) ** 3

    def within(a: Tensor) -> Tensor:
        gram = kernel(a, a)
        return (gram.sum() - gram.trace()) / (20 * 19)

    expected = within(x.features) + within(y.features) - 2 * kernel(x.features, y.features).mean()
    scores = compute_scores(x, y, colour, metrics=["kid"])
    assert value(scores, "kernel_distance[mean_colour]") == pytest.approx(float(expected), rel=1e-6)
    assert scores.scores["kernel_distance[mean_colour]"].std is None  # one subset: nothing varies


def test_kernel_subset_is_cut_to_the_smaller_set(colour: Extractor) -> None:
    samples, reference = random_images(25), random_images(40, seed=1)
    found = score(samples, reference, extractor=colour).scores["kernel_distance[mean_colour]"]
    assert found.spread == "standard deviation over 100 subsets of 25 images, no standard error"
    assert found.std is not None


def test_agrees_with_torch_fidelity(colour_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with its own entry point, in float32 and with the same registered extractor."""
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
    """With moments alone no features of single images are kept, and the other metrics say why they are missing."""
    samples, reference = random_images(60), random_images(90, seed=1, low=40)
    both = [
        colour(image_batches(images, 7), len(images), metrics=["fid"], progress=False)
        for images in (samples, reference)
    ]
    assert all(one.features is None and one.logits is None for one in both)
    kept = colour(image_batches(samples, 9), len(samples), metrics=["kid"], progress=False)
    for lean_half, half in zip(both[0].halves, kept.halves, strict=True):
        torch.testing.assert_close(lean_half.covariance, half.covariance)
    lean = compute_scores(*both, colour)
    full = score(samples, reference, extractor=colour)
    name = "frechet_distance[mean_colour]"
    assert value(lean, name) == pytest.approx(value(full, name), rel=1e-9)
    assert lean.scores["precision"].reason == "the reference holds moments, not the features of each image"


def test_spatial_distance_is_the_frechet_distance_of_spatial_features(colour: Extractor) -> None:
    """For known Gaussians; without spatial features on both sides there is no value."""
    x = gaussian(20, [0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]], seed=0)
    near = Moments(torch.tensor([0.0, 0.0]).double(), torch.diag(torch.tensor([4.0, 1.0])).double(), 20)
    far = Moments(torch.tensor([3.0, 0.0]).double(), torch.diag(torch.tensor([1.0, 1.0])).double(), 20)
    samples, reference = replace(x, spatial=near), replace(x, spatial=far)
    name = "spatial_frechet_distance[mean_colour]"
    assert value(compute_scores(samples, reference, colour, metrics=["sfid"]), name) == pytest.approx(
        3**2 + (2 - 1) ** 2
    )
    assert compute_scores(samples, x, colour, metrics=["sfid"]).scores[name].value is None


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


def test_missing_or_malformed_images_are_refused(colour: Extractor) -> None:
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
