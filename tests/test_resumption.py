"""Which settings a resumed run keeps, and which it may change."""

import hashlib
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from PIL import Image
from processes import run

from autoencoder_training.autoencoder_config import AutoencodingConfig
from checkpoints.checkpoint import WEIGHTS, check_identity, make_metadata, read_metadata, save_tensors
from experiment.cli import parse, parse_run
from experiment.config import (
    AlignmentConfig,
    AuxiliaryConfig,
    DataConfig,
    ExperimentConfig,
    OptimConfig,
    SamplingConfig,
)
from experiment.mappings import from_dict
from experiment.run_config import with_resume
from machine.checkpoint_folder import CheckpointError
from training.resumption import changed_metric, former_settings, resume_config

CLASSES = {"diffusion": ExperimentConfig, "autoencoder": AutoencodingConfig}


@pytest.fixture(scope="module")
def values():
    """Configurations of both kinds of training; parsing one takes a second."""
    return {kind: parse(config_class, ["--name", "first"]).to_dict() for kind, config_class in CLASSES.items()}


@pytest.fixture
def stored(tmp_path, values):
    """A run of each kind: its configuration, and the parts of its checkpoint that are read before the weights."""
    found = {}
    for kind, settings in values.items():
        found[kind] = tmp_path / kind / "checkpoints" / "00000001"
        found[kind].mkdir(parents=True)
        (tmp_path / kind / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        save_tensors({"weight": torch.zeros(1)}, found[kind] / WEIGHTS, {"config": json.dumps(settings)})
    return found


def asked(checkpoint, kind, *flags):
    return parse_run(CLASSES[kind], ["--resume", str(checkpoint.parent.parent), *flags])


@pytest.mark.parametrize(
    ("kind", "flag", "value"),
    [
        ("diffusion", "model", "USwin"),
        ("diffusion", "model_args.dim", "48"),
        ("diffusion", "data.image_size", "32"),
        ("diffusion", "data.test_fraction", "0.5"),
        ("diffusion", "data.use_labels", "false"),
        ("diffusion", "diffusion.prediction", "v"),
        ("diffusion", "diffusion.num_timesteps", "500"),
        ("diffusion", "diffusion.kind", "edm"),
        ("diffusion", "optim.muon_lr", "0.1"),
        ("diffusion", "train.ema_profiles", "[0.1]"),
        ("diffusion", "train.label_dropout", "0"),
        ("autoencoder", "architecture.latent_channels", "8"),
        ("autoencoder", "data.image_size", "32"),
    ],
)
def test_settings_that_determine_what_weights_mean_cannot_change(stored, kind, flag, value):
    with pytest.raises(CheckpointError, match=rf"--{flag} \S+: .* was trained with .*leave it out"):
        resume_config(asked(stored[kind], kind, f"--{flag}", value), stored[kind], print)


def test_an_older_autoencoder_without_stored_configuration_resumes(stored):
    save_tensors({"weight": torch.zeros(1)}, stored["autoencoder"] / WEIGHTS, {})
    asked_for = asked(stored["autoencoder"], "autoencoder")
    assert resume_config(asked_for, stored["autoencoder"], print) == with_resume(asked_for, None)


def test_a_configuration_survives_the_round_trip_through_json():
    config = ExperimentConfig(
        model_args={"norm": "no", "depths": [1, 1], "rate": "1e-3"},
        autoencoder="007",
        data=DataConfig(exclude_classes=["null", "1e3", ""]),
        optim=OptimConfig(betas=(0.8, 0.9)),
        sampling=SamplingConfig(clip=math.inf, guidance_interval=[0.0, math.inf]),
        auxiliary=[AuxiliaryConfig("perceptual", 0.1)],
    )
    assert from_dict(ExperimentConfig, json.loads(json.dumps(config.to_dict()))) == config


def test_a_configuration_edited_by_hand_cannot_change_it_either(stored):
    path = stored["diffusion"].parent.parent / "config.yaml"
    path.write_text(path.read_text().replace("image_size: 64", "image_size: 32"))
    with pytest.raises(CheckpointError, match=r"--data.image_size 32: .* was trained with 64"):
        resume_config(asked(stored["diffusion"], "diffusion"), stored["diffusion"], print)


def test_rate_length_log_and_explicit_defaults_may_change(stored):
    flags = ("--optim.lr", "1e-3", "--train.num_steps", "9", "--log.every", "3", "--sampling.num_steps", "9")
    flags += ("--train.label_dropout", "0.2")
    same = ("--diffusion.prediction", "epsilon", "--data.cache", "elsewhere", "--data.path", "moved.zip")
    config = asked(stored["diffusion"], "diffusion", *flags, *same)
    told = []
    assert resume_config(config, stored["diffusion"], told.append) == with_resume(config, None)
    assert told == []


def test_settings_of_before_a_change_are_remembered(stored):
    """Those that results depend on; not lengths, logs or what stays the same."""
    checkpoint, first = stored["diffusion"], {"until": 1, "settings": {"optim.lr": 1e-4}}
    flags = ("--optim.lr", "1e-3", "--train.num_steps", "9", "--log.every", "3")
    assert former_settings(checkpoint, asked(checkpoint, "diffusion")) == []
    changed = asked(checkpoint, "diffusion", *flags)
    assert former_settings(checkpoint, changed) == [first]
    aligned = replace(changed, alignment=AlignmentConfig(weight=1.0))
    other_loss = replace(aligned, auxiliary=[AuxiliaryConfig("feature_matching", 0.1)])
    before = {"optim.lr": 1e-4, "auxiliary": [], "alignment.weight": 0.5}
    assert former_settings(checkpoint, other_loss) == [{"until": 1, "settings": before}]
    save_tensors({"weight": torch.zeros(1)}, checkpoint / WEIGHTS, make_metadata(changed, 1, history=[first]))
    assert former_settings(checkpoint, changed) == [first]
    later = asked(checkpoint, "diffusion", *flags, "--train.batch_size", "64")
    assert former_settings(checkpoint, later) == [first, {"until": 1, "settings": {"train.batch_size": 128}}]


def test_epochs_are_not_counted_in_steps_of_several_sizes(stored):
    """100 epochs of 640 images are 500 steps of 128, or one of 128 and 998 of 64."""
    checkpoint, run = stored["diffusion"], stored["diffusion"].parent.parent
    flags = ["--train.batch_size", "64"]
    before = asked(checkpoint, "diffusion")
    save_tensors(
        {"weight": torch.zeros(1)}, checkpoint / WEIGHTS, make_metadata(before, 1, {"train": {"num_images": 640}})
    )
    with pytest.raises(CheckpointError, match=r"--train.batch_size 64: 1 steps were of other .*num_steps 999 .*null"):
        resume_config(asked(checkpoint, "diffusion", *flags), checkpoint, print)
    changed = asked(checkpoint, "diffusion", *flags, "--train.num_steps", "999")
    resume_config(changed, checkpoint, print)

    # Nor in the steps between two drops of the rate.
    dropping = asked(checkpoint, "diffusion", *flags, "--train.num_steps", "999", "--optim.decay", "step")
    with pytest.raises(CheckpointError, match=r"--train.batch_size 64: 1 steps were of other .*--optim.decay step"):
        resume_config(dropping, checkpoint, print)

    # Nor are they later, when the batch size stays.
    later = checkpoint.with_name("00000005")
    history = former_settings(checkpoint, changed)
    save_tensors({"weight": torch.zeros(1)}, checkpoint / WEIGHTS, make_metadata(changed, 5, history=history))
    (run / "config.yaml").write_text(yaml.safe_dump(changed.to_dict(), sort_keys=False))
    checkpoint.rename(later)
    resume_config(asked(later, "diffusion"), later, print)
    with pytest.raises(CheckpointError, match=r"5 steps were of other sizes.*--train.num_steps N"):
        resume_config(asked(later, "diffusion", "--train.num_steps", "null"), later, print)


def test_a_training_that_is_resumed_at_another_rate_says_so(folder, tmp_path):
    shutil.copytree(folder / "runs" / "tiny", tmp_path / "runs" / "tiny")
    flags = ("--resume", "runs/tiny", "--optim.lr", 1e-4, "--train.num_steps", 5, "--data.cache", folder / "cache")
    run("train.py", *flags, cwd=tmp_path)
    of_step = {step: read_metadata(tmp_path / f"runs/tiny/checkpoints/{step:08d}" / WEIGHTS) for step in (4, 5)}
    assert json.loads(of_step[5]["history"]) == [{"until": 4, "settings": {"optim.lr": 1e-3}}]
    assert "history" not in of_step[4]


def test_best_values_measured_differently_are_not_compared(stored, values):
    """Settings that the loss does not depend on do not matter; scores depend on samples, and so on the decoder."""
    checkpoint, seen = stored["diffusion"], {"codec": {"sha256": "a", "decoder_sha256": "b"}}

    def of(settings):
        whole = {name: dict(part) if isinstance(part, dict) else part for name, part in values["diffusion"].items()}
        for flag, value in settings.items():
            group, _, name = flag.partition(".")
            whole[group][name] = value
        return from_dict(ExperimentConfig, whole)

    def others(before, now, decoder="b"):
        metadata = make_metadata(of(before), 1, seen)
        save_tensors({"weight": torch.zeros(1)}, checkpoint / WEIGHTS, metadata)
        return changed_metric(checkpoint, of(now), {"codec": {**seen["codec"], "decoder_sha256": decoder}})

    loss, score, steps = {"log.best": "validation_loss"}, {"log.best": "fid"}, {"sampling.num_steps": 9}
    assert others({}, steps) == others(score, {}) == []  # nothing is to be the best
    assert others({}, loss) == ["--log.best None"]
    assert others(loss, score) == ["--log.best validation_loss"]
    assert others(loss, loss | steps) == others(loss, loss, decoder="c") == []
    assert others(score, score | {"optim.lr": 1e-3, "evaluation.batch_size": 2}) == []
    assert others(score, score | steps) == ["--sampling.num_steps None"]
    assert others(score, score | {"evaluation.num_samples": 9}) == ["--evaluation.num_samples None"]
    assert others(score, score, decoder="c") == ["decoder of --autoencoder"]


def test_another_name_or_init_from_is_reported_as_without_effect(stored):
    told = []
    config = asked(stored["diffusion"], "diffusion", "--name", "second", "--init_from", "runs/other")
    config = resume_config(config, stored["diffusion"], told.append)
    assert (config.name, config.init_from) == ("first", None)
    assert [line.partition(":")[0] for line in told] == ["--name second", "--init_from runs/other"]


def test_half_a_configuration_is_refused(stored):
    path = stored["diffusion"].parent.parent / "config.yaml"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-3]))
    with pytest.raises(
        CheckpointError,
        match=r"config.yaml is cut short, put back log.validate_every: 1000, log.evaluate_every",
    ):
        resume_config(asked(stored["diffusion"], "diffusion"), stored["diffusion"], print)
    path.write_text("")
    with pytest.raises(ValueError, match=r"--resume .*config.yaml is empty; put a copy of it back"):
        asked(stored["diffusion"], "diffusion")


