"""The autoencoder's own training: its terms by hand, its gradient, its runs as real processes."""

import json
import math
import re
import shutil

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from PIL import Image
from processes import ROOT, log, run, script, weights
from torch import nn
from torch.utils.data import TensorDataset

from autoencoders.codec import create_codec
from autoencoding.autoencoder_config import (
    ArchitectureConfig,
    AutoencoderOptimConfig,
    AutoencodingConfig,
    DiscriminatorConfig,
    LossConfig,
)
from autoencoding.image_stream import ImageBatches
from autoencoding.losses import (
    ADVERSARIAL,
    NORMS,
    AutoencoderObjective,
    PatchDiscriminator,
    adaptive_weight,
    build_objective,
    kl_divergence,
)
from autoencoding.model import Autoencoding, autoencoder_optimizers, create_autoencoder, finish, measure_latents
from experiment.cli import one_line_errors, parse, parse_run
from machine.checkpoint_folder import CheckpointError

SCRIPT = "scripts/train_autoencoder.py"
TINY = {"channels": [8, 16], "latent_channels": 4, "layers_per_block": 1, "norm_groups": 4}
FLAGS = [
    *("--data.image_size", "16", "--data.num_images", "40", "--log.trackers", "[]", "--train.precision", "fp32"),
    *("--architecture.channels", "[8, 16]", "--architecture.layers_per_block", "1"),
    *("--architecture.norm_groups", "4", "--loss.perceptual", "null"),
    *("--discriminator.channels", "8", "--discriminator.num_layers", "1", "--discriminator.start", "2"),
    *("--train.num_steps", "6", "--train.batch_size", "4", "--log.every", "1", "--log.num_validation", "4"),
    *("--log.sample_every", "0", "--log.checkpoint_every", "3"),
]


class Slope(nn.Module):
    """A perceptual network whose features are twice the image."""

    def forward(self, images):
        return 2 * images


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def tiny(**settings):
    torch.manual_seed(0)
    return Autoencoding(create_autoencoder(ArchitectureConfig(**TINY), 16), learned_variance=True, **settings)


def images(num=2, size=16):
    return torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(("error", "expected"), [("l1", 0.5), ("l2", 0.25)])
def test_likelihood_by_hand(error, expected):
    objective = AutoencoderObjective(LossConfig(error=error, perceptual_weight=0.1), DiscriminatorConfig(), Slope())
    terms = objective.likelihood(torch.full((1, 3, 2, 2), 0.5), torch.zeros(1, 3, 2, 2), torch.tensor(0.7))
    assert terms["error"].item() == pytest.approx(expected)
    assert terms["perceptual"].item() == pytest.approx(1.0)  # (2 * 0.5)^2
    assert terms["nll"].item() == pytest.approx((expected + 0.1) * math.exp(-0.7) + 0.7)


def test_kl_divergence_by_hand():
    mean, log_variance = torch.full((1, 1, 1, 2), 2.0), torch.tensor([0.0, math.log(4.0)]).view(1, 1, 1, 2)
    first, second = (4 + 1 - 1 - 0) / 2, (4 + 4 - 1 - math.log(4)) / 2
    assert kl_divergence(mean, log_variance).item() == pytest.approx((first + second) / 2)
    normal = torch.distributions.Normal
    closed = torch.distributions.kl_divergence(normal(2.0, 2.0), normal(0.0, 1.0))
    assert second == pytest.approx(closed.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "told_apart", "fooled"),
    [
        ("hinge", (0.0 + 1.5) / 2, -0.5),
        ("bce", (math.log1p(math.exp(-2)) + math.log1p(math.exp(0.5))) / 2, math.log1p(math.exp(-0.5))),
    ],
)
def test_adversarial_terms_by_hand(loss, told_apart, fooled):
    real, fake = torch.tensor(2.0), torch.tensor(0.5)
    assert ADVERSARIAL[loss].discriminator(real, fake).item() == pytest.approx(told_apart)
    assert ADVERSARIAL[loss].autoencoder(fake).item() == pytest.approx(fooled)


def test_adaptive_weight_is_the_ratio_of_gradients_and_clamped():
    assert adaptive_weight(torch.tensor([3.0, 4.0]), torch.tensor([0.5, 0.0]), 1e4).item() == pytest.approx(
        10, rel=1e-5
    )
    assert adaptive_weight(torch.tensor([3.0, 4.0]), torch.tensor([0.5, 0.0]), 2.0).item() == 2
    assert adaptive_weight(torch.tensor([3.0, 4.0]), torch.zeros(2), 100.0).item() == 100


