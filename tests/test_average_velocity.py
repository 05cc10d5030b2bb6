"""MeanFlow and shortcuts: average velocities of Gaussian data in closed form, and their samplers."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from exact import generator, labels, randn
from torch import nn

from autoencoders.codec import PixelCodec
from diffusion import DIFFUSIONS, FlowMatching, sample
from diffusion.options import SamplingOptions
from diffusion.samplers import SAMPLERS, num_calls
from experiment.build import model_spec
from experiment.config import DiffusionConfig, ExperimentConfig, SamplingConfig, TrainConfig
from sampling.checks import resolve_sampling

MEAN, STD = 0.7, 0.4
meanflow, shortcut = DIFFUSIONS["meanflow"], DIFFUSIONS["shortcut"]
improved = partial(meanflow, tangent="model")
predictions = pytest.mark.parametrize("prediction", ["velocity", "x_0"])
KINDS = {"meanflow": meanflow, "shortcut": shortcut}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def spread(t):
    return (((1 - t) * STD) ** 2 + t**2).sqrt()


def carried(x_t, r, t):
    """Where the flow of N(MEAN, STD^2) leads from t to r; all [b 1 1 1]."""
    return (1 - r) * MEAN + spread(r) / spread(t) * (x_t - (1 - t) * MEAN)


def velocity(x_t, t):
    return -MEAN + (t - (1 - t) * STD**2) / spread(t) ** 2 * (x_t - (1 - t) * MEAN)


class Perfect(nn.Module):
    """The exact average velocity between the times that a backbone is given, or the data that it leads to; for equal
    times, the velocity."""

    def __init__(self, prediction="velocity"):
        super().__init__()
        self.prediction = prediction

    def forward(self, x_t, t, y, *, r):
        r, t = (number[:, None, None, None] / 999 for number in (r, t))
        same = r == t
        average = (x_t - carried(x_t, r, t)) / torch.where(same, 1, t - r)
        average = torch.where(same, velocity(x_t, t), average)
        return average if self.prediction == "velocity" else x_t - t * average


def times(*numbers, dtype=torch.float64):
    return torch.tensor(numbers, dtype=dtype)


@pytest.mark.parametrize("kind", [*KINDS.values(), improved], ids=[*KINDS, "improved"])
@predictions
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_the_average_velocity_of_gaussian_data_is_its_own_target(kind, prediction, dtype, atol):
    r, t = times(0.0, 0.25, 0.5, 0.6, dtype=dtype), times(1.0, 0.75, 0.9, 0.6, dtype=dtype)
    x_t = randn(4, 2, 3, 3).to(dtype)
    v = velocity(x_t, t[:, None, None, None])
    diffusion, model = kind(prediction=prediction), Perfect(prediction)
    target = diffusion.average_velocity(model, x_t, t, v, torch.arange(4), y=labels(4), r=r)
    torch.testing.assert_close(target, Perfect()(x_t, 999 * t, labels(4), r=999 * r), rtol=0, atol=atol)
    assert not torch.allclose(target[:3], v[:3], atol=0.05)


@predictions
def test_a_difference_quotient_leaves_an_error_of_second_order(prediction):
    """Between the ends of the path; where r or the path's end bound the quotient on one side, of first order."""
    r, t = times(0.0, 0.25, 0.5, 0.6, 1.0), times(1.0, 0.75, 0.9, 0.6, 1.0)
    x_t, model = randn(5, 2, 3, 3).double(), Perfect(prediction)
    v, u = velocity(x_t, t[:, None, None, None]), Perfect()(x_t, 999 * t, labels(5), r=999 * r)

    def errors(difference):
        diffusion = DIFFUSIONS["meanflow"](prediction=prediction, difference=difference)
        target = diffusion.average_velocity(model, x_t, t, v, torch.arange(5), y=labels(5), r=r)
        return (target - u).abs().amax(dim=(1, 2, 3))

    coarse, fine = errors(0.04), errors(0.02)
    assert ((coarse / fine)[1:3] - 4).abs().max() < 0.3
    assert (coarse / fine)[0] == pytest.approx(2, abs=0.1)
    torch.testing.assert_close(fine[3:], torch.zeros(2).double(), rtol=0, atol=1e-9)
    assert fine.max() < 0.05 < (u - v).abs().max()


