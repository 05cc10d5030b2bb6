"""Classifier-free guidance: label dropout, and the combination of two predictions."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from exact import DIFFUSIONS, labels, randn
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from test_backbones import wake

from autoencoders.codec import PixelCodec, weights_sha256
from checkpoints.checkpoint import make_metadata, save_tensors
from conversion.weights import infer_arguments, load_reference
from diffusion import EDM, SAMPLERS, FlowMatching, GaussianDiffusion, SamplingOptions, sample
from diffusion.guidance import drop_labels, guide, linear_guidance, projected_guidance, rescaled_guidance
from diffusion.paths import GaussianChain
from diffusion.samplers import check_options, num_evaluations
from experiment.config import ExperimentConfig, SamplingConfig, TrainConfig
from models import ModelSpec
from sampling.checks import files_in_record, load_guide_model

FIXTURE = Path(__file__).parent / "fixtures" / "dit.safetensors"
NUM_CLASSES = 10


def label_model(x, t, y):
    """A model whose output channel c is y + c for any input; it has twice the input's channels."""
    channels = torch.arange(2 * x.shape[1], dtype=x.dtype)
    shape = (len(x), 2 * x.shape[1], *x.shape[2:])
    return (y[:, None, None, None] + channels[:, None, None]).expand(shape)


def inputs(num: int = 3, channels: int = 4):
    x = torch.randn(num, channels, 2, 2, generator=torch.Generator().manual_seed(0))
    return x, torch.full((num,), 500), torch.arange(num)


