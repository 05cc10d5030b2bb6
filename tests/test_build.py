from dataclasses import fields, replace
from functools import cache
from inspect import signature
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from processes import script
from test_backbones import SMALL

from autoencoders.codec import PixelCodec, create_codec
from diffusion import DIFFUSIONS, SAMPLERS, SPACINGS, Diffusion, SamplingOptions
from diffusion.paths import CURVES
from diffusion.schedules import SCHEDULES
from diffusion.targets import TARGETS
from diffusion.times import TIMES
from diffusion.weightings import WEIGHTINGS
from experiment.build import build_diffusion, defining_settings, model_spec
from experiment.cli import parse, parse_mapping
from experiment.config import DiffusionConfig, ExperimentConfig, OptimConfig, SamplingConfig, TrainConfig
from experiment.mappings import from_dict
from models import class_of
from sampling.checks import resolve_sampling
from settings import set_values
from training.optimizer import build_optimizer, learning_rate, num_training_steps

YAML = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))
LAUNCHERS = [path for path in YAML if path.parent.name == "accelerate"]
EXPERIMENTS = [path for path in YAML if path.parent.name not in ("accelerate", "ablations", "autoencoder")]


@cache
def shipped(path):
    """A shipped configuration, parsed once, as that takes long."""
    return parse(ExperimentConfig, ["--config", str(path)])


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_accelerate_reads_every_launcher(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == {"eight_gpus": 8, "two_nodes": 16, "fsdp2": 8}[path.stem]
    assert config.mixed_precision == "no"  # train.precision decides
    assert config.main_process_port == (29500 if config.num_machines > 1 else 0)  # 0: a free one


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_shipped_configuration_builds(path):
    config = shipped(path)
    diffusion = build_diffusion(config.diffusion)
    codec, num_classes = local_codec(config), 101 * config.data.use_labels
    resolve_sampling(config.sampling, diffusion, num_classes)
    spec = model_spec(config, codec, diffusion, num_classes)
    model = spec.build_on_meta()
    assert model.out_channels == diffusion.output_channels(codec.channels)
    assert path.name in path.read_text() or "make demo" in path.read_text()


EMBEDDED = cache(create_codec)  # loaded once


def local_codec(config):
    """The configuration's codec if it is of pixels, otherwise the embedded autoencoder."""
    return EMBEDDED("pixel" if config.autoencoder == "pixel" else "embedded")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_shipped_configuration_trains_two_steps(path):
    """Models are made small, and images 16 pixels wide where the model takes any size; the loss on the same batch
    falls."""
    config = shipped(path)
    config = replace(config, optim=replace(config.optim, lr=1e-3, warmup_steps=0))
    if config.model != "Cascade":
        small = SMALL[class_of(config.model).__name__]
        config = replace(config, model_args={**config.model_args, **small})
    if config.autoencoder == "pixel":
        config = replace(config, data=replace(config.data, image_size=16))
    diffusion, codec = build_diffusion(config.diffusion), local_codec(config)
    torch.manual_seed(0)
    spec = model_spec(config, codec, diffusion, 10 * config.data.use_labels)
    model = spec.build()
    optimizer = build_optimizer(model, config.optim)
    x_0, y = torch.randn(2, spec.in_channels, *spec.input_size), torch.tensor([0, spec.num_classes])
    t, noise, losses = torch.tensor([400, 800]), torch.randn(x_0.shape), []
    t = t.clamp(max=diffusion.path.max_time) if config.diffusion.kind == "cascade" else t  # whose chain is short
    t = t / 1000 if config.diffusion.kind in ("meanflow", "shortcut") else t
    for _ in range(3):
        draws = torch.Generator().manual_seed(1)  # of a cascade, the same at each step
        loss = diffusion.training_loss(model, x_0, y, t=t, noise=noise, generator=draws)["loss"].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]


def test_the_model_spec_follows_codec_diffusion_and_data():
    config = parse(ExperimentConfig, ["--data.image_size", "32", "--diffusion.variance", "fixed_small"])
    spec = model_spec(config, PixelCodec(), build_diffusion(config.diffusion), 7)
    assert (spec.input_size, spec.in_channels, spec.out_channels, spec.num_classes) == ((32, 32), 3, 3, 7)


@pytest.mark.parametrize("kind", DIFFUSIONS)
def test_every_kind_builds_with_its_own_defaults_and_sampler(kind):
    diffusion = build_diffusion(DiffusionConfig(kind=kind))
    assert isinstance(diffusion, Diffusion)
    sampling = resolve_sampling(SamplingConfig(), diffusion, 10)
    assert (sampling.sampler, sampling.spacing) == (diffusion.default_sampler, diffusion.default_spacing)