@pytest.mark.parametrize("learned_variance", [True, False])
def test_gradient_is_that_of_the_sum_of_terms(accelerator, learned_variance):
    """Put together at the reconstruction, against autograd through the whole."""
    config, discriminator = LossConfig(kl_weight=0.3, perceptual_weight=0.1), DiscriminatorConfig(weight=0.5)
    objective = AutoencoderObjective(config, discriminator, Slope())
    model, critic, x = tiny(), PatchDiscriminator(channels=8, num_layers=1), images()
    if learned_variance:
        nn.init.constant_(model.log_scale, 0.2)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))

    terms = objective.backward(accelerator, model(x, noise), x, model, critic)
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(parameter.grad is None for parameter in critic.parameters())

    model.zero_grad()
    coded = model(x, noise)
    likelihood = objective.likelihood(coded.reconstruction, x, model.log_scale)["nll"].mean()
    adversarial = -critic(coded.reconstruction).mean()
    last = model.autoencoder.decoder.conv_out.weight
    (first,) = torch.autograd.grad(likelihood, last, retain_graph=True)
    (second,) = torch.autograd.grad(adversarial, last, retain_graph=True)
    adaptive = first.norm() / (second.norm() + 1e-6)
    kl = kl_divergence(coded.mean, coded.log_variance).mean()
    (likelihood + 0.5 * adaptive * adversarial + 0.3 * kl).backward()
    assert terms["adaptive_weight"][0].item() == pytest.approx(adaptive.item(), rel=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_discriminator_learns_to_tell_apart_and_leaves_the_autoencoder_alone(accelerator):
    objective = AutoencoderObjective(LossConfig(perceptual=None), DiscriminatorConfig(), None)
    torch.manual_seed(0)
    critic = PatchDiscriminator(channels=8, num_layers=1)
    optimizer = torch.optim.Adam(critic.parameters(), 1e-2)
    real, fake = images(8), images(8) * 0.3
    for _ in range(30):
        terms = objective.tell_apart(critic, real, fake)
        terms["discriminator"].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert terms["real_found"].mean() > 0.9
    assert terms["fake_found"].mean() > 0.9


@pytest.mark.parametrize("norm", NORMS)
def test_discriminator_judges_each_image_by_itself(norm):
    torch.manual_seed(0)
    critic = PatchDiscriminator(channels=8, num_layers=3, norm=norm).eval()
    x = images(3, 64)
    assert critic(x).shape == (3, 1, 6, 6)
    torch.testing.assert_close(critic(x)[1:2], critic(x[1:2]))


def test_spectral_norm_bounds_each_layer():
    torch.manual_seed(0)
    critic = PatchDiscriminator(channels=8, num_layers=3, norm="spectral").train()
    for _ in range(50):
        critic(images(1, 64))
    weights = [layer.weight for layer in critic.eval().layers if hasattr(layer, "parametrizations")]
    assert len(weights) == 3
    for weight in weights:
        assert torch.linalg.matrix_norm(weight.flatten(1), 2).item() == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("factor", [4, 8, 16])
@pytest.mark.parametrize("channels", [4, 8, 16, 32])
def test_any_shape_builds(factor, channels):
    with torch.device("meta"):
        autoencoder = create_autoencoder(
            ArchitectureConfig(channels=[32] * (factor.bit_length()), latent_channels=channels), 64
        )
    model = Autoencoding(autoencoder, learned_variance=False)
    assert model.latent_shape(64) == (channels, 64 // factor, 64 // factor)
    with pytest.raises(ValueError, match=r"--data.image_size 66: this autoencoder reduces by"):
        model.latent_shape(66)


def test_another_autoencoder_in_the_place_of_one_keeps_it(tmp_path):
    autoencoder, written = tiny().autoencoder.eval(), {"measure": False, "half": False}
    pixels = ((images() + 1) * 127.5).to(torch.uint8)
    for is_there in (False, True):  # the second as after a kill before the end was said
        finish(tmp_path / "autoencoder", autoencoder, pixels, {"steps": 2}, **written)
        assert (tmp_path / "autoencoder/autoencoder.json").exists() == is_there
        (tmp_path / "autoencoder/autoencoder.json").touch()  # as evaluate.py leaves it
    assert [path.name for path in tmp_path.iterdir()] == ["autoencoder"]
    before = (tmp_path / "autoencoder/diffusion_pytorch_model.safetensors").read_bytes()
    autoencoder.decoder.conv_out.bias.data += 1
    finish(tmp_path / "autoencoder", autoencoder, pixels, {"steps": 4}, **written)
    (kept,) = tmp_path.glob("autoencoder.before-*")
    assert (kept / "diffusion_pytorch_model.safetensors").read_bytes() == before
    assert (tmp_path / "autoencoder/diffusion_pytorch_model.safetensors").read_bytes() != before


def test_statistics_of_what_it_began_from_go(tmp_path):
    """A mean and a deviation for each channel, which no shift may stand beside."""
    autoencoder = tiny().autoencoder.eval()
    autoencoder.register_to_config(latents_mean=[1.0] * 4, latents_std=[3.0] * 4)
    pixels = ((images() + 1) * 127.5).to(torch.uint8)
    finish(tmp_path / "autoencoder", autoencoder, pixels, {}, measure=True, half=False)
    scale, shift = measure_latents(autoencoder, pixels)
    assert create_codec(str(tmp_path / "autoencoder")).normalisation == {"scale": scale, "shift": shift}


def test_muon_takes_the_matrices_and_adamw_the_rest():
    model = tiny()
    optimizers = autoencoder_optimizers(model, AutoencoderOptimConfig(muon_lr=1e-2))
    matrices, rest = optimizers["muon"].param_groups[0]["params"], optimizers["adamw"].param_groups[0]["params"]
    assert sum(p.numel() for p in [*matrices, *rest]) == sum(p.numel() for p in model.parameters())
    assert all(matrix.ndim > 1 for matrix in matrices)
    before = matrices[0].detach().clone()
    model(images(), torch.zeros(2, 4, 8, 8)).reconstruction.square().mean().backward()
    optimizers["muon"].step()
    assert not torch.equal(before, matrices[0])
    optimizers["muon"].zero_grad()
    assert all(matrix.grad is None for matrix in matrices)


def test_batches_depend_on_the_step_alone_and_are_shared_out():
    def flat(*numbers):
        pixels = torch.tensor(numbers, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
        return TensorDataset(pixels, torch.zeros(len(numbers)))

    source, shapes = flat(*range(10)), flat(100, 101, 102, 103)

    def stream(step, **where):
        found = ImageBatches([source, shapes], [4, 2], seed=0, **where)(step)
        return [next(found)[:, 0, 0, 0].tolist() for _ in range(3)]

    whole = stream(0)
    assert stream(2)[0] == whole[2]
    first, second = stream(0, rank=0, num_ranks=2), stream(0, rank=1, num_ranks=2)
    assert [sorted(a + b) for a, b in zip(first, second, strict=True)] == [sorted(batch) for batch in whole]
    assert all(sum(number >= 100 for number in batch) == 2 for batch in whole)
    assert len({number for batch in whole for number in batch if number < 100}) == 10  # 12 places: an epoch and more
    with pytest.raises(ValueError, match=r"--train.batch_size 6 must be a multiple of 4 processes"):
        ImageBatches([source, shapes], [4, 2], seed=0, num_ranks=4)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "autoencoder").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_build(path):
    config = parse(AutoencodingConfig, ["--config", str(path)])
    with torch.device("meta"):
        autoencoder = create_autoencoder(config.architecture, config.data.image_size)
        PatchDiscriminator(channels=config.discriminator.channels, num_layers=config.discriminator.num_layers)
    assert Autoencoding(autoencoder, learned_variance=config.loss.learned_variance).latent_shape(64)


# --- real processes


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(SCRIPT, *FLAGS, cwd=folder)
    return folder


@pytest.fixture
def train(monkeypatch):
    """The same without a process of its own."""

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
    assert "stopped after 2 of 6 steps; go on with --resume runs/autoencoder" in stopped.stdout
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
    """Another split would train on what was held out before, and measure on it."""
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


def test_decoder_alone_leaves_latents_bit_identical(whole, train, tmp_path):
    start = whole / "runs" / "autoencoder" / "autoencoder"
    shutil.copytree(start, tmp_path / "start")
    flags = ["--init_from", "start", "--decoder_only", "true", "--name", "tuned", "--train.max_hours", "1e-9"]
    with pytest.raises(SystemExit, match="75"):
        train(tmp_path, *FLAGS, *flags)
    shutil.rmtree(tmp_path / "start")  # a resumed run does not read it again
    train(tmp_path, "--resume", "runs/tuned", "--train.max_hours", "null")
    before, after = create_codec(str(start)), create_codec(str(tmp_path / "runs" / "tuned" / "autoencoder"))
    batch = ((images(4) + 1) * 127.5).to(torch.uint8)
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


def test_lpips_that_cannot_be_had_is_refused_in_words(monkeypatch):
    from urllib.error import URLError

    def offline(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", offline)
    with pytest.raises(ValueError, match=r"--loss.perceptual: network lpips: .* or null for none"):
        build_objective(LossConfig(), DiscriminatorConfig(), torch.device("cpu"))


def test_discriminator_that_diverges_is_named_and_leaves_the_autoencoder_whole(tmp_path):
    done = run(SCRIPT, *FLAGS, "--discriminator.lr", "1e38", "--train.num_steps", "60", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "10 steps in a row had a gradient that is not finite, after 3 returns" in done.stderr
    assert "lower --discriminator.lr" in done.stderr
    averages = weights(tmp_path, "autoencoder", 3)  # nothing is saved while steps are skipped
    assert all(tensor.isfinite().all() for tensor in averages.values())
