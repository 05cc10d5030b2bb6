"""Feature extractors: files, names, weights and devices; what is not an extractor is refused in one line."""

from __future__ import annotations

import socket
import urllib.error
from pathlib import Path

import pytest
import torch
from mean_colour import PROBE, MeanColour, random_images
from scoring import score
from torch import Tensor, nn

from metrics.extractors import ExtractorError
from metrics.features import Extractor
from metrics.fidelity import classifier_score, compute_scores
from metrics.image_batches import image_batches
from metrics.manifold import count_neighbours
from metrics.programs import save_program
from metrics.scores import DEFAULT


class Logits(MeanColour):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        colour, _ = super().forward(images)
        return colour, colour


def test_logits_are_refused(tmp_path: Path) -> None:
    path = save_program(Logits(), PROBE, tmp_path / "logits.pt")
    with pytest.raises(ExtractorError, match="--extractor logits: its second output is not class probabilities"):
        score(random_images(4), random_images(4), extractor=path)


class Lacking:
    """A network on a device that cannot run it, such as Apple's where it needs float64 or a missing operation."""

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
        "scripts/recognise.py --data.path IMAGES --classifier FILE.pt2",
    ):
        assert words in message
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert socket.getdefaulttimeout() is None


# --- Inception


def test_inception_with_a_file_of_weights(inception_weights: Path) -> None:
    samples, reference = random_images(2, seed=3), random_images(3, seed=4)
    extractor = Extractor("inception", weights_path=inception_weights)
    x, y = (extractor(image_batches(each, 2), len(each), progress=False) for each in (samples, reference))
    scores = compute_scores(x, y, extractor)
    assert list(scores.scores) == list(DEFAULT)
    known = {name for name, one in scores.scores.items() if one.value is not None}
    assert known == {"fid", "sfid", "kid"}  # the others want more images
    assert x.spatial is not None
    assert x.spatial.mean.shape == x.spatial.covariance.shape[:1] == (7 * 17 * 17,)
    neighbours = count_neighbours(x.features, y.features, neighbourhood=1)
    assert neighbours["precision"].value is not None
    assert not extractor.published_weights
    assert classifier_score(x.logits, splits=1).value >= 1 - 1e-9  # up to rounding
    assert (extractor.name, x.features.shape[1]) == ("inception", 2048)
    assert len(extractor.sha256) == 64


def test_weights_of_something_else(tmp_path: Path, colour_file: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ExtractorError, match=r"--weights_path .*other\.pth: not the weights of inception"):
        Extractor("inception", weights_path=tmp_path / "other.pth")
    with pytest.raises(ExtractorError, match=r"--weights_path .*nowhere\.pth: no such file"):
        Extractor("inception", weights_path=tmp_path / "nowhere.pth")
    with pytest.raises(ExtractorError, match="loads dinov2-vit-s-14 only from torch hub's cache"):
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
