"""The autoencoder's own training, as real processes."""

import json
import re
import shutil

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from processes import log, run, script, weights

from autoencoder_training.autoencoder_config import AutoencodingConfig
from autoencoders.codec import create_codec
from experiment.cli import one_line_errors, parse_run
from machine.checkpoint_folder import CheckpointError

SCRIPT = "scripts/train_autoencoder.py"
FLAGS = [
    *("--data.image_size", "16", "--data.num_images", "40", "--log.trackers", "[]", "--train.precision", "fp32"),
    *("--architecture.channels", "[8, 16]", "--architecture.layers_per_block", "1"),
    *("--architecture.norm_groups", "4", "--loss.perceptual", "null"),
    *("--discriminator.channels", "8", "--discriminator.num_layers", "1", "--discriminator.start", "2"),
    *("--train.num_steps", "6", "--train.batch_size", "4", "--log.every", "1", "--log.num_validation", "4"),
    *("--log.sample_every", "0", "--log.checkpoint_every", "3"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(SCRIPT, *FLAGS, cwd=folder)
    return folder


@pytest.fixture
def train(monkeypatch):
    """Train an autoencoder in this process."""

    def here(folder, *flags):
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        script(SCRIPT).main(parse_run(AutoencodingConfig, list(flags)))

    return here


def same_weights(one, other, names=("ema", "state/autoencoder", "state/discriminator")):
    for name in names:
        a, b = (weights(folder, "autoencoder", 6, f"{name}.safetensors") for folder in (one, other))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_what_is_written_loads_as_a_codec_and_in_diffusers(whole):
    written = whole / "runs" / "autoencoder" / "autoencoder"
    codec = create_codec(str(written))
    theirs = AutoencoderKL.from_pretrained(written)
    assert codec.latent_shape(16, 16) == (4, 8, 8)
    assert theirs.config.scaling_factor == codec.identity["scale"] != 1
    averaged = weights(whole, "autoencoder", 6)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, averaged[f"autoencoder.{name}"])
    assert json.loads((written / "metrics.json").read_text())["psnr_images"] > 3
    assert (whole / "runs" / "autoencoder" / "samples" / "00000006.png").is_file()


def test_discriminator_joins_at_its_step(whole):
    steps = {event["step"]: event for event in log(whole, "autoencoder") if "loss" in event}
    assert "adversarial" not in steps[2]
    assert steps[3]["adaptive_weight"] > 0
    assert 0 <= steps[3]["fake_found"] <= 1


def test_resumed_run_equals_the_uninterrupted_one(whole, tmp_path):
    run(SCRIPT, *FLAGS, "--train.max_hours", "1e-9", cwd=tmp_path, check=False)  # stops after one step
    stopped = run(SCRIPT, "--resume", "runs/autoencoder", "--train.max_hours", "1e-9", cwd=tmp_path, check=False)
    assert stopped.returncode == 75
    assert "stopped after 2 of 6 steps; continue with --resume runs/autoencoder" in stopped.stdout
    run(SCRIPT, "--resume", "runs/autoencoder", "--train.max_hours", "null", cwd=tmp_path)
    same_weights(whole, tmp_path)


def test_muon_and_spectral_norms_resume_too(train, tmp_path):
    flags = [*FLAGS, "--optim.muon_lr", "1e-2", "--discriminator.norm", "spectral"]
    train(tmp_path / "one", *flags)
    with pytest.raises(SystemExit, match="75"):
        train(tmp_path / "other", *flags, "--train.max_hours", "1e-9")
    train(tmp_path / "other", "--resume", "runs/autoencoder", "--train.max_hours", "null")
    same_weights(tmp_path / "one", tmp_path / "other")


def test_images_that_came_or_went_are_no_longer_what_was_held_out(train, tmp_path):
    """Another split would train on images that were held out before, and measure on them."""
    for number in range(12):
        path = tmp_path / "images" / "a" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (20 * number, 0, 0)).save(path)
    flags = [*FLAGS, "--data.path", "images", "--train.max_hours", "1e-9"]
    with pytest.raises(SystemExit, match="75"):
        train(tmp_path, *flags)
    (tmp_path / "images").rename(tmp_path / "moved")
    moved = ["--resume", "runs/autoencoder", "--data.path", "moved"]
    with pytest.raises(SystemExit, match="75"):
        train(tmp_path, *moved)
    with pytest.raises(CheckpointError, match=r"--loss.learned_variance False: \S+ was trained with True"):
        train(
            tmp_path, *moved, "--loss.learned_variance", "false"
        )  # a parameter less: the others' moments would move up
    before = (tmp_path / "runs" / "autoencoder" / "log.jsonl").read_bytes()
    Image.new("RGB", (16, 16), (0, 99, 0)).save(tmp_path / "moved" / "a" / "new.png")
    with pytest.raises(CheckpointError, match=r"--data.path: \S+ was trained with another train, whose source_hash"):
        train(tmp_path, *moved)
    assert (tmp_path / "runs" / "autoencoder" / "log.jsonl").read_bytes() == before


