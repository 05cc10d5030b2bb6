"""Exports to diffusers draw the same pictures as sample.py."""

import json
import math
import types
import zipfile

import jaxtyping
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, DiTPipeline
from diffusers.utils import dynamic_modules_utils
from processes import ROOT, script
from safetensors.torch import save_file

from autoencoders.codec import create_codec
from checkpoints.checkpoint import WEIGHTS, make_metadata, open_checkpoint
from conversion import diffusers_pipeline
from conversion.diffusers_dit import native_names, to_diffusers, without_shift, write_native
from conversion.diffusers_pipeline import export_denoiser, readme
from conversion.diffusers_schedulers import to_scheduler
from diffusion.presets import DIFFUSIONS
from experiment.build import build_diffusion
from experiment.config import (
    DataConfig,
    DiffusionConfig,
    ExperimentConfig,
    SamplingConfig,
    SamplingFlags,
    TrainConfig,
)
from machine.randomness import generator_for
from metrics.programs import save_exported
from models import ModelSpec, create_model

EXPORT, SAMPLE = script("scripts/export_diffusers.py"), script("sample.py")
TINY_DIT = {"dim": 32, "depth": 2, "num_heads": 2}
ONE_BLOCK = {**TINY_DIT, "depth": 1}  # where a program is traced
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation"),  # diffusers, with numpy 2
    pytest.mark.filterwarnings("ignore:divide by zero"),  # the log of its last sigma, 0
]
CLASSES = [f"class {number}" for number in range(10)]
BACKBONES = {
    "DiT": TINY_DIT,
    "LightningDiT-S/2": {**TINY_DIT, "qk_norm": True, "modulation": "shared", "augment_dim": 11},
    "UViT-tokens": {**TINY_DIT, "depth": 3},
    "XSwin": {"dim": 16, "depths": [2], "num_heads": [2], "num_global_blocks": 1},
}


@pytest.fixture(autouse=True)
def no_shape_checks(monkeypatch):
    """Turn shape checks off, as torch.export would trace them."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="module")
def exported():
    """Cache exported programs: models of one shape have the same weights here, and tracing takes seconds."""
    programs = {}

    def export(model, spec):
        weights = torch.cat([weight.flatten().float() for weight in model.state_dict().values()])
        key = repr(spec), weights.numpy().tobytes()
        if key not in programs:
            programs[key] = export_denoiser(model, spec)
        return programs[key]

    return export


@pytest.fixture(autouse=True, scope="module")
def own_modules(tmp_path_factory):
    """diffusers copies a pipeline's code to a folder of the user before it runs it; use one for the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


def with_our_frequencies(theirs):
    """Set the frequencies of diffusers' time embedding to ours, as the exported README explains."""
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return theirs


