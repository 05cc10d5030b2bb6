"""Samplers against closed forms and diffusers' schedulers, and invalid input."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from exact import backbone, gaussian_data, generator, labels, randn

from diffusion import SAMPLERS, GaussianDiffusion, sample
from diffusion.diffusion import VARIANCES
from diffusion.options import SamplingOptions
from diffusion.samplers import num_calls, randn_like
from diffusion.schedules import SCHEDULES
from diffusion.targets import TARGETS

predictions = pytest.mark.parametrize("prediction", TARGETS)
MEAN, STD = 0.7, 0.4  # of the Gaussian data whose denoiser is known


def zero_model(x, t, y):
    return torch.zeros_like(x)


def pointwise_model(x, t, y):
    """A model without reductions, whose order could depend on the batch."""
    return torch.tanh(x) * (0.5 + t / 2000)[:, None, None, None] + 0.1 * y[:, None, None, None]


# The samplers, on data whose denoiser is known.


@pytest.mark.parametrize(
    ("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.5), ("ddim", 1.0), ("dpmpp_2m", 0.0)]
)
@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name not in ("scaled_linear", "linear_unscaled")])
@predictions
def test_gaussian_data_come_out_with_mean_and_std(sampler, eta, schedule, prediction):
    diffusion = GaussianDiffusion(schedule, prediction=prediction, variance="fixed_large")
    x_0 = sample(
        diffusion,
        backbone(diffusion, gaussian_data(MEAN, STD)),
        randn(4, 1, 64, 64),
        labels(4),
        sampler=sampler,
        num_steps=250,
        sampler_args={"eta": eta} if sampler == "ddim" else {},
        generator=generator(1),
    )
    assert x_0.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert x_0.std().item() == pytest.approx(STD, rel=0.04)


@pytest.mark.parametrize("num_steps", [5, 20, 200])
def test_with_the_exact_variance_ancestral_sampling_needs_few_steps(num_steps):
    """Between Gaussians each reverse step is Gaussian; only the last one, which adds no noise, is inexact."""
    diffusion = GaussianDiffusion()
    steps = dict(diffusion.reverse_steps(num_steps))
    mean_of_noise = backbone(diffusion, gaussian_data(MEAN, STD))

    def model(x_t, t, y):
        at = steps[int(t[0])]
        var_x_0 = (STD * at.sigma) ** 2 / ((STD * at.alpha) ** 2 + at.sigma**2)
        variance = at.posterior_std**2 + at.x_0_weight**2 * var_x_0
        span = at.log_variance_max - at.log_variance_min
        share = 2 * (variance.log() - at.log_variance_min) / span - 1 if at.posterior_std > 0 else 0.0 * span
        return torch.cat([mean_of_noise(x_t, t, y), share.expand_as(x_t)], dim=1)

    x_0 = sample(diffusion, model, randn(4, 1, 128, 128), labels(4), num_steps=num_steps, generator=generator(1))
    assert x_0.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert x_0.std().item() == pytest.approx(STD, rel=0.01)


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpmpp_2m", 2)])
def test_deterministic_samplers_have_their_order(sampler, order):
    """Error against the exact solution of the probability-flow equation, just before the step to the data."""
    diffusion = GaussianDiffusion("cosine", num_timesteps=1000, variance="fixed_small")
    noise = randn(1, 1, 32, 32)
    first, last = (diffusion.path.transition(torch.tensor([t])) for t in (999, 0))

    def spread(at):
        return ((at.alpha * STD) ** 2 + at.sigma**2).sqrt()

    exact = last.alpha * MEAN + spread(last) * (noise - first.alpha * MEAN) / spread(first)

    def error(num_steps):
        seen = []
        settings = {"sampler": sampler, "num_steps": num_steps, "callback": lambda step, x_t, x_0: seen.append(x_t)}
        sample(diffusion, backbone(diffusion, gaussian_data(MEAN, STD)), noise, labels(1), **settings)
        return (seen[-2] - exact).square().mean().sqrt().item()

    slope = math.log2(error(28) / error(112)) / 2
    assert slope == pytest.approx(order, abs=0.3)


# The samplers against diffusers, where both define the same chain: every timestep visited.


DIFFUSERS = {"epsilon": "epsilon", "x_0": "sample", "v": "v_prediction"}  # prediction types


def diffusers_chain(scheduler, model, x, seed, **step_args):
    draw = generator(seed)
    seen = []
    for t in scheduler.timesteps:
        output = model(x, t.expand(len(x)), labels(len(x)))
        x = scheduler.step(output, t, x, generator=draw, **step_args).prev_sample
        seen.append(x)
    return seen


def our_chain(diffusion, model, x, seed, **sample_args):
    seen = []
    sample(
        diffusion,
        model,
        x,
        labels(len(x)),
        num_steps=diffusion.path.num_timesteps,
        generator=generator(seed),
        callback=lambda step, x_t, x_0: seen.append(x_t),
        **sample_args,
    )
    return seen


def assert_same_chain(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("variance", VARIANCES)
@predictions
def test_ddpm_agrees_with_diffusers(prediction, variance):
    diffusion = GaussianDiffusion(num_timesteps=50, prediction=prediction, variance=variance)
    scheduler = DDPMScheduler(
        50,
        trained_betas=diffusion.path.betas.numpy(),
        prediction_type=DIFFUSERS[prediction],
        variance_type=variance,
        clip_sample=False,
    )
    scheduler.set_timesteps(50)

    def model(x, t, y):
        output = 0.5 * pointwise_model(x, t, y)
        return torch.cat([output, -output], dim=1) if diffusion.learns_variance else output

    x = randn(2, 3, 4, 4)
    assert_same_chain(our_chain(diffusion, model, x, 5), diffusers_chain(scheduler, model, x, 5))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@predictions
def test_ddim_agrees_with_diffusers(prediction, eta):
    diffusion = GaussianDiffusion(num_timesteps=50, prediction=prediction, variance="fixed_small")
    scheduler = DDIMScheduler(
        50,
        trained_betas=diffusion.path.betas.numpy(),
        prediction_type=DIFFUSERS[prediction],
        clip_sample=False,
    )
    scheduler.set_timesteps(50)
    x = randn(2, 3, 4, 4)
    ours = our_chain(diffusion, pointwise_model, x, 5, sampler="ddim", sampler_args={"eta": eta})
    assert_same_chain(ours, diffusers_chain(scheduler, pointwise_model, x, 5, eta=eta))


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers, with numpy 2
@pytest.mark.parametrize("num_steps", [8, 20])
@predictions
def test_dpmpp_2m_agrees_with_diffusers(prediction, num_steps):
    diffusion = GaussianDiffusion(prediction=prediction, variance="fixed_small")
    scheduler = DPMSolverMultistepScheduler(
        1000,
        trained_betas=diffusion.path.betas.numpy(),
        prediction_type=DIFFUSERS[prediction],
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(timesteps=diffusion.path.timesteps(num_steps).flip(0).tolist())
    x, ours = randn(2, 3, 4, 4), []
    sample(
        diffusion,
        pointwise_model,
        x,
        labels(2),
        sampler="dpmpp_2m",
        num_steps=num_steps,
        callback=lambda step, x_t, x_0: ours.append(x_t),
    )
    assert_same_chain(ours, diffusers_chain(scheduler, pointwise_model, x, 5))


# Randomness, and what a caller may rely on.


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.7)])
def test_a_sample_depends_on_its_own_generator_alone(sampler, eta):
    diffusion = GaussianDiffusion(variance="fixed_small")

    def draw(indices):
        generators = [generator(index) for index in indices]
        noise = randn_like(torch.empty(len(indices), 2, 4, 4), generators)
        y = torch.tensor(indices)
        return sample(
            diffusion,
            pointwise_model,
            noise,
            y,
            sampler=sampler,
            num_steps=8,
            sampler_args={"eta": eta} if eta else {},
            generator=generators,
        )

    together = draw([0, 1, 2, 3, 4])
    assert torch.equal(together, torch.cat([draw([0, 1, 2]), draw([3, 4])]))
    assert torch.equal(together.flip(0), draw([4, 3, 2, 1, 0]))
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_deterministic_samplers_draw_nothing(sampler):
    diffusion, x = GaussianDiffusion(variance="fixed_small"), randn(2, 1, 4, 4)
    draw = generator(7)
    before = draw.get_state()
    sample(diffusion, pointwise_model, x, labels(2), sampler=sampler, num_steps=5, generator=draw)
    assert torch.equal(before, draw.get_state())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_step_goes_straight_to_the_prediction(sampler):
    seen = []
    diffusion = GaussianDiffusion(prediction="x_0")
    x_0 = sample(
        diffusion,
        lambda x, t, y: torch.cat([torch.full_like(x, t[0] / 1000), x], dim=1),
        randn(2, 1, 2, 2),
        labels(2),
        sampler=sampler,
        num_steps=1,
        callback=lambda step, x_t, x_0: seen.append(x_0),
    )
    torch.testing.assert_close(x_0, torch.full_like(x_0, 0.999))
    assert torch.equal(seen[0], x_0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_calls_of_the_model_are_counted(sampler):
    calls = []

    def model(x, t, y):
        calls.append(t)
        return torch.zeros_like(x)

    diffusion = GaussianDiffusion(variance="fixed_small")
    sample(diffusion, model, randn(1, 1, 2, 2), labels(1), sampler=sampler, num_steps=5, generator=generator())
    assert num_calls(diffusion, SamplingOptions(sampler, num_steps=5)) == len(calls) == (9 if sampler == "heun" else 5)


def test_sampling_keeps_no_gradient_but_its_result_can_be_trained_on():
    weight = torch.ones(1, requires_grad=True)
    diffusion = GaussianDiffusion(variance="fixed_small")
    x_0 = sample(diffusion, lambda x, t, y: weight * x, randn(1, 1, 2, 2), labels(1), num_steps=2)
    assert not x_0.requires_grad
    (weight * x_0).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sampler": "dpm"}, "--sampling.sampler dpm: unknown, choose from ddpm, ddim, euler"),
        ({"num_steps": 0}, r"--sampling.num_steps 0: must lie in \[1, inf\)"),
        ({"num_steps": 1001}, r"--num_steps 1001 must lie in 1\.\.1000"),
        (
            {"sampler": "ddim", "sampler_args": {"eta": -0.1}},
            r"--sampling.sampler_args.eta -0\.1: must lie in \[0, 1\]",
        ),
        ({"sampler": "ddim", "sampler_args": {"eta": 1.5}}, r"--sampling.sampler_args.eta 1\.5: must lie in"),
        ({"sampler": "ddim", "sampler_args": {"eta": "much"}}, "--sampling.sampler_args.eta much: ddim takes a float"),
        ({"sampler": "ddim", "sampler_args": {"churn": 1.0}}, "--sampling.sampler_args.churn: ddim takes eta"),
        ({"sampler_args": {"eta": 1.0}}, "--sampling.sampler_args.eta: ddpm takes no arguments"),
        ({"sampler": "heun", "sampler_args": {"churn": -1}}, "--sampling.sampler_args.churn -1: must lie in"),
        ({"clip": 0.0}, r"--sampling.clip 0\.0: must lie in"),
        ({"guidance_scale": 2.0}, "--sampling.guidance_scale 2.0: the model is unconditional"),
        ({"generator": [generator()]}, "1 generators for 2 samples"),
    ],
)
def test_bad_input_is_refused_in_words(arguments, words):
    diffusion = GaussianDiffusion(variance="fixed_small")
    with pytest.raises(ValueError, match=words):
        sample(diffusion, zero_model, randn(2, 1, 2, 2), labels(2), **arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"schedule": "sqrt"}, "--diffusion.schedule sqrt: unknown, choose from linear, .*cosine, sigmoid"),
        ({"prediction": "score"}, "--diffusion.prediction score: unknown, choose from epsilon, x_0, v"),
        ({"variance": "learned"}, "--diffusion.variance learned: unknown, choose from learned_range"),
        ({"num_timesteps": 1}, "--diffusion.num_timesteps 1 must be at least 2"),
        ({"num_timesteps": 20}, "--diffusion.num_timesteps 20 is too few for the linear schedule"),
    ],
)
def test_bad_diffusions_are_refused_in_words(arguments, words):
    with pytest.raises(ValueError, match=words):
        GaussianDiffusion(**arguments)
