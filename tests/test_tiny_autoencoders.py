"""Published tiny autoencoders: import of their files, parity with their code, and errors for files that do not pair."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderTiny
from processes import ROOT, script
from safetensors.torch import load_file, save_file

from autoencoders.codec import KINDS, AutoencoderError, create_codec
from autoencoders.pretrained import with_statistics
from autoencoders.tiny import PooledTinyAutoencoder, from_published
from conversion.diffusers_pipeline import write_folder
from diffusion import GaussianDiffusion
from experiment.build import open_split
from experiment.cli import parse
from experiment.config import DataConfig, SamplingConfig

SCRIPT = script("scripts/import_checkpoint.py")
PUBLISHED = ROOT.parent / "shared" / "autoencoder"


def files(latent_channels, pooled=False):
    """Random weights of an encoder and a decoder, in the published format."""
    torch.manual_seed(0)
    weights = (PooledTinyAutoencoder if pooled else AutoencoderTiny)(latent_channels=latent_channels).state_dict()
    encoder = {name.removeprefix("encoder.layers."): weights[name] for name in weights if name.startswith("encoder")}
    decoder = {
        re.sub(r"^decoder\.layers\.(\d+)", lambda found: str(int(found[1]) + 1), name): weights[name]
        for name in weights
        if name.startswith("decoder")
    }
    return encoder, decoder


@pytest.mark.parametrize(("channels", "pooled"), [(4, False), (16, False), (32, True)], ids=["sd", "sd3", "flux2"])
def test_a_pair_of_files_becomes_an_autoencoder_of_normalised_latents(channels, pooled, tmp_path):
    for name, weights in zip(("encoder.pth", "decoder.pth"), files(channels, pooled), strict=True):
        torch.save(weights, tmp_path / name)
    asked = ["--source", "tiny", "--weights", str(tmp_path / "encoder.pth"), str(tmp_path / "decoder.pth")]
    asked += ["--output", str(tmp_path / "out"), "--data.num_images", "40", "--data.image_size", "32"]
    SCRIPT.main(parse(SCRIPT.ImportConfig, SCRIPT.as_list(asked)))
    codec = create_codec(str(tmp_path / "out"))
    assert codec.latent_shape(32, 32) == (channels, 4, 4)
    images = torch.stack([image for image, _ in open_split(DataConfig(num_images=40, image_size=32), "train")])
    x_0 = codec.encode(images)
    assert x_0.mean(dim=(0, 2, 3)).abs().max() < 0.01
    assert (x_0.std(dim=(0, 2, 3)) - 1).abs().max() < 0.01
    assert codec.decode(x_0).shape == images.shape
    again = from_published(*files(channels, pooled)).state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in codec.autoencoder.state_dict().items())


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published weights lie beside the project where there are any")
def test_the_published_autoencoder_of_flux2_encodes_and_decodes_as_its_own_code_does():
    weights = [load_file(PUBLISHED / f"taef2_{half}.safetensors") for half in ("encoder", "decoder")]
    fixture, autoencoder = load_file(PUBLISHED / "taef2_fixture.safetensors"), from_published(*weights)
    with torch.inference_mode():
        latents = autoencoder.encode(fixture["in/images_0_1"] * 2 - 1).latents
        decoded = autoencoder.decode(fixture["out/latents"]).sample / 2 + 0.5
    torch.testing.assert_close(latents, fixture["out/latents"], atol=1e-3, rtol=0)
    torch.testing.assert_close(decoded, fixture["out/decoded"], atol=1e-3, rtol=0)


def test_files_that_are_not_an_encoder_and_its_decoder_are_refused(tmp_path):
    encoder, decoder = files(4)
    _, other = files(16)
    plain, _ = files(32)
    bad = [
        (decoder, encoder, "they are exchanged, the encoder comes first"),
        (encoder, other, "the encoder makes 4 channels and the decoder reads 16; take both of one version"),
        (encoder, encoder, "not the encoder and the decoder of a tiny autoencoder"),
        (encoder, {}, "give ENCODER DECODER as published"),
        (plain, files(32, pooled=True)[1], "not the encoder and the decoder of a tiny autoencoder"),
    ]
    for first, second, words in bad:
        with pytest.raises(AutoencoderError, match=words):
            from_published(first, second)
    save_file(encoder, tmp_path / "encoder.safetensors")
    asked = {"source": "tiny", "output": tmp_path / "out", "data": DataConfig(num_images=40, image_size=32)}
    with pytest.raises(ValueError, match="source tiny is two files, --weights ENCODER DECODER"):
        SCRIPT.main(SCRIPT.ImportConfig(weights=tmp_path / "encoder.safetensors", **asked))
    with pytest.raises(ValueError, match=r"--weights .*none\.pth: no such file"):
        SCRIPT.main(SCRIPT.ImportConfig(weights=[tmp_path / "encoder.safetensors", Path("none.pth")], **asked))
    assert not (tmp_path / "out").exists()
    assert json.loads(SCRIPT.as_list(["--weights", "a", "b", "--output", "c"])[1]) == ["a", "b"]


def test_representations_are_not_exported(tmp_path):
    representation = create_codec("embedded")
    representation.kind = KINDS["AutoencoderRAE"]  # one of its kind needs transformers
    checkpoint = SimpleNamespace(
        build_diffusion=GaussianDiffusion, config=SimpleNamespace(diffusion=SimpleNamespace(kind="gaussian"))
    )
    sampling = SamplingConfig(sampler="ddpm", spacing="uniform")
    with pytest.raises(ValueError, match="which the pipeline cannot use"):
        write_folder(tmp_path / "out", checkpoint, representation, sampling, native=False)
    assert not (tmp_path / "out").exists()


def test_a_channel_that_never_changes_is_refused():
    """Its standard deviation of zero would be a divisor."""
    autoencoder = from_published(*files(4))
    with torch.no_grad():
        autoencoder.encoder.layers[-1].weight[1] = 0
    with pytest.raises(ValueError, match=r"latent channels \[1\] are the same in all of these images"):
        with_statistics(autoencoder, torch.rand(2, 3, 16, 16))