@kinds
@predictions
@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_any_number_of_steps_follows_the_exact_flow(kind, prediction, num_steps):
    noise = randn(3, 2, 4, 4)
    drawn = sample(kind(prediction=prediction), Perfect(prediction), noise, labels(3), num_steps=num_steps)
    torch.testing.assert_close(drawn, MEAN + STD * noise, rtol=0, atol=1e-5)
    assert num_calls(kind(), SamplingOptions(num_steps=num_steps)) == num_steps


@kinds
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_other_samplers_ask_for_the_velocity(kind, sampler):
    steps = {"sampler": sampler, "num_steps": 6}
    ours, theirs = (
        sample(diffusion, model, randn(2, 1, 4, 4), labels(2), generator=generator(), **steps)
        for diffusion, model in (
            (kind(), Perfect()),
            (FlowMatching(), lambda x_t, t, y: Perfect()(x_t, t, y, r=t)),
        )
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("sampler", "other"), [("meanflow", shortcut), ("shortcut", meanflow), ("shortcut", FlowMatching)]
)
def test_average_velocity_samplers_refuse_other_diffusions(sampler, other):
    words = rf"--sampling\.sampler {sampler}: for models of --diffusion\.kind {sampler} alone; choose from "
    with pytest.raises(ValueError, match=words):
        resolve_sampling(SamplingConfig(sampler=sampler), other(), 10)


LEARNED = [("meanflow", "omega and kappa", {"omega": 2.0}), ("shortcut", "guidance_scale", {"guidance_scale": 2.0})]


@pytest.mark.parametrize(("kind", "names", "settings"), LEARNED)
def test_guidance_that_is_trained_needs_a_null_label(kind, names, settings):
    learned, diffusion = DiffusionConfig(kind=kind, **settings), KINDS[kind](**settings)
    for num_classes, dropout in ((0, 0.1), (5, 0.0)):
        config = ExperimentConfig(model="DiT", diffusion=learned, train=TrainConfig(label_dropout=dropout))
        with pytest.raises(ValueError, match=rf"--diffusion\.{names}: .*leave it out"):
            model_spec(config, PixelCodec(), diffusion, num_classes)
    spec = model_spec(ExperimentConfig(model="DiT", diffusion=learned), PixelCodec(), diffusion, 5)
    assert spec.args == {"second_time": True}


@pytest.mark.parametrize("diffusion", [KINDS[kind](**settings) for kind, _, settings in LEARNED])
def test_guidance_learned_in_training_is_not_applied_again_by_default(diffusion):
    config = SamplingConfig(guidance_scale=1.5)
    assert resolve_sampling(config, diffusion, 10).guidance_scale == 1
    assert resolve_sampling(config, diffusion, 10, guidance_scale=2.0).guidance_scale == 2
    for others in (FlowMatching(), shortcut()):
        assert resolve_sampling(config, others, 10).guidance_scale == 1.5
    plain = resolve_sampling(config, shortcut(guidance_scale=3.0), 10, sampler="euler")
    assert plain.guidance_scale == 1.5  # its velocity has learned none


@kinds
def test_one_step_is_what_samplers_by_averages_take_unless_asked(kind):
    """Holds for resolved and recorded settings, for samples, and for the cost in a plan; null undoes an override."""
    config, noise = SamplingConfig(guidance_scale=1.0), randn(2, 1, 4, 4)
    for options, num_steps in [({}, 1), ({"sampler": "euler"}, 150), ({"num_steps": 4}, 4), ({"num_steps": None}, 1)]:
        resolved = resolve_sampling(config, kind(), 10, **options)
        assert (resolved.num_steps, num_calls(kind(), resolved)) == (num_steps, num_steps)
        told = [sample(kind(), Perfect(), noise, labels(2), one) for one in (SamplingOptions(**options), resolved)]
        torch.testing.assert_close(*told, rtol=0, atol=0)
    assert resolve_sampling(replace(config, num_steps=150), kind(), 10).num_steps == 150
    assert resolve_sampling(config, FlowMatching(), 10).num_steps == 150