def test_a_setting_of_another_kind_is_refused_in_words():
    for config, words in [
        (DiffusionConfig(shift=3.0), "--diffusion.shift belongs to kind flow, not to gaussian; leave it out or null"),
        (
            DiffusionConfig(kind="edm", times="uniform"),
            "--diffusion.times belongs to kind gaussian and flow and meanflow and shortcut, not to edm",
        ),
        (DiffusionConfig(kind="ddpm"), "--diffusion.kind ddpm: unknown, choose from gaussian, flow, edm"),
    ]:
        with pytest.raises(ValueError, match=words):
            build_diffusion(config)


@pytest.mark.parametrize("other", [{"tangent": "model"}, {"difference": 0.02}], ids=str)
def test_how_meanflow_is_differentiated_does_not_change_what_outputs_mean(other):
    """So a guide, or weights to start from, may have been trained with either."""
    plain, improved = DiffusionConfig(kind="meanflow"), DiffusionConfig(kind="meanflow", **other)
    assert (
        defining_settings(plain)
        == defining_settings(improved)
        != defining_settings(DiffusionConfig(kind="meanflow", kappa=0.5))
    )


def test_every_setting_of_every_diffusion_is_a_flag():
    flags = {each.name for each in fields(DiffusionConfig)} - {"kind"}
    assert flags == {name for preset in DIFFUSIONS.values() for name in signature(preset).parameters}


def test_help_names_every_diffusion_sampler_spacing_and_schedule():
    words = f"{DiffusionConfig.__doc__} {SamplingOptions.__doc__}"
    for table in (DIFFUSIONS, SAMPLERS, SPACINGS, SCHEDULES, WEIGHTINGS, TIMES, CURVES, TARGETS):
        assert all(f"'{name}'" in words for name in table)


