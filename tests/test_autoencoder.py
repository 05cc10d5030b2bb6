import inspect
import json

import pytest
import torch

from autoencoders.codec import EMBEDDED, AutoencoderError, LatentCodec, PixelCodec, create_codec
from data import open_dataset


@pytest.fixture(scope="module")
def codec():
    return create_codec("embedded")


def images(num=20, size=64, difficulty="easy"):
    shapes = open_dataset("shapes", split="test", image_size=size, num_images=100, difficulty=difficulty)
    return torch.stack([shapes[i][0] for i in range(num)])


@pytest.mark.parametrize(("difficulty", "decibels"), [("easy", 34), ("medium", 30), ("hard", 24)])
def test_embedded_autoencoder_reconstructs_shapes(codec, difficulty, decibels):
    batch = images(difficulty=difficulty)
    error = (codec.decode(codec.encode(batch)).float() - batch.float()).div(255).square().mean(dim=(1, 2, 3))
    assert (-10 * error.log10()).mean() > decibels


@pytest.mark.parametrize(("name", "decibels"), [("embedded", 21.5), ("embedded-f8c16", 25.5), ("embedded-taef2", 24.5)])
def test_the_embedded_autoencoders_reach_their_required_psnr(name, decibels):
    figures = json.loads((EMBEDDED[name] / "metrics.json").read_text())
    assert figures["psnr_caltech101_64"] > decibels
    assert min(figures[f"psnr_shapes_{difficulty}"] for difficulty in ("easy", "medium", "hard")) > 24


def test_latents_have_about_unit_variance(codec):
    x_0 = codec.encode(images(), torch.Generator().manual_seed(0))
    assert x_0.shape == (20, 4, 8, 8)
    assert 0.5 < x_0.std() < 2
    assert x_0.mean().abs() < 0.7


def test_encode_is_prepare_then_draw(codec):
    batch = images(4)
    stored = codec.prepare(batch)
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = codec.draw(stored, noise)
    assert torch.equal(codec.encode(batch, torch.Generator().manual_seed(1)), expected)
    assert not torch.equal(codec.encode(batch), expected)


def test_codec_is_frozen(codec):
    assert not any(parameter.requires_grad for parameter in codec.parameters())
    assert not codec.train().autoencoder.training


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_asset_is_small(name):
    assert sum(path.stat().st_size for path in EMBEDDED[name].iterdir()) < 6_000_000


def test_local_folder_loads_like_the_embedded_one(codec):
    assert create_codec(str(EMBEDDED["embedded"])).identity["sha256"] == codec.identity["sha256"]


def test_pixels_survive_the_round_trip():
    batch, codec = images(4), PixelCodec()
    assert torch.equal(codec.decode(codec.encode(batch)), batch)
    assert codec.encode(batch).abs().max() <= 1 == codec.limit
    spread = codec.encode(batch, torch.Generator().manual_seed(0))  # over each level's width
    assert torch.equal(codec.decode(spread), batch)
    assert (spread - codec.encode(batch)).std().item() == pytest.approx(1 / 127.5 / 12**0.5, rel=0.05)
    assert codec.latent_shape(28, 30) == (3, 28, 30)


def test_image_size_that_the_autoencoder_cannot_divide(codec):
    with pytest.raises(AutoencoderError, match=r"--data.image_size 60x64.*multiple of 8"):
        codec.latent_shape(60, 64)


def test_missing_folder_names_the_alternatives():
    with pytest.raises(AutoencoderError, match=r"--autoencoder ./nowhere: no such folder; .*'embedded'"):
        create_codec("./nowhere")


def test_unreachable_hub_names_the_alternatives(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AutoencoderError, match=r"(?s)hub did not serve it.*'embedded'") as caught:
        LatentCodec("stabilityai/sd-vae-ft-ema")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("config", "message"), [("{", "not JSON"), ('{"_class_name": "VQModel"}', "VQModel")])
def test_folder_of_something_else(tmp_path, config, message):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(AutoencoderError, match=message):
        create_codec(str(tmp_path))


def test_weights_cut_short(tmp_path):
    (tmp_path / "config.json").write_text((EMBEDDED["embedded"] / "config.json").read_text())
    weights = (EMBEDDED["embedded"] / "diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(AutoencoderError, match="do not load"):
        create_codec(str(tmp_path))


@pytest.mark.parametrize("read", [LatentCodec.prepare, PixelCodec.prepare, PixelCodec.encode])
def test_images_that_are_not_bytes_from_0_to_255_are_refused(codec, read):
    """Images from 0 to 1 would be almost black; only in tests are signatures checked."""
    batch = images(2)
    for wrong in (batch / 255, batch[0], batch.movedim(1, -1)):
        with pytest.raises(AutoencoderError, match=r"a codec takes RGB from 0 to 255 in uint8, \[n, 3, h, w\]"):
            inspect.unwrap(read)(codec if read is LatentCodec.prepare else PixelCodec(), wrong)
