"""Formats of published autoencoders as codecs, and what a latent cache must agree on with its codec."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import AutoencoderDC, AutoencoderRAE, VQModel
from hub_stub import Hub
from huggingface_hub import constants
from PIL import Image
from processes import TINY, run, script, weights
from small_autoencoders import FORMATS, MEAN, STD, create, write

from autoencoders import pretrained
from autoencoders.codec import AutoencoderError, PixelCodec, create_codec
from autoencoders.pretrained import hub_id
from conversion.diffusers_dit import without_shift
from data.images import DataError
from data.latents import LatentCache
from experiment.build import open_cache, open_split
from experiment.config import DataConfig

IMAGES = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
WITHOUT_POSTERIOR = ("taesd", "taef1")
PIPELINE = script("assets/diffusers/pipeline.py")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats")
    return {name: write(name, folder / name) for name in FORMATS}


@pytest.fixture(scope="module")
def codecs(folders):
    return {name: create_codec(path) for name, path in folders.items()}


def normalised(z, settings):
    """Normalise latents as diffusers' pipelines do: SDXL's where there are means, otherwise that of SD3 and FLUX."""
    if "latents_mean" in settings:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (MEAN, STD))
        return (z - mean) * settings["scaling_factor"] / std
    return (z - settings.get("shift_factor", 0.0)) * settings.get("scaling_factor", 1.0)


@pytest.mark.parametrize("name", FORMATS)
def test_latents_are_the_autoencoders_own_scaled_as_its_pipeline_does(name, codecs):
    codec, settings = codecs[name], FORMATS[name][1]
    encoded = codec.autoencoder.encode(IMAGES.float() / 127.5 - 1)
    z = encoded.latents if name in WITHOUT_POSTERIOR else encoded.latent_dist.mean
    x_0 = codec.encode(IMAGES)
    torch.testing.assert_close(x_0, normalised(z, settings))
    assert codec.factor == 8
    assert x_0.shape[1:] == codec.latent_shape(32, 32) == (settings["latent_channels"], 4, 4)
    decoded = codec.decode(x_0)
    assert decoded.shape == IMAGES.shape
    theirs = (codec.autoencoder.decode(z).sample * 127.5 + 127.5).round().clamp(0, 255)
    assert (decoded.float() - theirs).abs().max() <= 1
    assert theirs.std() > 1  # it says something
    assert not any(parameter.requires_grad for parameter in codec.parameters())


def deep(folder):
    """A small AutoencoderDC that reduces by four."""
    torch.manual_seed(0)
    halves = {"block_out_channels": (8, 8, 16), "layers_per_block": (1, 1, 1), "qkv_multiscales": ((), (), ())}
    settings = {f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in halves.items()}
    AutoencoderDC(latent_channels=4, scaling_factor=0.5, **settings).save_pretrained(folder)
    return str(folder)


def test_a_deep_compression_autoencoder_is_scaled_by_its_one_number(tmp_path):
    codec = create_codec(deep(tmp_path))
    z = codec.autoencoder.encode(IMAGES.float() / 127.5 - 1).latent
    torch.testing.assert_close(codec.encode(IMAGES), 0.5 * z)
    assert codec.latent_shape(32, 32) == tuple(z.shape[1:]) == (4, 8, 8)
    assert codec.decode(0.5 * z).shape == IMAGES.shape


@pytest.fixture
def representation(tmp_path):
    """A small RAE with a DINOv2 of random weights for images of 32 pixels."""
    pytest.importorskip(
        "transformers", reason="an AutoencoderRAE's encoder is one of transformers: pip install transformers"
    )
    shapes = {"encoder_hidden_size": 64, "encoder_patch_size": 14, "encoder_num_hidden_layers": 1, "patch_size": 8}
    shapes |= {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    torch.manual_seed(0)
    latents = {"latents_mean": torch.randn(64, 1, 1), "latents_std": torch.rand(64, 1, 1) + 0.5, "scaling_factor": 0.5}
    model = AutoencoderRAE("dinov2", decoder_intermediate_size=32, encoder_input_size=56, **shapes, **latents).eval()
    model.save_pretrained(tmp_path / "rae")
    return model, tmp_path / "rae"


def test_a_representation_autoencoder_scales_its_latents_itself_and_sees_pixels_from_0_to_1(representation):
    model, folder = representation
    codec = create_codec(str(folder))
    x_0 = model.encode(IMAGES.float() / 255).latent
    torch.testing.assert_close(codec.encode(IMAGES), x_0)
    assert codec.latent_shape(32, 32) == tuple(x_0.shape[1:]) == (64, 4, 4)
    theirs = (255 * model.decode(x_0).sample).round().clamp(0, 255)
    assert (codec.decode(x_0).float() - theirs).abs().max() <= 1
    assert codec.identity["scale"] == 0.5
    with pytest.raises(AutoencoderError, match=r"only gives images of 32 pixels"):
        codec.latent_shape(64, 64)


def test_without_transformers_a_representation_autoencoder_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderRAE"}')
    with pytest.raises(AutoencoderError, match=r"needs transformers: pip install -e '.\[rae\]'"):
        create_codec(str(tmp_path))


@pytest.mark.parametrize("name", FORMATS)
def test_stored_moments_give_posterior_samples_where_there_is_a_posterior(name, codecs):
    codec, settings = codecs[name], FORMATS[name][1]
    stored, channels = codec.prepare(IMAGES), settings["latent_channels"]
    noise = torch.randn(2, channels, 4, 4, generator=torch.Generator().manual_seed(1))
    drawn = codec.draw(stored.half(), noise)  # as caches keep it
    if name in WITHOUT_POSTERIOR:
        assert stored.shape == (2, channels, 4, 4)
        assert drawn.equal(codec.draw(stored.half(), torch.zeros_like(noise)))
        torch.testing.assert_close(drawn, codec.encode(IMAGES), atol=1e-3, rtol=1e-2)
        return
    posterior = codec.autoencoder.encode(IMAGES.float() / 127.5 - 1).latent_dist
    torch.testing.assert_close(
        drawn, normalised(posterior.mean + posterior.std * noise, settings), atol=2e-2, rtol=1e-2
    )
    assert not torch.allclose(drawn, codec.encode(IMAGES), atol=1e-2)


def test_a_tiny_encoder_sees_pixels_from_0_to_1(codecs):
    """This is TAESD's own convention, which diffusers' class converts to the usual one."""
    seen = []
    handle = codecs["taesd"].autoencoder.encoder.layers[0].register_forward_hook(lambda m, x, y: seen.append(x[0]))
    codecs["taesd"].prepare(IMAGES)
    handle.remove()
    torch.testing.assert_close(seen[0], IMAGES.float() / 255)


@pytest.mark.parametrize("name", FORMATS)
def test_an_exported_pipeline_decodes_the_same(name, codecs):
    pipeline = PIPELINE.ClassConditionalPipeline
    x_0 = codecs[name].encode(IMAGES)
    theirs = pipeline.decode(SimpleNamespace(vae=codecs[name].autoencoder), x_0)
    assert torch.from_numpy(theirs).permute(0, 3, 1, 2).equal(codecs[name].decode(x_0))


@pytest.mark.parametrize("name", ["playground", "sd3", "taesd"])
def test_what_diffusers_own_pipeline_of_dit_cannot_decode_is_refused(name, codecs):
    with pytest.raises(ValueError, match=r"--native: DiTPipeline (wants an AutoencoderKL|cannot shift)"):
        without_shift(codecs[name].autoencoder)


# --- identity


def with_decoder_of(seed, target):
    """The same autoencoder with another decoder, as if it had been fine-tuned."""
    tuned, other = create("flux"), create("flux", seed)
    assert not tuned.decoder.conv_out.weight.equal(other.decoder.conv_out.weight)
    tuned.decoder.load_state_dict(other.decoder.state_dict())
    tuned.save_pretrained(target)
    return str(target)


@pytest.mark.parametrize("name", ["sd", "flux", "taesd"])
def test_identity_is_of_what_encodes(name, folders, tmp_path):
    mine = create_codec(folders[name])
    shutil.copytree(folders[name], tmp_path / "moved")
    moved, other = create_codec(str(tmp_path / "moved")), create_codec(write(name, tmp_path / "other", seed=1))
    scaled = create_codec(write(name, tmp_path / "scaled", scaling_factor=2.0))
    assert moved.identity == mine.identity
    assert moved.provenance != mine.provenance
    assert other.identity["sha256"] != mine.identity["sha256"]
    assert other.provenance["decoder_sha256"] != mine.provenance["decoder_sha256"]
    assert scaled.identity == {**mine.identity, "scale": 2.0}
    assert mine.provenance["autoencoder"] == folders[name]
    assert mine.identity.items() <= mine.provenance.items()


def test_identity_is_plain_json_and_names_its_kind(codecs):
    found = {name: json.loads(json.dumps(codec.identity)) for name, codec in codecs.items()}
    assert found["playground"]["scale"] == [0.5 / std for std in STD]
    assert found["playground"]["shift"] == MEAN
    assert (found["flux"]["scale"], found["flux"]["shift"]) == (0.3611, 0.1159)
    assert {identity["codec"] for identity in found.values()} == {"AutoencoderKL", "AutoencoderTiny"}
    assert len({json.dumps(identity) for identity in (*found.values(), PixelCodec.identity)}) == len(FORMATS) + 1


def test_a_cache_of_one_decoder_serves_another_and_no_other_encoder(folders, tmp_path):
    config = DataConfig(num_images=12, image_size=32, cache=str(tmp_path / "cache"))
    accelerator, dataset = Accelerator(cpu=True), open_split(config, "test")
    first = create_codec(folders["flux"])
    second = create_codec(with_decoder_of(1, tmp_path / "tuned"))
    assert not first.decode(first.encode(IMAGES)).equal(second.decode(first.encode(IMAGES)))
    cache = open_cache(config, first, dataset, accelerator, flips=False)
    assert cache.manifest["autoencoder"] == folders["flux"]
    assert cache.manifest["decoder_sha256"] == first.provenance["decoder_sha256"]
    stamps = {path: path.stat().st_mtime_ns for path in cache.folder.iterdir()}
    again = open_cache(config, second, dataset, accelerator, flips=False)
    assert {path: path.stat().st_mtime_ns for path in again.folder.iterdir()} == stamps
    assert again.stored.equal(cache.stored)
    assert second.prepare(IMAGES).equal(first.prepare(IMAGES))  # bit for bit

    third = create_codec(write("flux", tmp_path / "other", seed=1))
    assert open_cache(config, third, dataset, accelerator, flips=False).folder != cache.folder
    with pytest.raises(DataError, match="sha256 is"):
        LatentCache(cache.folder, third.identity)


# --- what is refused


def test_a_folder_with_only_fp16_weights_is_read_in_float32(tmp_path):
    model = create("sd").half()
    model.save_pretrained(tmp_path, variant="fp16")
    codec = create_codec(str(tmp_path))
    found = codec.autoencoder.state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in model.state_dict().items())


def test_another_class_is_refused_by_name(tmp_path):
    VQModel(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path)
    words = "VQModel is not supported; give one of AutoencoderKL, AutoencoderTiny"
    with pytest.raises(AutoencoderError, match=words):
        create_codec(str(tmp_path))


REFUSED = {
    "std alone": ("sdxl", {"latents_std": STD}, "has to give latents_mean and latents_std together"),
    "shift beside means": ("playground", {"shift_factor": 0.1}, "and no shift_factor; fix it"),
    "too few": ("playground", {"latents_mean": MEAN[:3]}, "together, of 4 channels"),
    "grey": ("sd", {"in_channels": 1}, "it makes 3 channels of 1"),
    "larger images": ("taesd", {"upsampling_scaling_factor": 4}, "64 pixels of 8; images come back as RGB"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_autoencoders_that_cannot_be_represented_are_refused(case, tmp_path):
    name, changes, words = REFUSED[case]
    with pytest.raises(AutoencoderError, match=words):
        create_codec(write(name, tmp_path / "odd", **changes))


def test_images_smaller_than_the_reduction_get_a_sentence(codecs):
    words = "--data.image_size 4x4 is smaller than one latent pixel of .*, 8x8; use larger images"
    with pytest.raises(AutoencoderError, match=words):
        codecs["flux"].latent_shape(4, 4)


# --- the hub


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("stabilityai/sd-vae-ft-ema", ("stabilityai/sd-vae-ft-ema", None)),
        ("black-forest-labs/FLUX.1-dev/vae", ("black-forest-labs/FLUX.1-dev", "vae")),
        ("me/models/small/vae", ("me/models", "small/vae")),
    ],
)
def test_a_hub_id_may_have_a_folder(source, expected):
    assert hub_id(source) == expected


@pytest.mark.parametrize("source", ["mine", "./a/b", "/a/b", "~/a/b", "a//b", "a/b/", ""])
def test_paths_are_not_taken_for_hub_ids(source):
    with pytest.raises(AutoencoderError, match="no such folder; give --autoencoder a folder in diffusers' format"):
        hub_id(source)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = Hub()
    resolve = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", resolve)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.mark.filterwarnings("ignore:Use 'content=")  # huggingface_hub, of its own HTTP library
def test_the_hub_is_asked_for_the_configuration_first(hub, folders, codecs, tmp_path):
    files = {path.name: path.read_bytes() for path in (tmp_path / folders["taef1"]).iterdir()}
    hub.repos["me/flux"] = {f"vae/{name}": content for name, content in files.items()}
    hub.repos["me/video"] = {"config.json": b'{"_class_name": "AutoencoderKLWan"}'}
    codec = create_codec("me/flux/vae")
    assert codec.identity == codecs["taef1"].identity
    assert codec.provenance["autoencoder"] == "me/flux/vae"
    with pytest.raises(AutoencoderError, match=r"--autoencoder me/video: AutoencoderKLWan is not supported"):
        create_codec("me/video")
    assert {call.split()[1] for call in hub.calls if "me/video" in call} == {"/me/video/resolve/main/config.json"}
    for missing in ("me/nothing", "me/flux/other"):
        with pytest.raises(AutoencoderError, match="the hub did not serve it") as caught:
            create_codec(missing)
        assert "\n" not in str(caught.value)


def test_offline_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    words = r"^--autoencoder a/b/vae: no folder, and the hub did not serve it \(.+\); give --autoencoder"
    with pytest.raises(AutoencoderError, match=words) as caught:
        create_codec("a/b/vae")
    assert "\n" not in str(caught.value)


# --- trained on


@pytest.mark.parametrize("kind", ["deep compression", "representation"])
def test_a_backbone_is_trained_on_its_latents_resumed_bitwise_and_decoded(kind, tmp_path, request):
    folder = deep(tmp_path / "dc") if kind == "deep compression" else request.getfixturevalue("representation")[1]
    config = {**TINY, "autoencoder": str(folder)}
    config["train"] = {**TINY["train"], "num_steps": 10}
    config["log"] = {**TINY["log"], "validate_every": 0, "checkpoint_every": 5}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    run("train.py", "--config", "tiny.yaml", cwd=tmp_path)
    (tmp_path / "again").mkdir()
    for name in ("cache", "runs"):
        shutil.copytree(tmp_path / name, tmp_path / "again" / name)
    shutil.rmtree(tmp_path / "again/runs/tiny/checkpoints/00000010")
    run("train.py", "--resume", "runs/tiny", cwd=tmp_path / "again")
    whole, resumed = (weights(place, "tiny", step=10) for place in (tmp_path, tmp_path / "again"))
    assert whole.keys() == resumed.keys()
    assert all(whole[name].equal(resumed[name]) for name in whole)
    run("sample.py", "--checkpoint", "runs/tiny", "--output", "drawn.png", cwd=tmp_path)
    with Image.open(tmp_path / "drawn.png") as drawn:
        assert len(drawn.getcolors(maxcolors=1 << 20)) > 10


def test_a_folder_named_like_an_embedded_autoencoder_is_refused_as_ambiguous(tmp_path, monkeypatch):
    write("sd", tmp_path / "embedded-f8c16")
    monkeypatch.chdir(tmp_path)
    create_codec("embedded")
    with pytest.raises(AutoencoderError, match="embedded-f8c16: the clone's own, or this folder's"):
        create_codec("embedded-f8c16")
