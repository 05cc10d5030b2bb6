"""Both halves of classifier-free guidance: dropped labels, and two predictions mixed."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from diffusion import GaussianDiffusion, sample
from diffusion.guidance import drop_labels, guide
from models.reference import load_reference

FIXTURE = Path(__file__).parent / "fixtures" / "dit.safetensors"
NUM_CLASSES = 10


def label_model(x, t, y):
    """Every output channel c is y + c, whatever the input: twice the input's channels."""
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
    model = load_reference("dit", weights, config).eval()
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


@settings(deadline=None)
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
    with pytest.raises(ValueError, match=r"--guidance_scale 1\.5: the model is unconditional"):
        guide(label_model, 0, 1.5, latent_channels=4)
    for channels in (0, 5):
        with pytest.raises(ValueError, match=rf"--legacy_cfg_channels {channels} must lie in 1\.\.4"):
            guide(label_model, NUM_CLASSES, 1.5, latent_channels=4, legacy_cfg_channels=channels)


class Conditional(torch.nn.Module):
    num_classes = 2

    def forward(self, x, t, y):
        return torch.tensor([-1.0, 1.0, 0.0])[y][:, None, None, None].expand_as(x)


def test_sampling_is_guided_by_the_models_own_null_label():
    """Predicted `x_0` is -1 or 1 by label and 0 without: guidance by 3 makes it -3 or 3."""
    process = GaussianDiffusion(prediction="x_0", variance="fixed_small")
    noise, y = torch.randn(2, 1, 2, 2), torch.tensor([0, 1])
    x_0 = sample(process, Conditional(), noise, y, num_steps=4, guidance_scale=3.0)
    torch.testing.assert_close(x_0, torch.tensor([-3.0, 3.0])[:, None, None, None].expand_as(noise))
    by_hand = sample(
        process,
        Conditional().forward,
        noise,
        y,
        num_steps=4,
        guidance_scale=3.0,
        num_classes=2,
        sampler="ddim",
    )
    torch.testing.assert_close(by_hand, x_0)


@settings(deadline=None)
@given(st.floats(0, 1), st.integers(0, 2**31))
def test_labels_fall_with_their_probability(probability, seed):
    y = torch.arange(2000) % NUM_CLASSES
    dropped = drop_labels(y, probability, NUM_CLASSES, generator=torch.Generator().manual_seed(seed))
    fallen = dropped == NUM_CLASSES
    assert torch.equal(dropped[~fallen], y[~fallen])
    assert fallen.float().mean().item() == pytest.approx(probability, abs=0.07)


def test_no_label_falls_at_zero_and_all_at_one():
    y, uniform = torch.arange(4), torch.tensor([0.0, 0.3, 0.6, 1 - 2**-24])
    assert torch.equal(drop_labels(y, 0.0, NUM_CLASSES, uniform=uniform), y)
    assert drop_labels(y, 1.0, NUM_CLASSES, uniform=uniform).tolist() == [NUM_CLASSES] * 4
    assert drop_labels(y, 0.5, NUM_CLASSES, uniform=uniform).tolist() == [NUM_CLASSES, NUM_CLASSES, 2, 3]


def test_a_share_of_the_draw_drops_that_share_of_the_labels():
    y, uniform = torch.arange(8), torch.rand(8, generator=torch.Generator().manual_seed(0))
    whole = drop_labels(y, 0.5, NUM_CLASSES, uniform=uniform)
    parts = [drop_labels(y[part], 0.5, NUM_CLASSES, uniform=uniform[part]) for part in (slice(3), slice(3, 8))]
    assert torch.equal(whole, torch.cat(parts))