def test_a_key_that_stands_twice_is_refused(tmp_path, capsys):
    (tmp_path / "twice.yaml").write_text("model: DiT\noptim:\n  lr: 1.0e-3\n  lr: 1.0e-2\n")
    with pytest.raises(SystemExit):
        parse(ExperimentConfig, ["--config", str(tmp_path / "twice.yaml")])
    assert "the key lr stands twice" in capsys.readouterr().err


def hashes(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--data.image_size", 16), "--data.image_size 16: runs/tiny was trained with 32"),
        (("--data.path", "others"), "--data.path: runs/tiny/checkpoints/00000004/ema.safetensors was trained with an"),
    ],
)
def test_a_refused_change_leaves_the_run_untouched(folder, flags, message):
    before = hashes(folder / "runs" / "tiny")
    for name in "ab":
        for number in range(2):
            path = folder / "others" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (90 * number, 0, 0)).save(path)
    done = run("train.py", "--resume", "runs/tiny", *flags, cwd=folder, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert hashes(folder / "runs" / "tiny") == before


def test_an_older_run_that_stored_epochs_and_steps_resumes(stored):
    path = stored["diffusion"].parent.parent / "config.yaml"
    values = yaml.safe_load(path.read_text())
    values["train"] |= {"num_epochs": 100, "num_steps": 500}
    path.write_text(yaml.safe_dump(values))
    length = asked(stored["diffusion"], "diffusion").train
    assert (length.num_epochs, length.num_steps) == (None, 500)


def test_another_decoder_is_accepted_where_only_latents_matter_and_refused_elsewhere(stored):
    weights, known = stored["diffusion"] / WEIGHTS, {"codec": {"sha256": "c", "decoder_sha256": "d"}}
    other = {"codec": {"sha256": "c", "decoder_sha256": "e", "autoencoder": "tuned"}}
    check_identity(weights, other, known, any_decoder=True)
    with pytest.raises(CheckpointError, match=r"whose decoder_sha256 was .* or this one by --autoencoder tuned"):
        check_identity(weights, other, known)
    with pytest.raises(CheckpointError, match="another codec, whose sha256 was"):
        check_identity(weights, {"codec": {**other["codec"], "sha256": "f"}}, known, any_decoder=True)
