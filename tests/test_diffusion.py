"""Diffusions against closed forms: schedules, times, predictions and the loss."""

import itertools
import math

import pytest
import torch
from exact import backbone, gaussian_data, generator, labels, randn
from hypothesis import given
from hypothesis import strategies as st

from diffusion import DIFFUSIONS, Diffusion, GaussianDiffusion
from diffusion.diffusion import VARIANCES
from diffusion.schedules import SCHEDULES
from diffusion.targets import TARGETS

predictions = pytest.mark.parametrize("prediction", TARGETS)
MEAN, STD = 0.7, 0.4  # of the Gaussian data whose denoiser is known


def zero_model(x, t, y):
    return torch.zeros_like(x)


# The diffusion.


def test_diffusions_meet_the_protocol():
    for diffusion in DIFFUSIONS.values():
        assert isinstance(diffusion(), Diffusion)


def test_the_unscaled_schedule_is_linear_at_1000_steps_and_keeps_signal_at_25():
    assert torch.equal(SCHEDULES["linear_unscaled"](1000), SCHEDULES["linear"](1000))
    short = GaussianDiffusion("linear_unscaled", 25)
    assert (short.path.betas[0].item(), short.path.betas[-1].item()) == pytest.approx((1e-4, 0.02))
    assert short.path.alphas_cumprod[-1].item() == pytest.approx(0.777, abs=1e-3)