def test_the_published_guidance_is_reproduced():
    with safe_open(FIXTURE, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    weights = {name.removeprefix("weights/"): value for name, value in tensors.items() if name.startswith("weights/")}
    model = load_reference("dit", weights, infer_arguments("dit", weights, num_heads=4))
    x, t, y = tensors["in/x"], tensors["in/t"], tensors["in/y"]
    with torch.no_grad():
        ours = guide(model, config["num_classes"], 4.0, latent_channels=4)(x, t, y)
        legacy = guide(model, config["num_classes"], 4.0, latent_channels=4, legacy_cfg_channels=3)(x, t, y)

    def error(a, b):
        return ((a - b).abs().max() / b.abs().max()).item()

    assert error(ours[:, :4], tensors["out/cfg4_all_eps_channels"]) < 1e-4
    assert error(ours[:, 4:], tensors["out/eval"][:, 4:]) < 1e-4  # the variance stays conditional
    # The published code carries the null half along; the conditional half is the first.
    assert error(legacy, tensors["out/cfg4_first3channels"][:3]) < 1e-4


@given(st.floats(-2, 10).filter(lambda scale: scale != 1))
def test_the_prediction_moves_along_the_line_from_null_to_conditional(scale):
    x, t, y = inputs()
    output = guide(label_model, NUM_CLASSES, scale, latent_channels=4)(x, t, y)
    conditional, null = label_model(x, t, y), label_model(x, t, torch.full_like(y, NUM_CLASSES))
    torch.testing.assert_close(output[:, :4], (null + scale * (conditional - null))[:, :4], rtol=1e-4, atol=1e-4)
    assert torch.equal(output[:, 4:], conditional[:, 4:])


def test_both_halves_run_as_one_batch():
    calls = []

    def model(x, t, y):
        calls.append((x, t, y))
        return label_model(x, t, y)

    x, t, y = inputs()
    guide(model, NUM_CLASSES, 2.0, latent_channels=4)(x, t, y)
    ((seen_x, seen_t, seen_y),) = calls
    assert torch.equal(seen_x, torch.cat([x, x]))
    assert torch.equal(seen_t, torch.cat([t, t]))
    assert seen_y.tolist() == [0, 1, 2, 10, 10, 10]


def test_scale_one_runs_the_model_as_it_is():
    assert guide(label_model, NUM_CLASSES, 1.0, latent_channels=4) is label_model
    assert guide(label_model, 0, 1.0, latent_channels=4) is label_model


def test_guiding_all_channels_by_the_legacy_option_is_guiding_all():
    x, t, y = inputs()
    ours = guide(label_model, NUM_CLASSES, 3.0, latent_channels=4)(x, t, y)
    assert torch.equal(ours, guide(label_model, NUM_CLASSES, 3.0, latent_channels=4, legacy_cfg_channels=4)(x, t, y))


def test_what_cannot_be_guided_is_refused_in_words():
    with pytest.raises(ValueError, match=r"--sampling.guidance_scale 1\.5: the model is unconditional"):
        guide(label_model, 0, 1.5, latent_channels=4)
    for channels in (0, 5):
        with pytest.raises(ValueError, match=rf"legacy_cfg_channels {channels} must lie in 1\.\.4"):
            guide(label_model, NUM_CLASSES, 1.5, latent_channels=4, legacy_cfg_channels=channels)


class Conditional(torch.nn.Module):
    num_classes = 2

    def forward(self, x, t, y):
        return torch.tensor([-1.0, 1.0, 0.0])[y][:, None, None, None].expand_as(x)


def test_sampling_is_guided_by_the_models_own_null_label():
    """The predicted `x_0` is -1 or 1 by label and 0 without, so guidance by 3 gives -3 or 3."""
    diffusion = GaussianDiffusion(prediction="x_0", variance="fixed_small")
    noise, y = torch.randn(2, 1, 2, 2), torch.tensor([0, 1])
    x_0 = sample(diffusion, Conditional(), noise, y, num_steps=4, guidance_scale=3.0)
    torch.testing.assert_close(x_0, torch.tensor([-3.0, 3.0])[:, None, None, None].expand_as(noise))
    by_hand = sample(
        diffusion,
        Conditional().forward,
        noise,
        y,
        num_steps=4,
        guidance_scale=3.0,
        num_classes=2,
        sampler="ddim",
    )
    torch.testing.assert_close(by_hand, x_0)


@given(st.floats(0, 1), st.integers(0, 2**31))
def test_labels_fall_with_their_probability(probability, seed):
    y = torch.arange(2000) % NUM_CLASSES
    dropped = drop_labels(y, probability, NUM_CLASSES, generator=torch.Generator().manual_seed(seed))
    fallen = dropped == NUM_CLASSES
    assert torch.equal(dropped[~fallen], y[~fallen])
    assert fallen.float().mean().item() == pytest.approx(probability, abs=0.07)


def test_label_dropout_drops_nothing_at_zero_and_all_at_one():
    y, uniform = torch.arange(4), torch.tensor([0.0, 0.3, 0.6, 1 - 2**-24])
    assert torch.equal(drop_labels(y, 0.0, NUM_CLASSES, uniform=uniform), y)
    assert drop_labels(y, 1.0, NUM_CLASSES, uniform=uniform).tolist() == [NUM_CLASSES] * 4
    assert drop_labels(y, 0.5, NUM_CLASSES, uniform=uniform).tolist() == [NUM_CLASSES, NUM_CLASSES, 2, 3]


def test_label_dropout_of_parts_equals_that_of_the_whole_batch():
    y, uniform = torch.arange(8), torch.rand(8, generator=torch.Generator().manual_seed(0))
    whole = drop_labels(y, 0.5, NUM_CLASSES, uniform=uniform)
    parts = [drop_labels(y[part], 0.5, NUM_CLASSES, uniform=uniform[part]) for part in (slice(3), slice(3, 8))]
    assert torch.equal(whole, torch.cat(parts))


# Refinements.


class Counting(torch.nn.Module):
    """A model that records the batch size and the time of each call."""

    num_classes = 2

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, t, y):
        self.calls.append((len(x), t[0].item()))
        return torch.where((y == 2)[:, None, None, None], 0.1 * x, 0.2 * x)


@pytest.mark.parametrize("diffusion", [GaussianDiffusion(variance="fixed_small"), FlowMatching(), EDM()])
def test_outside_the_guidance_interval_only_the_conditional_half_runs(diffusion):
    model, low, high = Counting(), 0.3, 3.0
    steps = diffusion.reverse_steps(20, "log_snr")
    settings = {"sampler": "euler", "num_steps": 20, "spacing": "log_snr", "guidance_scale": 3.0}
    sample(diffusion, model, randn(5, 1, 2, 2), labels(5), guidance_interval=[low, high], **settings)
    expected = [10 if low <= at.sigma / at.alpha <= high else 5 for _, at in steps]
    assert [size for size, _ in model.calls] == expected
    options = SamplingOptions(**settings, guidance_interval=[low, high])
    assert num_evaluations(diffusion, options) == sum(expected) / 5
    assert {5, 10} == set(expected)