def test_learning_rate_warms_up_and_decays():
    config = OptimConfig(lr=1.0, warmup_steps=4, decay="cosine")
    rates = [learning_rate(config, step, 14) for step in range(15)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[9] == pytest.approx(0.5)
    assert rates[14] == pytest.approx(0.0)
    assert learning_rate(OptimConfig(lr=0.1), 10**6, 10) == 0.1
    linear = OptimConfig(lr=1.0, warmup_steps=4, decay="linear", decay_share=0.25)  # warm-up, stable, decay
    rates = [learning_rate(linear, step, 16) for step in range(17)]
    assert rates == [0.25, 0.5, 0.75] + [1.0] * 10 + [0.75, 0.5, 0.25, 0.0]
    constant = replace(linear, decay="constant")  # what was trained before its end was known goes on into the decay
    assert [learning_rate(constant, step, 99) for step in range(13)] == rates[:13]


def test_sampling_settings_of_a_command_take_the_place_of_a_runs(capsys):
    """Flags that were not given are unset; an explicit null is a value."""
    own = SamplingConfig(num_steps=9, guidance_interval=[0.1, 2.0])
    diffusion, flags = build_diffusion(DiffusionConfig()), ["--num_steps", "5", "--sampling.guidance_interval", "null"]
    sample = script("sample.py").SampleConfig
    overrides = set_values(parse(sample, ["--checkpoint", "x", *flags]).sampling)
    expected = SamplingConfig("ddpm", num_steps=5, spacing="uniform")
    assert resolve_sampling(own, diffusion, 7, **overrides) == expected
    for flags, words in [
        (["--sampling.steps", "5"], "unrecognized arguments: --sampling.steps"),
    ]:
        with pytest.raises(SystemExit):
            parse(sample, ["--checkpoint", "x", *flags])
        assert words in capsys.readouterr().err


def test_without_a_trained_null_label_nothing_is_guided():
    config = ExperimentConfig(train=TrainConfig(label_dropout=0.0))
    diffusion = build_diffusion(config.diffusion)
    assert (config.guided_classes(7), ExperimentConfig().guided_classes(7)) == (0, 7)
    assert resolve_sampling(config.sampling, diffusion, config.guided_classes(7)).guidance_scale == 1.0
    with pytest.raises(ValueError, match=r"guidance_scale 2.0: .* --train.label_dropout 0, and has no null label"):
        resolve_sampling(config.sampling, diffusion, config.guided_classes(7), guidance_scale=2.0)


def test_a_guide_that_a_command_names_guides():
    """A guide also works for a model without labels, which nothing else guides; guides that do not fit are refused."""
    diffusion, config = build_diffusion(DiffusionConfig()), ExperimentConfig().sampling
    guide = {"guidance_checkpoint": "runs/guide", "guidance_unlabelled": True}
    for num_guided in (0, 7):
        assert resolve_sampling(config, diffusion, num_guided, **guide).guidance_scale == config.guidance_scale > 1
    assert resolve_sampling(config, diffusion, 7, **guide, guidance_scale=1.0).guidance_scale == 1.0  # of a sweep
    guided = replace(config, **guide)
    assert resolve_sampling(guided, diffusion, 0, guidance_checkpoint=None) == resolve_sampling(config, diffusion, 0)
    with pytest.raises(ValueError, match=r"--sampling.guidance_checkpoint runs/guide: give --sampling.guidance_scale"):
        resolve_sampling(SamplingConfig(), diffusion, 7, **guide)
    with pytest.raises(ValueError, match=r"--sampling.guidance_unlabelled true has no effect without"):
        resolve_sampling(config, diffusion, 7, guidance_unlabelled=True)


def test_an_argument_of_another_sampler_is_refused_and_goes_with_its_sampler():
    diffusion, config = build_diffusion(DiffusionConfig()), SamplingConfig(sampler="ddim", sampler_args={"eta": 0.5})
    assert resolve_sampling(config, diffusion, 10).sampler_args == {"eta": 0.5}
    assert resolve_sampling(config, diffusion, 10, sampler="heun").sampler_args == {}
    unnamed, edm = SamplingConfig(sampler_args={"churn": 20.0}), build_diffusion(DiffusionConfig(kind="edm"))
    assert resolve_sampling(unnamed, edm, 10, sampler="heun").sampler_args == {"churn": 20.0}  # which it is by default
    with pytest.raises(ValueError, match=r"--sampling.sampler_args.churn: ddim takes eta"):
        resolve_sampling(config, diffusion, 10, sampler_args={"churn": 20})


def test_removed_settings_are_read_where_they_had_no_effect(tmp_path):
    """Old settings are read from a checkpoint, a file and an ablation."""
    before = {"sampling": {"sampler": "ddim", "eta": 0.5, "churn": 0.0, "guidance_schedule": "constant"}}
    before |= {"train": {"seed": 3}, "diffusion": {"times": "importance"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(before))
    for config in (
        from_dict(ExperimentConfig, before),
        parse(ExperimentConfig, ["--config", str(tmp_path / "config.yaml")]),
        parse_mapping(ExperimentConfig, before),
    ):
        assert (config.sampling.sampler_args, config.train.seed, config.diffusion.times) == ({"eta": 0.5}, 3, None)
    with pytest.raises(ValueError, match="guidance_schedule"):
        parse_mapping(ExperimentConfig, {"sampling": {"guidance_schedule": "linear"}})


def test_epochs_become_steps():
    assert num_training_steps(TrainConfig(batch_size=10), 25) == 250
    assert num_training_steps(TrainConfig(num_epochs=1500, batch_size=128), 6941) == 81340
    assert num_training_steps(TrainConfig(num_steps=5), 6941) == 5


def test_unknown_sampler_and_too_many_steps_are_told():
    diffusion = build_diffusion(ExperimentConfig().diffusion)
    with pytest.raises(ValueError, match=r"--sampling.sampler dppm: unknown, choose from ddpm, ddim, euler"):
        resolve_sampling(SamplingConfig(sampler="dppm"), diffusion, 1)
    with pytest.raises(ValueError, match=r"--num_steps 2000 must lie in 1..1000"):
        resolve_sampling(SamplingConfig(num_steps=2000), diffusion, 1)
    with pytest.raises(ValueError, match=r"--sampling.guidance_scale 3.0: the model is unconditional"):
        resolve_sampling(SamplingConfig(), diffusion, 0, guidance_scale=3.0)
    resolved = resolve_sampling(SamplingConfig(guidance_scale=3.0), diffusion, 0, num_steps=7)
    assert resolved == SamplingConfig("ddpm", num_steps=7, spacing="uniform", guidance_scale=1.0)
    own = SamplingConfig(sampler="ddim", num_steps=7, clip=1.0)  # a run's, which null takes back
    taken_back = resolve_sampling(own, diffusion, 10, sampler=None, num_steps=None, clip=None)
    assert taken_back == SamplingConfig("ddpm", num_steps=150, spacing="uniform")


@pytest.mark.parametrize("argument", ["--modell", "--data.pth", "--optim.lr=fast", "--data.difficulty=brutal"])
def test_unknown_keys_and_values_are_refused(argument, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(ExperimentConfig, [argument])
    assert stopped.value.code == 2
    assert argument.split("=")[0].lstrip("-") in capsys.readouterr().err