def randomise(model, seed=0):
    """Give all weights values like trained ones, also those that are initialised to zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval().requires_grad_(False)


def checkpoint(folder, model="DiT", args=TINY_DIT, autoencoder="embedded", size=32, label_dropout=0.1, **diffusion):
    """Write an untrained run."""
    config = DiffusionConfig(**diffusion)
    codec, diffusion = create_codec(autoencoder), build_diffusion(config)
    channels, *side = codec.latent_shape(size, size)
    spec = ModelSpec(model, args, tuple(side), channels, diffusion.output_channels(channels), 10)
    sampling = SamplingConfig(num_steps=4, guidance_scale=2.0)
    rest = {"train": TrainConfig(label_dropout=label_dropout), "data": DataConfig(image_size=size)}
    experiment = ExperimentConfig(model, args, autoencoder, diffusion=config, sampling=sampling, **rest)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = randomise(spec.build()).state_dict()
    folder.mkdir()
    save_file(weights, folder / WEIGHTS, metadata=make_metadata(experiment, 5, spec=spec, classes=CLASSES))
    return folder


def drawn(run, output, seed=0, **sampling):
    """Samples by sample.py: two each of classes 1 and 2."""
    flags = {"checkpoint": str(run), "output": str(output), "classes": ["1", "2"], "num_per_class": 2, "seed": seed}
    SAMPLE.main(SAMPLE.SampleConfig(**flags, sampling=SamplingFlags(**sampling)))
    with np.load(output) as file:
        return file["arr_0"].astype(int)


@pytest.mark.parametrize(
    ("kind", "sampler", "spacing", "autoencoder", "settings"),
    [
        ("gaussian", "ddpm", "uniform", "embedded", {}),
        ("gaussian", "ddim", "trailing", "embedded", {"prediction": "v", "variance": "fixed_small"}),
        ("gaussian", "ddpm", "uniform", "pixel", {"schedule": "cosine"}),
        ("gaussian", "dpmpp_2m", "uniform", "pixel", {"schedule": "cosine"}),
        ("flow", "euler", None, "embedded", {"shift": 2.0}),
        ("flow", "euler", None, "embedded-taef2", {"prediction": "x_0"}),
        ("edm", "euler", None, "pixel", {}),
    ],
)
def test_pictures_are_those_of_sample(kind, sampler, spacing, autoencoder, settings, tmp_path, exported, monkeypatch):
    monkeypatch.setattr(diffusers_pipeline, "export_denoiser", exported)
    run = checkpoint(tmp_path / "run", args=ONE_BLOCK, autoencoder=autoencoder, kind=kind, size=16, **settings)
    flags = {"sampler": sampler, "spacing": spacing}
    clip = math.inf if autoencoder == "pixel" and sampler != "ddpm" else None
    sampling = SamplingFlags(clip=clip, **flags)
    EXPORT.main(EXPORT.ExportConfig(checkpoint=str(run), output=tmp_path / "out", sampling=sampling))
    expected = drawn(run, tmp_path / "drawn.npz", seed=3, clip=clip, **flags)
    pipeline = DiffusionPipeline.from_pretrained(
        tmp_path / "out", custom_pipeline=str(tmp_path / "out" / "pipeline.py"), trust_remote_code=True
    )
    pipeline.set_progress_bar_config(disable=True)
    if autoencoder == "embedded-taef2":
        assert type(pipeline.vae).__module__.startswith("diffusers_modules.")  # the copy, not the repository's
    names = ["class 1", "class 1", 2, "class 2"]
    found = pipeline(names, seed=3, output_type="np").images
    assert found.std() > 1
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert pipeline(names, seed=3).images[0].size == (16, 16)
    with pytest.raises(ValueError, match="cat: no such class among the 10"):
        pipeline(["cat"])


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # of torch 2.9's own reader
@pytest.mark.parametrize("name", BACKBONES)
def test_every_kind_of_backbone_leaves_as_a_program_for_any_batch(name, tmp_path):
    spec = ModelSpec(name, BACKBONES[name], (8, 8), 4, 8, 10)
    model = randomise(spec.build())
    program, error = export_denoiser(model, spec)
    assert error < 1e-5
    save_exported(program, tmp_path / "denoiser.pt2")
    with zipfile.ZipFile(tmp_path / "denoiser.pt2") as archive:
        assert not any(str(ROOT).encode() in archive.read(member) for member in archive.namelist())
    again = torch.export.load(tmp_path / "denoiser.pt2").module()
    for num in (1, 4):
        inputs = torch.randn(num, 4, 8, 8), torch.rand(num), torch.full((num,), 10)
        torch.testing.assert_close(again(*inputs), model(*inputs))


def test_a_program_that_differs_is_not_written(monkeypatch):
    spec = ModelSpec("DiT", TINY_DIT, (8, 8), 4, 8, 10)
    model, other = randomise(spec.build()), randomise(spec.build(), seed=1)
    program = types.SimpleNamespace(module=lambda: other)
    monkeypatch.setattr(torch.export, "export", lambda *inputs, **options: program)
    with pytest.raises(ValueError, match="the exported program differs from the model by"):
        export_denoiser(model, spec)


def test_a_dit_exports_to_diffusers_dit_pipeline_with_the_same_samples(tmp_path):
    run = checkpoint(tmp_path / "run")
    flags = {"sampler": "ddim", "spacing": "trailing"}
    asked = {"checkpoint": str(run), "output": tmp_path / "out", "native": True}
    EXPORT.main(EXPORT.ExportConfig(**asked, sampling=SamplingFlags(**flags)))
    expected = drawn(run, tmp_path / "drawn.npz", **flags)
    for path in (tmp_path / "out").rglob("*"):
        assert not (path.is_file() and any(str(here).encode() in path.read_bytes() for here in (ROOT, tmp_path))), path
    pipeline = DiTPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    with_our_frequencies(pipeline.transformer)  # what the folder's README says to do
    labels = pipeline.get_label_ids(["class 1", "class 1", "class 2", "class 2"])
    generators = [generator_for(0, "sample", index) for index in range(4)]
    found = pipeline(labels, guidance_scale=2.0, generator=generators, num_inference_steps=4, output_type="np").images
    assert np.abs((found * 255).round().astype(int) - expected).max() <= 1

    # It takes commas for ends of names.
    names = native_names(["crane, bird", "crane, machine", "a", "a ", "b"])
    assert names == ["crane; bird", "crane; machine", "a (2)", "a (3)", "b"]
    named = DiTPipeline(pipeline.transformer, pipeline.vae, pipeline.scheduler, id2label=dict(enumerate(names)))
    assert named.get_label_ids(names) == list(range(5))


def test_diffusers_dit_puts_out_the_same():
    model = randomise(create_model("DiT", input_size=8, in_channels=4, out_channels=8, num_classes=10, **TINY_DIT))
    x_t, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 400, 999]), torch.tensor([0, 9, 10])
    theirs = with_our_frequencies(to_diffusers(model))
    labels = torch.where(y == 10, 1000, y)
    torch.testing.assert_close(theirs(x_t, t, labels).sample, model(x_t, t, y), rtol=1e-4, atol=1e-5)
    for style in (
        {"qk_norm": True},
        {"norm": "rms"},
        {"mlp": "swiglu"},
        {"positions": "both"},
        {"modulation": "shared"},
    ):
        other = create_model("DiT", input_size=8, in_channels=4, out_channels=8, num_classes=10, **TINY_DIT, **style)
        with pytest.raises(ValueError, match="--native: diffusers' DiT has the published blocks"):
            to_diffusers(other)


def test_an_autoencoder_without_shift_decodes_and_encodes_the_same():
    codec = create_codec("embedded")
    centred = without_shift(codec.autoencoder)
    x_0 = torch.randn(2, 4, 4, 4)
    decoded = centred.decode(x_0 / codec.scale).sample
    torch.testing.assert_close(decoded, codec.autoencoder.decode(x_0 / codec.scale + codec.shift).sample)
    images = torch.rand(2, 3, 32, 32)
    theirs = codec.autoencoder.encode(images).latent_dist.mean - codec.shift
    torch.testing.assert_close(centred.encode(images).latent_dist.mean, theirs)


def test_what_diffusers_cannot_follow_is_refused(tmp_path):
    run = checkpoint(tmp_path / "run")
    swin = checkpoint(tmp_path / "swin", "XSwin", BACKBONES["XSwin"])
    pixels = checkpoint(tmp_path / "pixels", autoencoder="pixel", size=16)
    trailing = {"sampling": SamplingFlags(sampler="ddim", spacing="trailing")}
    for source, settings, words in [
        (
            run,
            {"sampling": SamplingFlags(sampler="heun")},
            "--sampler heun with --spacing uniform: no scheduler .*; give --sampler ddpm --spacing uniform or",
        ),
        (run, {"native": True}, "--native: DiTPipeline cannot walk gaussian, ddpm, uniform; add --sampler ddim"),
        (pixels, trailing, r"--clip 1: in diffusers only the scheduler of ddpm .* or --clip \.inf"),
        (swin, {"native": True, **trailing}, "--native: diffusers has no XSwin"),
        (tmp_path / "none", {}, "--checkpoint .*none does not exist"),
    ]:
        with pytest.raises(ValueError, match=words):
            EXPORT.main(EXPORT.ExportConfig(checkpoint=str(source), output=tmp_path / "out", **settings))
        assert not (tmp_path / "out").exists()
    for kind, spacing, prediction in (("flow", "uniform", "epsilon"), ("edm", "karras", "x_0")):
        with pytest.raises(ValueError, match=f"--diffusion.prediction {prediction}: of a {kind} diffusers' schedulers"):
            to_scheduler(kind, DIFFUSIONS[kind](prediction=prediction), SamplingConfig("euler", spacing=spacing))
    guided = SamplingConfig(sampler="ddim", spacing="uniform", guidance_interval=[0.1, 2.0])
    with pytest.raises(ValueError, match=r"--sampling.guidance_interval \[0.1, 2.0\]: diffusers"):
        to_scheduler("gaussian", open_checkpoint(run).build_diffusion(), guided)


def test_exports_refuse_guidance_that_the_model_does_not_support(tmp_path, exported, monkeypatch):
    """The weights of an untrained null label are exported with the others; DiTPipeline guides all channels."""
    monkeypatch.setattr(diffusers_pipeline, "export_denoiser", exported)
    run = checkpoint(tmp_path / "run", args=ONE_BLOCK, autoencoder="pixel", size=16, label_dropout=0.0)
    EXPORT.main(EXPORT.ExportConfig(checkpoint=str(run), output=tmp_path / "out"))
    pipeline = DiffusionPipeline.from_pretrained(
        tmp_path / "out", custom_pipeline=str(tmp_path / "out" / "pipeline.py"), trust_remote_code=True
    )
    with pytest.raises(ValueError, match="guidance_scale=2: the model has no trained null label"):
        pipeline(["class 1"], guidance_scale=2)
    with pytest.raises(ValueError, match="--native: DiTPipeline guides by 4 unless told else, away from a null label"):
        write_native(tmp_path, open_checkpoint(run), SamplingConfig(sampler="ddim", spacing="trailing"), None, None)
    legacy = SamplingConfig(sampler="ddim", spacing="trailing", legacy_cfg_channels=3)
    found = open_checkpoint(checkpoint(tmp_path / "guided", autoencoder="pixel", size=16))
    with pytest.raises(ValueError, match="--native: DiTPipeline guides all channels, not 3"):
        write_native(tmp_path, found, legacy, None, None)


def test_the_folder_says_how_to_load_it(tmp_path):
    assert json.loads((diffusers_pipeline.PARTS.parent / "autoencoder" / "config.json").read_text())[
        "shift_factor"
    ]  # is tested
    run = open_checkpoint(checkpoint(tmp_path / "run"))
    for native in (False, True):
        text = readme(run, SamplingConfig(sampler="ddim", spacing="trailing"), native=native)
        assert '["class 0"]' in text
        assert "from_pretrained" in text