def test_rescaling_is_that_of_the_paper():
    """Lin et al. 2023, eq. 14 to 16, for each sample."""
    good, worse = randn(3, 4, 5, 5), randn(3, 4, 5, 5, seed=1)
    ours = rescaled_guidance(linear_guidance, 0.7)(good, worse, 5.0, good, labels(3))
    for index, rescaled_output in enumerate(ours):
        guided = worse[index] + 5.0 * (good[index] - worse[index])
        expected = guided * good[index].std() / guided.std()
        torch.testing.assert_close(rescaled_output, 0.7 * expected + 0.3 * guided)


@pytest.mark.parametrize("diffusion", DIFFUSIONS)
def test_projection_that_leaves_nothing_out_is_plain_guidance(diffusion):
    diffusion = DIFFUSIONS[diffusion]()
    t = torch.tensor([500, 20]) if isinstance(diffusion.path, GaussianChain) else torch.tensor([0.7, 0.2])
    x_t, good, worse = (randn(2, 3, 4, 4, seed=seed) for seed in range(3))
    mixed = projected_guidance(diffusion, 1.0, None)(good, worse, 2.5, x_t, t)
    torch.testing.assert_close(mixed, linear_guidance(good, worse, 2.5, x_t, t), rtol=1e-3, atol=1e-3)


def test_adaptive_projection_is_the_algorithm_of_the_paper():
    """Sadat et al. 2024, algorithm 1 without momentum, on predictions of `x_0`."""
    diffusion = GaussianDiffusion(prediction="x_0", variance="fixed_small")
    good, worse = randn(2, 3, 4, 4, seed=1), randn(2, 3, 4, 4, seed=2)
    mixed = projected_guidance(diffusion, 0.2, 2.0)(good, worse, 3.0, randn(2, 3, 4, 4), torch.tensor([500, 500]))
    for index, push in enumerate(good - worse):
        push = push * min(1, 2.0 / push.norm())
        unit = good[index] / good[index].norm()
        along = (push * unit).sum() * unit
        expected = good[index] + 2.0 * (push - along + 0.2 * along)
        torch.testing.assert_close(mixed[index], expected, rtol=1e-4, atol=1e-4)


def test_autoguidance_pushes_away_from_the_worse_model_with_the_same_label():
    seen = []

    def worse(x, t, y):
        seen.append(y.tolist())
        return torch.full_like(x, 0.5)

    diffusion = GaussianDiffusion(prediction="x_0", variance="fixed_small")
    settings = {"sampler": "ddim", "num_steps": 3, "guidance_scale": 2.0, "guide_model": worse}
    x_0 = sample(diffusion, lambda x, t, y: torch.ones_like(x), randn(2, 1, 2, 2), torch.tensor([0, 1]), **settings)
    torch.testing.assert_close(x_0, torch.full_like(x_0, 1.5))
    assert seen == [[0, 1]] * 3


def test_a_guide_of_other_labels_or_latents_is_refused(tmp_path):
    """A guide with as many classes of other names, or as many channels of another autoencoder, would mean something
    else."""
    spec = ModelSpec("DiT", {"dim": 8, "depth": 1, "num_heads": 1}, (4, 4), 3, 6, 2)
    config, identity = ExperimentConfig("DiT", spec.args, "pixel"), {"codec": PixelCodec.provenance}
    metadata = make_metadata(config, 5, identity, spec=spec, classes=["cat", "dog"])
    save_tensors(weights := spec.build().state_dict(), tmp_path / "guide.safetensors", metadata)
    sampling = SamplingConfig(guidance_checkpoint=str(tmp_path / "guide.safetensors"))
    assert files_in_record(sampling) == {"guide_sha256": weights_sha256(weights)}
    assert files_in_record(SamplingConfig()) == files_in_record(SamplingConfig(spacing="karras")) == {}
    (tmp_path / "levels.txt").write_bytes(b"1 2")
    table = SamplingConfig(spacing=str(tmp_path / "levels.txt"))
    assert files_in_record(table) == {"spacing_sha256": hashlib.sha256(b"1 2").hexdigest()}

    def load(classes, identity):
        return load_guide_model(sampling, config.diffusion, spec, Accelerator(cpu=True), classes, identity)

    for known in (identity, {}):  # of older checkpoints nothing is known
        assert load(["cat", "dog"], known) is not None
    with pytest.raises(
        ValueError, match=r'its classes is .* model\'s \["dog", "cat"\]; .* with --guidance_unlabelled true'
    ):
        load(["dog", "cat"], identity)
    with pytest.raises(ValueError, match=r"its latents is .* only backbone and training may differ"):
        load(["cat", "dog"], {"codec": {**PixelCodec.provenance, "scale": 2.0}})