def test_two_processes_train_like_one(whole, tmp_path):
    run(SCRIPT, *FLAGS, cwd=tmp_path, processes=2)
    for name in ("ema", "state/discriminator"):
        one, two = (weights(folder, "autoencoder", 6, f"{name}.safetensors") for folder in (whole, tmp_path))
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-4)


def test_decoder_only_training_leaves_latents_bitwise_identical(whole, train, tmp_path):
    start = whole / "runs" / "autoencoder" / "autoencoder"
    shutil.copytree(start, tmp_path / "start")
    flags = ["--init_from", "start", "--decoder_only", "true", "--name", "tuned", "--train.max_hours", "1e-9"]
    with pytest.raises(SystemExit, match="75"):
        train(tmp_path, *FLAGS, *flags)
    shutil.rmtree(tmp_path / "start")  # a resumed run does not read it again
    train(tmp_path, "--resume", "runs/tuned", "--train.max_hours", "null")
    before, after = create_codec(str(start)), create_codec(str(tmp_path / "runs" / "tuned" / "autoencoder"))
    batch = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(before.prepare(batch), after.prepare(batch))
    assert before.identity == after.identity  # what a latent cache asks for
    assert before.provenance != after.provenance
    assert not torch.equal(before.decode(before.encode(batch)), after.decode(after.encode(batch)))
    for file in (tmp_path / "runs" / "tuned" / "autoencoder").glob("*.json"):
        assert str(whole) not in json.dumps(json.loads(file.read_text()).pop("_name_or_path", "")), file


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--decoder_only", "true"], r"--decoder_only: there is no encoder to leave as it is; give --init_from"),
        (["--data.image_size", "17"], r"--data.image_size 17: this autoencoder reduces by 2"),
        (["--architecture.norm_groups", "3"], r"--architecture.norm_groups 3 must divide --architecture.channels 8"),
        (["--loss.perceptual", "nowhere.pt"], r"--loss.perceptual: network nowhere.pt: no such file; .* or null"),
        (["--loss.heads", "x.pth"], r"--loss.heads x.pth: it belongs to --loss.perceptual lpips"),
        (["--shapes_share", "1"], r"--shapes_share 1.0: leaves no images in a batch of 4"),
        (["--resume", "runs/none"], r"--resume runs/none: nothing to resume"),
    ],
)
def test_mistakes_get_a_sentence(flags, message, train, tmp_path, capsys):
    with pytest.raises(SystemExit), one_line_errors():
        train(tmp_path, *FLAGS, *flags)
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_discriminator_that_never_starts_is_said_once(train, tmp_path, capsys):
    train(tmp_path, *FLAGS, "--discriminator.start", "6")
    assert capsys.readouterr().out.count("--discriminator.start 6: the discriminator never starts in 6 steps") == 1


def test_discriminator_that_diverges_is_named_and_leaves_the_autoencoder_whole(tmp_path):
    done = run(SCRIPT, *FLAGS, "--discriminator.lr", "1e38", "--train.num_steps", "60", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "10 steps in a row had a gradient that is not finite, after 3 returns" in done.stderr
    assert "lower --discriminator.lr" in done.stderr
    averages = weights(tmp_path, "autoencoder", 3)  # nothing is saved while steps are skipped
    assert all(tensor.isfinite().all() for tensor in averages.values())
