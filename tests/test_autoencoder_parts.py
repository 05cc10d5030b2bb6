"""Parts of the autoencoder's training: loss terms by hand, gradient, discriminator, batches and optimizers."""

import math

import pytest
import torch
from accelerate import Accelerator
from processes import ROOT
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from autoencoder_training.autoencoder_config import (
    ArchitectureConfig,
    AutoencoderOptimConfig,
    AutoencodingConfig,
    DiscriminatorConfig,
    LossConfig,
)
from autoencoder_training.image_stream import ImageBatches, open_batches
from autoencoder_training.losses import (
    ADVERSARIAL,
    NORMS,
    AutoencoderObjective,
    PatchDiscriminator,
    adaptive_weight,
    build_objective,
    kl_divergence,
)
from autoencoder_training.model import (
    Autoencoding,
    autoencoder_optimizers,
    create_autoencoder,
    export_autoencoder,
    measure_latents,
)
from autoencoders.codec import create_codec
from experiment.cli import parse
from experiment.config import DataConfig

TINY = {"channels": [8, 16], "latent_channels": 4, "layers_per_block": 1, "norm_groups": 4}


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
    """The gradient assembled at the reconstruction equals autograd's through the sum of all terms."""
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
        terms = objective.discriminator_loss(critic, real, fake)
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


def test_writing_another_autoencoder_backs_up_the_previous_one(tmp_path):
    autoencoder, written = tiny().autoencoder.eval(), {"measure": False, "half": False}
    pixels = ((images() + 1) * 127.5).to(torch.uint8)
    for is_there in (False, True):  # the second as after a kill before the end was said
        export_autoencoder(tmp_path / "autoencoder", autoencoder, pixels, {"steps": 2}, **written)
        assert (tmp_path / "autoencoder/autoencoder.json").exists() == is_there
        (tmp_path / "autoencoder/autoencoder.json").touch()  # as evaluate.py leaves it
    assert [path.name for path in tmp_path.iterdir()] == ["autoencoder"]
    before = (tmp_path / "autoencoder/diffusion_pytorch_model.safetensors").read_bytes()
    autoencoder.decoder.conv_out.bias.data += 1
    export_autoencoder(tmp_path / "autoencoder", autoencoder, pixels, {"steps": 4}, **written)
    (kept,) = tmp_path.glob("autoencoder.before-*")
    assert (kept / "diffusion_pytorch_model.safetensors").read_bytes() == before
    assert (tmp_path / "autoencoder/diffusion_pytorch_model.safetensors").read_bytes() != before


def test_statistics_of_the_initial_autoencoder_are_dropped(tmp_path):
    """A mean and standard deviation per channel cannot stand beside a measured shift."""
    autoencoder = tiny().autoencoder.eval()
    autoencoder.register_to_config(latents_mean=[1.0] * 4, latents_std=[3.0] * 4)
    pixels = ((images() + 1) * 127.5).to(torch.uint8)
    export_autoencoder(tmp_path / "autoencoder", autoencoder, pixels, {}, measure=True, half=False)
    scale, shift = measure_latents(autoencoder, pixels)
    assert create_codec(str(tmp_path / "autoencoder")).normalisation == {"scale": scale, "shift": shift}


def test_weights_beyond_half_precision_stay_in_float32(tmp_path, capsys):
    autoencoder, pixels = tiny().autoencoder.eval(), ((images() + 1) * 127.5).to(torch.uint8)
    written = {"measure": False, "half": True}
    export_autoencoder(tmp_path / "half", autoencoder, pixels, {}, **written)
    assert not capsys.readouterr().out
    autoencoder.float().decoder.conv_out.bias.data[0] = 1e5
    export_autoencoder(tmp_path / "whole", autoencoder, pixels, {}, **written)
    assert "they are kept in float32" in capsys.readouterr().out
    half, whole = (load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in ("half", "whole"))
    assert {weight.dtype for weight in half.values()} == {torch.float16}
    assert {weight.dtype for weight in whole.values()} == {torch.float32}


def test_muon_takes_the_matrices_and_adamw_the_rest():
    model = tiny()
    optimizers = autoencoder_optimizers(model, AutoencoderOptimConfig(muon_lr=1e-2))
    matrices = optimizers["muon"].param_groups[0]["params"]
    rest = [parameter for group in optimizers["adamw"].param_groups for parameter in group["params"]]
    assert sum(p.numel() for p in [*matrices, *rest]) == sum(p.numel() for p in model.parameters())
    assert all(matrix.ndim > 1 for matrix in matrices)
    before = matrices[0].detach().clone()
    model(images(), torch.zeros(2, 4, 8, 8)).reconstruction.square().mean().backward()
    optimizers["muon"].step()
    assert not torch.equal(before, matrices[0])
    optimizers["muon"].zero_grad()
    assert all(matrix.grad is None for matrix in matrices)


@pytest.mark.parametrize("muon_lr", [None, 1e-2])
def test_what_multiplies_features_decays_and_nothing_else(muon_lr):
    model = tiny()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizers = autoencoder_optimizers(model, AutoencoderOptimConfig(lr=1e-2, muon_lr=muon_lr, weight_decay=0.5))
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizers.step()
    assert {weight.ndim for weight in model.parameters()} == {0, 1, 2, 4}
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, before[name] * (1 - 1e-2 * 0.5 * (weight.ndim > 1)), msg=name)
    numbers = [number for group in optimizers["adamw"].param_groups for number in group["numbers"]]
    assert sorted(numbers) == list(range(len(numbers)))  # as files had them before there were groups


def test_image_batches_depend_only_on_the_step_and_are_split_among_processes():
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


def test_images_are_mirrored_where_the_data_say_so():
    for flip in (True, False):
        data = DataConfig(num_images=40, image_size=16, flip=flip)
        batches = open_batches(AutoencodingConfig(data=data), Accelerator(cpu=True))
        batch, as_they_are = next(batches(0)), [batches.sources[0][index][0] for index in batches.indices(0)]
        is_same = (batch == torch.stack(as_they_are)).flatten(1).all(dim=1)
        assert bool(is_same.all()) != flip


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "autoencoder").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_build(path):
    config = parse(AutoencodingConfig, ["--config", str(path)])
    with torch.device("meta"):
        autoencoder = create_autoencoder(config.architecture, config.data.image_size)
        PatchDiscriminator(channels=config.discriminator.channels, num_layers=config.discriminator.num_layers)
    assert Autoencoding(autoencoder, learned_variance=config.loss.learned_variance).latent_shape(64)


def test_lpips_that_cannot_be_had_is_refused_in_words(monkeypatch):
    from urllib.error import URLError

    def offline(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", offline)
    with pytest.raises(ValueError, match=r"--loss.perceptual: network lpips: .* or null for none"):
        build_objective(LossConfig(), DiscriminatorConfig(), torch.device("cpu"))