def test_a_guide_used_without_labels_may_have_other_classes(tmp_path):
    """In Domain Guidance the model that a fine-tuning started from is evaluated with its own null label."""
    spec = ModelSpec("DiT", {"dim": 8, "depth": 1, "num_heads": 1}, (4, 4), 3, 6, 2)
    model = wake(spec.build())
    for name, dropout in (("guide", 0.1), ("never", 0.0)):
        config = ExperimentConfig("DiT", spec.args, "pixel", train=TrainConfig(label_dropout=dropout))
        metadata = make_metadata(config, 5, {}, spec=spec, classes=["cat", "dog"])
        save_tensors(model.state_dict(), tmp_path / f"{name}.safetensors", metadata)

    def load(name):
        sampling = SamplingConfig(guidance_checkpoint=str(tmp_path / f"{name}.safetensors"), guidance_unlabelled=True)
        guided = replace(spec, num_classes=7)
        return load_guide_model(
            sampling, ExperimentConfig().diffusion, guided, Accelerator(cpu=True), list("abcdefg"), {}
        )

    x_t, t = randn(3, 3, 4, 4), torch.tensor([0, 500, 999])
    guide = load("guide")
    assert guide is not None
    asked = guide(x_t, t, torch.tensor([0, 6, 7]))
    torch.testing.assert_close(asked, model.eval()(x_t, t, torch.tensor([2, 2, 2])))
    assert (asked - model(x_t, t, torch.tensor([0, 0, 0]))).abs().max() > 1e-4
    with pytest.raises(ValueError, match=r"knows no null label; leave it out"):
        load("never")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"interval": [2.0, 1.0]}, r"guidance_interval \[2.0, 1.0\]: give the least and the largest"),
        ({"interval": [2.0]}, r"guidance_interval \[2.0\]: give the least and the largest"),
        ({"rescale": 1.5}, r"guidance_rescale 1.5: must lie in \[0, 1\]"),
        ({"radius": 0.0}, r"guidance_radius 0.0: must lie in \(0, inf\)"),
    ],
)
def test_refinements_out_of_range_are_refused_in_words(arguments, words):
    options = SamplingOptions(**{f"guidance_{name}": value for name, value in arguments.items()})
    with pytest.raises(ValueError, match=f"--sampling.{words}"):
        check_options(options, GaussianDiffusion())


@pytest.mark.parametrize("worse", [False, True])
@pytest.mark.parametrize("diffusion", [GaussianDiffusion(variance="fixed_small"), FlowMatching(), EDM()])
def test_extras_reach_both_halves_of_a_guided_batch(diffusion, worse, monkeypatch):
    """Extras may belong to the whole batch, or have one row per sample, in the order of the samples."""
    seen = []

    class Told(torch.nn.Module):
        num_classes = 2

        def forward(self, x, t, y, *, size, until):
            seen.append((size.flatten().tolist(), until))
            return x * size[:, None, None]

    def told(chain, x_t):
        size = torch.tensor([[1.0], [2.0], [3.0]])
        for t, at in chain.steps:
            x_0 = chain.denoise(x_t, t, at, until="the end", size=size).x_0
            yield x_0, x_0

    monkeypatch.setitem(SAMPLERS, "told", told)
    settings = {"sampler": "told", "num_steps": 1, "guidance_scale": 2.0, "guide_model": Told() if worse else None}
    sample(diffusion, Told(), randn(3, 1, 2, 2), labels(3), **settings)
    rows = [1.0, 2.0, 3.0]
    assert seen == ([(rows, "the end")] * 2 if worse else [(rows * 2, "the end")])
