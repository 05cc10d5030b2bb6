"""The classifier that stands in for Inception where there is no network."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mean_colour import random_images
from scoring import score, value
from torch import Tensor, nn

from metrics.classifier import SmallClassifier, hide_square, train_classifier
from metrics.perceptual import perceptual_network
from metrics.programs import load_program
from sharing.studio import Request, Studio


def stripes(num: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Horizontal, vertical and diagonal stripes, in random pairs of colours."""
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


def test_the_classifier_is_a_function_of_its_seed() -> None:
    images, labels = stripes(30, seed=0)
    one, same, other = (
        train_classifier(images, labels, 3, seed=seed, epochs=1, progress=False).to_logits.weight for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("thorough", [False, True])
def test_a_larger_classifier_learns_too_and_mirrors_its_images(thorough: bool) -> None:
    images, labels = stripes(300, seed=0)
    held_out, held_out_labels = stripes(90, seed=1)
    mirrored = held_out.flip(-1)  # slanted the other way, which it has seen
    how = {"side": 16, "width": 32, "batch_size": 30, "progress": False}
    classifier = train_classifier(images, labels, 3, mirror=True, thorough=thorough, **how)
    assert len(classifier.stages) == 2
    assert (classifier.predict(torch.cat([held_out, mirrored])) == held_out_labels.repeat(2)).float().mean() >= 0.95
    between = held_out // 2 + held_out.roll(1, 0) // 2  # of two classes each
    shares, of_mirrored = classifier(between)[1], classifier(between.flip(-1))[1]
    assert torch.equal(classifier.predict(between), (shares + of_mirrored).argmax(dim=1))
    assert not torch.equal(shares.argmax(dim=1), of_mirrored.argmax(dim=1))
    with pytest.raises(ValueError, match="--side 24: give a power of two, from 8 on"):
        train_classifier(images, labels, 3, side=24, progress=False)


@pytest.mark.parametrize(("thorough", "sides"), [(False, [16, 16, 8, 8, 4, 4]), (True, [32, 32, 16, 16, 8, 8, 4])])
def test_a_thorough_classifier_looks_at_every_pixel_before_halving(thorough: bool, sides: list[int]) -> None:
    classifier = SmallClassifier(2, width=2, thorough=thorough).eval()
    of_convolutions: list[int] = []
    for layer in classifier.stages.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _layer, _inputs, out: of_convolutions.append(out.shape[-1]))
    assert classifier.stages(torch.zeros(1, 3, 32, 32)).shape == (1, 8, 4, 4)
    assert of_convolutions == sides


def test_a_sixteenth_of_each_image_is_hidden_somewhere_else() -> None:
    ones = torch.ones(4000, 2, 16, 32)
    hidden = hide_square(ones, torch.Generator().manual_seed(0)) == 0
    assert torch.equal(hidden[:, 0], hidden[:, 1])
    assert (hidden[:, 0].sum(dim=(1, 2)) == 4 * 8).all()
    corner = hidden[:, 0].flatten(1).int().argmax(dim=1)
    assert len(corner.unique()) > 200
    assert (corner % 32 <= 24).all()  # a rectangle, not wrapped around
    assert hidden[:, 0].any(dim=0).all()


def test_perceptual_features_add_up_the_distances_of_all_stages(tmp_path: Path) -> None:
    images, labels = stripes(60, seed=0)
    classifier = train_classifier(images, labels, 3, epochs=1, progress=False)
    network = perceptual_network(str(classifier.save_perceptual(tmp_path / "features.pt2")))
    one, other = (images[at : at + 2].float() / 127.5 - 1 for at in (0, 2))
    found = (network(one) - network(other)).square().mean(dim=1)
    expected = torch.zeros(2)
    for stage in classifier.stages:
        one, other = stage(one), stage(other)
        between = F.normalize(one, dim=1, eps=1e-6) - F.normalize(other, dim=1, eps=1e-6)
        expected += between.square().sum(dim=1).mean(dim=(1, 2))
    torch.testing.assert_close(found, expected)
    first = images[:2].float() / 127.5 - 1
    with torch.autocast("cpu", torch.bfloat16):  # as in training
        roughly = network(first)
    assert roughly.dtype == torch.float32
    torch.testing.assert_close(roughly, network(first), rtol=0.1, atol=0.1)


def test_classifier_refuses_foreign_labels() -> None:
    images, labels = stripes(6, seed=0)
    with pytest.raises(ValueError, match=r"labels from 0 to 2: classes are 0\.\.1"):
        train_classifier(images, labels, 2, progress=False)


def test_a_classifier_recognises_classes_by_name(folder, monkeypatch):
    """One of another data set of as many classes counted those of the same number."""
    monkeypatch.chdir(folder)
    shapes, pictures = Studio(["runs/tiny"]).classes("runs/tiny"), torch.zeros(2, 3, 32, 32, dtype=torch.uint8)

    classifier = SmallClassifier(10)
    with torch.no_grad():
        classifier.to_logits.bias[3] = 1e3  # all are stars

    def counted(classes):
        studio = Studio(["runs/tiny"], classifier=classifier.save(folder / "stars.pt", classes))
        request = Request("runs/tiny", "", 0, 2, "ddpm", 3, 1.0)
        return [studio.num_recognised(replace(request, of_class=name), pictures) for name in shapes]

    assert counted(shapes) == counted([]) == [2 * (name == "star") for name in shapes]
    assert counted(shapes[::-1]) == [2 * (name == shapes[-4]) for name in shapes]
    assert counted([f"digit {number}" for number in range(10)]) == [None] * 10
