"""timm's models as feature extractors, compared with timm called by hand."""

import hashlib
import time
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from scoring import score
from timm.data import create_transform, resolve_model_data_config
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, resize

from metrics.extractors import ExtractorError
from metrics.features import Extractor
from metrics.image_batches import image_batches
from metrics.timm_models import TimmFeatures

SMALL = ["test_vit", "test_resnet", "test_efficientnet", "test_convnext", "test_byobnet"]


def smooth(num, h, w, seed=0):
    """Images without noise, like photographs."""
    noise = torch.rand(num, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(noise, (h, w), mode="bilinear") * 255).round().to(torch.uint8)


def model_of(name, seed=0, **settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(name, **settings)
        for parameter in model.parameters():  # some begin at zero, and would say nothing
            torch.nn.init.normal_(parameter, std=0.05) if not parameter.any() else None
    return model.eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A function that writes a model's weights to a file."""
    folder = tmp_path_factory.mktemp("weights")

    def write(model, name="model.safetensors", wrap=lambda state: state):
        state = wrap({key: tensor.contiguous() for key, tensor in model.state_dict().items()})
        save_file(state, folder / name) if name.endswith("safetensors") else torch.save(state, folder / name)
        return folder / name

    return write


def extract(extractor, images):
    return extractor(image_batches(images, 2), len(images), progress=False)


@pytest.mark.parametrize("name", SMALL)
def test_features_and_classes_are_those_of_timm_called_by_hand(name, weights):
    model = model_of(name, num_classes=7)
    found = extract(Extractor(f"timm:{name}", weights_path=weights(model)), smooth(3, 64, 64))

    config = resolve_model_data_config(model)
    side = int(config["input_size"][1] / config["crop_pct"])
    interpolation = InterpolationMode(config["interpolation"])
    pixels = resize(smooth(3, 64, 64).float(), [side], interpolation, antialias=True).clamp(0, 255) / 255
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        hidden = model.forward_features((center_crop(pixels, config["input_size"][1:]) - mean) / std)
        features, logits = model.forward_head(hidden, pre_logits=True), model.forward_head(hidden)
    torch.testing.assert_close(found.features, features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.logits.softmax(dim=1), logits.softmax(dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("crop", [{}, {"crop_mode": "squash"}, {"crop_mode": "border"}, {"input_size": (3, 128, 160)}])
@pytest.mark.parametrize("size", [(64, 64), (50, 75), (300, 211)])
def test_preprocessing_is_timms_but_for_the_rounding_of_8_bits(crop, size):
    model = model_of("test_resnet")
    model.pretrained_cfg = {**model.pretrained_cfg, **crop}
    images = smooth(2, *size)
    found = TimmFeatures(model).preprocess(images)
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    by_pil = torch.stack([transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    assert found.shape == by_pil.shape
    close = (found - by_pil).abs() < 2 / 255 / 0.22
    assert close.float().mean() >= (0.98 if crop.get("crop_mode") == "border" else 1)  # a border may be a pixel off


def test_scores_bear_timms_name_and_the_hash_of_the_weights(weights):
    model = model_of("test_vit", num_classes=5)
    file, plain = weights(model, "a.safetensors"), weights(model, "a.pth")
    wrapped = weights(model, "a.bin", wrap=lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}})
    samples, reference = smooth(20, 32, 32), smooth(12, 40, 40, seed=1)
    extractor = Extractor("timm:test_vit", weights_path=file)
    scores = score(samples, reference, extractor)
    assert {"frechet_distance[test_vit]", "classifier_score[test_vit]", "kernel_distance[test_vit]"} <= set(
        scores.scores
    )
    assert 1 <= scores.scores["classifier_score[test_vit]"].value <= 5
    assert extractor.name == "test_vit"

    digest = hashlib.sha256()
    for key, tensor in sorted(TimmFeatures(model).state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    hashes = {Extractor("timm:test_vit", weights_path=path).sha256 for path in (file, plain, wrapped)}
    assert hashes == {extractor.sha256} == {digest.hexdigest()}
    other = Extractor("timm:test_vit", weights_path=weights(model_of("test_vit", seed=1), "b.safetensors"))
    assert other.sha256 not in hashes


@pytest.mark.parametrize("name", ["test_vit", "test_mambaout"])  # of the second timm has no weights
def test_without_a_classifier_there_is_no_classifier_score(name, weights):
    file = weights(model_of(name, num_classes=0), f"{name}.safetensors")
    images = smooth(4, 32, 32)
    scores = score(images, images, extractor=f"timm:{name}", weights_path=file, metrics=["fid", "is"])
    assert scores.scores[f"frechet_distance[{name}]"].value == pytest.approx(0, abs=1e-6)
    assert scores.scores[f"classifier_score[{name}]"].reason == f"{name} has no class probabilities"


# --- mistakes


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_weights_of_something_else(weights, tmp_path):
    torch.save({"weight": torch.zeros(3), "trap": Trap(tmp_path / "sprung")}, tmp_path / "trap.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    (tmp_path / "text.safetensors").write_text("not weights")
    other = weights(model_of("test_resnet"), "resnet.safetensors")
    for path in (tmp_path / "trap.pth", tmp_path / "tensor.pth", tmp_path / "text.safetensors", other):
        with pytest.raises(
            ExtractorError, match=rf"^--weights_path .*{path.name}: not weights of timm's test_vit \(.+\)$"
        ) as caught:
            Extractor("timm:test_vit", weights_path=path)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(ExtractorError, match=r"--weights_path .*nowhere\.pth: no such file"):
        Extractor("timm:test_vit", weights_path=tmp_path / "nowhere.pth")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet51", "timm .* has no such model; it has .*resnet50"),
        ("vit_tiny_patch16_225", "it has .*vit_tiny_patch16_224"),
        ("resnet50.a9_in1k", r"it has resnet50\.\w+_in1k, resnet50"),
        ("qqqqqqqq", "has no such model$"),
    ],
)
def test_names_that_timm_does_not_know(name, words):
    with pytest.raises(ExtractorError, match=rf"^--extractor timm:{name}: .*{words}"):
        Extractor(f"timm:{name}")


def test_without_a_network_one_line_names_the_flag_at_once(monkeypatch, tmp_path, capfd):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    naps = []
    monkeypatch.setattr(time, "sleep", naps.append)  # between one try and the next
    with pytest.raises(
        ExtractorError, match=r"^--extractor timm:test_vit: the hub does not answer.*--weights_path FILE"
    ):
        Extractor("timm:test_vit")
    assert not naps
    assert capfd.readouterr().err == ""
