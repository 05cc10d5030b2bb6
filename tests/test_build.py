from dataclasses import fields
from inspect import signature
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from diffusion import PROCESSES, SAMPLERS, SPACINGS
from diffusion.flow import PATHS
from diffusion.gaussian import PREDICTIONS, WEIGHTINGS
from diffusion.guidance import SCALE_SCHEDULES
from diffusion.schedules import SCHEDULES
from diffusion.times import TIMES
from experiment.build import (
    build_process,
    check_sampling,
    learning_rate,
    model_spec,
    num_training_steps,
    precision,
    sampling_of,
)
from experiment.cli import parse
from experiment.config import DiffusionConfig, ExperimentConfig, OptimConfig, SamplingConfig, TrainConfig
from models.autoencoder import PixelCodec, create_codec

YAML = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))
LAUNCHERS = [path for path in YAML if path.parent.name == "accelerate"]
EXPERIMENTS = [path for path in YAML if path not in LAUNCHERS]


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_accelerate_reads_every_launcher(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == {"cpu": 1, "one_gpu": 1, "eight_gpus": 8, "two_nodes": 16}[path.stem]
    assert config.mixed_precision == "no"  # train.precision decides


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_shipped_configuration_builds(path):
    config = parse(ExperimentConfig, ["--config", str(path)])
    process = build_process(config.diffusion)
    check_sampling(config.sampling, process, 101)
    spec = model_spec(config, create_codec("embedded"), process, 101)
    model = spec.build_on_meta()
    assert model.out_channels == process.output_channels(4)
    assert path.name in path.read_text() or "make demo" in path.read_text()


def test_model_follows_codec_process_and_data():
    config = parse(ExperimentConfig, ["--data.image_size", "32", "--diffusion.variance", "fixed_small"])
    spec = model_spec(config, PixelCodec(), build_process(config.diffusion), 7)
    assert (spec.input_size, spec.in_channels, spec.out_channels, spec.num_classes) == ((32, 32), 3, 3, 7)


@pytest.mark.parametrize("kind", PROCESSES)
def test_every_kind_builds_with_its_own_defaults_and_sampler(kind):
    process = build_process(DiffusionConfig(kind=kind))
    assert type(process) is PROCESSES[kind]
    sampling = check_sampling(SamplingConfig(), process, 10)
    assert (sampling.sampler, sampling.spacing) == (process.default_sampler, process.default_spacing)


def test_a_setting_of_another_kind_is_refused_in_words():
    for config, words in [
        (DiffusionConfig(shift=3.0), "--diffusion.shift belongs to kind flow, not to gaussian; leave it out or null"),
        (
            DiffusionConfig(kind="edm", times="uniform"),
            "--diffusion.times belongs to kind gaussian and flow, not to edm",
        ),
        (DiffusionConfig(kind="ddpm"), "--diffusion.kind ddpm: unknown, choose from gaussian, flow, edm"),
    ]:
        with pytest.raises(ValueError, match=words):
            build_process(config)


def test_every_setting_of_every_process_is_a_flag():
    flags = {each.name for each in fields(DiffusionConfig)} - {"kind"}
    assert flags == {name for process in PROCESSES.values() for name in signature(process).parameters}


def test_help_names_every_process_sampler_spacing_and_schedule():
    words = f"{DiffusionConfig.__doc__} {SamplingConfig.__doc__}"
    for table in (PROCESSES, SAMPLERS, SPACINGS, SCALE_SCHEDULES, SCHEDULES, WEIGHTINGS, TIMES, PATHS, PREDICTIONS):
        assert all(f"'{name}'" in words for name in table)


def test_learning_rate_warms_up_and_decays():
    config = OptimConfig(lr=1.0, warmup_steps=4, decay="cosine")
    rates = [learning_rate(config, step, 14) for step in range(15)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[9] == pytest.approx(0.5)
    assert rates[14] == pytest.approx(0.0)
    assert learning_rate(OptimConfig(lr=0.1), 10**6, 10) == 0.1


def test_epochs_become_steps():
    assert num_training_steps(TrainConfig(num_epochs=1500, batch_size=128), 6941) == 81340
    assert num_training_steps(TrainConfig(num_steps=5), 6941) == 5


def test_unknown_sampler_and_too_many_steps_are_told():
    process = build_process(ExperimentConfig().diffusion)
    with pytest.raises(ValueError, match=r"--sampling.sampler dppm: unknown, choose from ddpm, ddim, euler"):
        check_sampling(SamplingConfig(sampler="dppm"), process, 1)
    with pytest.raises(ValueError, match=r"--num_steps 2000 must lie in 1..1000"):
        check_sampling(SamplingConfig(num_steps=2000), process, 1)
    with pytest.raises(ValueError, match=r"--guidance_scale 3.0: the model is unconditional"):
        check_sampling(SamplingConfig(guidance_scale=3.0), process, 0)
    assert sampling_of(SamplingConfig(guidance_scale=3.0), 0, num_steps=7, eta=None) == SamplingConfig(
        guidance_scale=1.0, num_steps=7
    )
    with pytest.raises(ValueError, match=r"precision fp8: unknown"):
        precision("fp8")


@pytest.mark.parametrize("argument", ["--modell", "--data.pth", "--optim.lr=fast", "--data.difficulty=brutal"])
def test_unknown_keys_and_values_are_refused(argument, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(ExperimentConfig, [argument])
    assert stopped.value.code == 2
    assert argument.split("=")[0].lstrip("-") in capsys.readouterr().err