def test_cosine_schedule_is_the_formula():
    diffusion = GaussianDiffusion("cosine", num_timesteps=100)
    f = [math.cos((i / 100 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(101)]
    ours = diffusion.path.alphas_cumprod[:99]  # the last beta is clipped
    torch.testing.assert_close(ours, torch.tensor(f, dtype=torch.float64)[1:100] / f[0])
    assert diffusion.path.betas[-1] == 0.999


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_are_float64_and_noise_increases(schedule):
    diffusion = GaussianDiffusion(schedule)
    assert diffusion.path.betas.dtype == diffusion.path.alphas_cumprod.dtype == torch.float64
    assert (diffusion.path.alphas_cumprod.diff() < 0).all()
    left = 5e-3 if schedule == "scaled_linear" else 1e-4  # which ends with some of the data left
    assert diffusion.path.alphas_cumprod[-1] < left


@given(st.data())
def test_timesteps_ascend_from_first_to_last(data):
    num_timesteps = data.draw(st.integers(2, 1200))
    num_steps = data.draw(st.integers(1, num_timesteps))
    timesteps = GaussianDiffusion("cosine", num_timesteps).path.timesteps(num_steps).tolist()
    assert len(timesteps) == num_steps
    assert all(now < then for now, then in itertools.pairwise(timesteps))
    assert timesteps[-1] == num_timesteps - 1
    assert timesteps[0] == (0 if num_steps > 1 else num_timesteps - 1)


def test_all_timesteps_are_the_full_chain():
    diffusion = GaussianDiffusion()
    assert diffusion.path.timesteps(1000).tolist() == list(range(1000))
    t, transition = diffusion.reverse_steps(1000)[-501]
    assert t == 500
    for chain, gathered in zip(transition, diffusion.path.transition(torch.tensor([500])), strict=True):
        assert chain.float() == gathered.item()  # the chain's own numbers are float64


def test_training_times_are_uniform():
    t = GaussianDiffusion(num_timesteps=10, schedule="cosine").sample_timesteps(10_000, generator())
    counts = torch.bincount(t, minlength=10)
    assert t.dtype == torch.int64
    assert len(counts) == 10
    assert counts.min() > 850
    assert counts.max() < 1150


@predictions
@pytest.mark.parametrize("variance", VARIANCES)
def test_a_perfect_output_is_read_back(prediction, variance):
    diffusion = GaussianDiffusion(prediction=prediction, variance=variance)
    x_0, noise, t = randn(4, 3, 2, 2), randn(4, 3, 2, 2, seed=1), torch.tensor([0, 10, 400, 800])
    x_t = diffusion.q_sample(x_0, t, noise)
    output = TARGETS[prediction].combine(x_0, noise, diffusion.path.transition(t))
    if diffusion.learns_variance:
        output = torch.cat([output, torch.zeros_like(output)], dim=1)
    assert output.shape[1] == diffusion.output_channels(3)
    seen = diffusion.predict(output, x_t, t)
    torch.testing.assert_close(seen.x_0, x_0, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(seen.noise, noise, rtol=1e-3, atol=1e-4)
    assert (seen.log_variance is not None) == diffusion.learns_variance


def test_learned_variance_runs_between_its_bounds():
    diffusion, t = GaussianDiffusion(), torch.tensor([0, 1, 500, 999])
    at, x_t = diffusion.path.transition(t), randn(4, 1, 2, 2)
    for share, bound in ((-1.0, at.log_variance_min), (1.0, at.log_variance_max)):
        output = torch.cat([x_t, torch.full_like(x_t, share)], dim=1)
        torch.testing.assert_close(diffusion.predict(output, x_t, t).log_variance, bound.expand_as(x_t))


# The objective.


def test_predicting_zero_costs_the_squared_noise():
    diffusion = GaussianDiffusion(variance="fixed_small")
    noise = randn(3, 2, 4, 4)
    terms = diffusion.training_loss(zero_model, randn(3, 2, 4, 4, seed=1), labels(3), noise=noise)
    assert set(terms) == {"loss", "mse"}
    torch.testing.assert_close(terms["mse"], noise.square().mean(dim=(1, 2, 3)))
    assert torch.equal(terms["loss"], terms["mse"])


@predictions
def test_the_loss_of_the_exact_denoiser_is_the_conditional_variance(prediction):
    diffusion = GaussianDiffusion(prediction=prediction, variance="fixed_large")
    x_0, t = MEAN + STD * randn(2, 1, 300, 300), torch.tensor([100, 600])
    mse = diffusion.training_loss(
        backbone(diffusion, gaussian_data(MEAN, STD)), x_0, labels(2), t=t, noise=randn(2, 1, 300, 300, seed=1)
    )["mse"]
    at = diffusion.path.transition(t)
    alpha, sigma = at.alpha.flatten(), at.sigma.flatten()
    var_x_0 = (STD * sigma) ** 2 / ((STD * alpha) ** 2 + sigma**2)  # of x_0 given x_t
    expected = {"epsilon": (alpha / sigma) ** 2 * var_x_0, "x_0": var_x_0, "v": var_x_0 / sigma**2}
    torch.testing.assert_close(mse, expected[prediction], rtol=0.02, atol=0)


@pytest.mark.parametrize("num_timesteps", [1000, 100])
def test_the_variational_bound_has_gradients_for_the_variance_only(num_timesteps):
    diffusion = GaussianDiffusion(num_timesteps=num_timesteps)
    output = (0.1 * randn(4, 4, 3, 3)).requires_grad_()
    t = torch.tensor([0, 1, num_timesteps // 2, num_timesteps - 1])
    terms = diffusion.training_loss(lambda x, t, y: output, randn(4, 2, 3, 3, seed=1), labels(4), t=t)
    (of_bound,) = torch.autograd.grad(terms["vb"].sum(), output, retain_graph=True)
    (of_mse,) = torch.autograd.grad(terms["mse"].sum(), output)
    assert of_bound[:, :2].abs().max() == 0
    assert (of_bound[:, 2:].abs().amax(dim=(1, 2, 3)) > 0).all()
    assert of_mse[:, 2:].abs().max() == 0
    torch.testing.assert_close(terms["loss"], terms["mse"] + num_timesteps / 1000 * terms["vb"])


def test_half_precision_outputs_give_float32_losses():
    diffusion = GaussianDiffusion()
    terms = diffusion.training_loss(
        lambda x, t, y: torch.cat([x, x], dim=1).bfloat16(),
        randn(2, 2, 4, 4),
        labels(2),
        generator=generator(),
    )
    assert all(values.dtype == torch.float32 and values.shape == (2,) for values in terms.values())


def test_the_same_generator_draws_the_same_loss():
    diffusion, x_0 = GaussianDiffusion(variance="fixed_small"), randn(8, 1, 2, 2)
    first, again = (
        diffusion.training_loss(zero_model, x_0, labels(8), generator=generator(3))["loss"] for _ in range(2)
    )
    assert torch.equal(first, again)