@pytest.mark.parametrize("diffusion", [KINDS[kind](**settings) for kind, _, settings in LEARNED])
def test_a_guidance_scale_without_effect_is_reported(diffusion):
    def said(scale, num_guided=10, **overrides):
        words = []
        resolve_sampling(SamplingConfig(guidance_scale=scale), diffusion, num_guided, say=words.append, **overrides)
        return words

    without = "--sampling.guidance_scale 3 of the model's training: without effect, "
    assert said(3.0) == [f"{without}guidance is part of its training"]
    assert said(3.0, num_guided=0) == [f"{without}it has no null label to be guided away from"]
    plain = []
    resolve_sampling(SamplingConfig(guidance_scale=3.0), meanflow(), 10, say=plain.append)
    assert plain == [f"{without}meanflow is only guided if a command asks for it"]
    assert said(1.0) == said(1.5) == said(3.0, guidance_scale=1.0) == []  # 1.5 is what nobody asked for
    beyond = "--sampling.guidance_scale 2: beyond the guidance that is part of the model's training"
    assert said(3.0, guidance_scale=2.0) == [beyond]
    interval = "--sampling.guidance_interval: without effect, guidance is part of the model's training"
    assert said(1.5, guidance_interval=[0.3, 3.0]) == [interval]


# Shortcuts' steps.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_steps": 3}, r"--sampling\.num_steps 3: give 1, 2, 4, \.\.\. 64"),
        ({"num_steps": 4, "spacing": "karras"}, r"--sampling\.spacing karras: a shortcut's steps are uniform"),
    ],
)
def test_step_lengths_that_no_shortcut_was_trained_on_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        resolve_sampling(SamplingConfig(**options), shortcut(), 10)
    resolve_sampling(SamplingConfig(**options), shortcut(), 10, sampler="euler")
    with pytest.raises(ValueError, match=r"--diffusion\.sections 100 must be a power of two"):
        shortcut(sections=100)


@pytest.mark.parametrize("num_steps", [64, 128, 150])
def test_steps_shorter_than_the_shortest_trained_one_use_that_one(num_steps):
    seen, noise = set(), randn(3, 2, 4, 4)

    def model(x_t, t, y, *, r):
        seen.add(round(((t - r)[0] / 999).item(), 4))
        return Perfect()(x_t, t, y, r=r)

    drawn = sample(shortcut(), model, noise, labels(3), num_steps=num_steps)
    assert seen == {round(1 / 64, 4)}
    torch.testing.assert_close(drawn, MEAN + STD * noise, rtol=0, atol=0.03)


def test_shortcut_intervals_are_dyadic_and_contain_the_training_times():
    diffusion, num = shortcut(sections=16), 20_000
    t, second = (torch.rand(num, generator=generator(seed)) for seed in (1, 2))
    r, end = diffusion.interval_of(t, second)
    assert ((r <= t) & (t <= end)).all()
    lengths, counts = (end - r).unique(return_counts=True)
    assert lengths.tolist() == [1 / 8, 1 / 4, 1 / 2, 1]
    assert torch.equal(r / (end - r), (r / (end - r)).round())
    torch.testing.assert_close(counts / num, torch.full((4,), 0.25), rtol=0, atol=0.02)


def test_the_shortest_shortcut_is_two_euler_steps():
    """Intermediate times may lie off the grid: each of its sections takes two steps."""
    x_t, r, t = randn(2, 1, 3, 3).double(), times(0.25, 0.5), times(0.5, 0.75)
    target = shortcut(sections=8).average_velocity(Perfect(), x_t, t, x_t, torch.tensor([1]), y=labels(2), r=r)
    assert torch.equal(target[0], x_t[0])
    x, now = x_t[1:], torch.full((1, 1, 1, 1), 0.75, dtype=torch.float64)
    first = velocity(x, now)
    expected = (first + velocity(x - first / 8, now - 1 / 8)) / 2
    torch.testing.assert_close(target[1:], expected)
    assert ((Perfect()(x_t, 999 * t, labels(2), r=999 * r) - target)[1].abs() > 1e-3).any()
