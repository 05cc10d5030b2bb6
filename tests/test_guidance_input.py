"""The guidance scale as an input of the model, so that one model samples at any guidance, at one call a step."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from exact import generator, randn
from processes import assert_same_training, run
from test_average_velocity import carried, velocity
from test_average_velocity_training import FAMILIES, KINDS, losses
from test_backbones import inputs, small, wake
from torch import nn

from autoencoders.codec import PixelCodec
from checkpoints.checkpoint import WEIGHTS, open_checkpoint, save_tensors
from checkpoints.warm_start import warm_start
from conversion.diffusers_schedulers import to_scheduler
from diffusion import DIFFUSIONS, EDM, FlowMatching, GaussianDiffusion, sample
from diffusion.samplers import num_calls, num_evaluations
from experiment.build import model_spec
from experiment.config import DiffusionConfig, ExperimentConfig, SamplingConfig, TrainConfig
from sampling.checks import resolve_sampling
from training.batches import Batch
from training.objective import Objective

meanflow, shortcut = KINDS["meanflow"], KINDS["shortcut"]
families = pytest.mark.parametrize("name", [name for name in FAMILIES if name != "Cascade"])
every_kind = pytest.mark.parametrize("kind", ["gaussian", "flow", "edm", "meanflow", "shortcut"])
SCALES = torch.tensor([1.0, 1.7, 3.0, 5.0])


def prepared(name="DiT-S/2", kind="flow", **overrides):
    """A backbone for a diffusion that tells it the guidance scale, all of whose weights are nonzero."""
    diffusion = DIFFUSIONS[kind](guidance_max=5.0)
    return wake(small(name, out_channels=diffusion.output_channels(4), **diffusion.model_args, **overrides)), diffusion


# The backbones' input.


@families
def test_weights_without_the_input_begin_as_that_model_at_every_scale(name, tmp_path):
    plain, ours = wake(small(name)).eval(), small(name, guidance_input=True).eval()
    save_tensors(plain.state_dict(), tmp_path / WEIGHTS, {})
    words = warm_start(ours, str(tmp_path))
    assert words.count("guidance.mlp") == 4
    x_t, t, y = inputs()
    with torch.no_grad():
        assert torch.equal(ours(x_t, t, y, g=SCALES[1:]), plain(x_t, t, y))
        wake(ours)
        assert torch.equal(ours(x_t, t, y), ours(x_t, t, y, g=torch.ones(3)))
        assert not torch.equal(ours(x_t, t, y, g=SCALES[1:]), ours(x_t, t, y))
        one = ours(x_t[1:2], t[1:2], y[1:2], g=SCALES[2:3])
        torch.testing.assert_close(ours(x_t, t, y, g=SCALES[1:])[1:2], one, rtol=1e-4, atol=1e-5)


@families
def test_a_backbone_without_the_input_refuses_a_scale(name):
    with pytest.raises(ValueError, match="g: this backbone takes no guidance scale; build it with guidance_input=True"):
        small(name)(*inputs(), g=torch.ones(3))


def test_backbones_without_conditioning_or_labels_refuse_the_input():
    with pytest.raises(
        ValueError, match=r"conditioning=none leaves a guidance scale no place: --diffusion\.guidance_max"
    ):
        small("XSwin", num_classes=0, conditioning="none", guidance_input=True)
    learned, diffusion = DiffusionConfig(kind="flow", guidance_max=5.0), FlowMatching(guidance_max=5.0)
    for num_classes, dropout in ((0, 0.1), (5, 0.0)):
        config = ExperimentConfig(model="DiT", diffusion=learned, train=TrainConfig(label_dropout=dropout))
        with pytest.raises(ValueError, match=r"--diffusion\.guidance_max: .*no null label.*leave it out"):
            model_spec(config, PixelCodec(), diffusion, num_classes)
    config = ExperimentConfig(model="Cascade", diffusion=learned)
    with pytest.raises(
        ValueError, match=r"--model Cascade: kind flow with --diffusion\.guidance_max takes --model XSwin"
    ):
        model_spec(config, PixelCodec(), diffusion, 5)


@every_kind
def test_the_diffusion_asks_for_the_input(kind):
    config = ExperimentConfig(model="DiT", diffusion=DiffusionConfig(kind=kind, guidance_max=5.0))
    args = model_spec(config, PixelCodec(), DIFFUSIONS[kind](guidance_max=5.0), 5).args
    assert args == {**DIFFUSIONS[kind]().model_args, "guidance_input": True}
    assert "guidance_input" not in DIFFUSIONS[kind]().model_args


# Training.

CLASSES = torch.tensor([-0.8, 0.5])  # means of two classes of Gaussian data; the null label stands for one of mean 0
SCALED = torch.tensor([1.0, 1.7, 3.0, 4.5])


class ExactlyGuided(nn.Module):
    """Average velocities of Gaussian data of standard deviation 0.4, guided exactly.

    The classes and the null label share a covariance. So velocities differ by a function of t alone, guidance moves the
    mean to `null + g (mean - null)`, and the guided flow is that of Gaussian data with this mean.
    """

    num_classes = 2

    def __init__(self, prediction="velocity"):
        super().__init__()
        self.prediction = prediction

    def forward(self, x_t, t, y, *, g, r=None):
        r, t = (number[:, None, None, None] / 999 for number in (t if r is None else r, t))
        mean = torch.cat([CLASSES, torch.zeros(1)]).to(x_t)[y] * torch.where(y == 2, 1, g)
        mean, same = mean[:, None, None, None], r == t
        centred, shift = x_t - (1 - t) * mean, 0.7  # the functions are of data with a mean of 0.7
        x = centred + (1 - t) * shift
        average = (x - carried(x, r, t)) / torch.where(same, 1, t - r)
        average = torch.where(same, velocity(x, t), average) + shift - mean
        return average if self.prediction == "velocity" else x_t - t * average


def exact_inputs():
    r, t = torch.tensor([0.0, 0.2, 0.5, 0.6]).double(), torch.tensor([1.0, 0.75, 0.9, 0.6]).double()
    return randn(4, 2, 3, 3).double(), r, t, torch.tensor([0, 1, 0, 2]), SCALED.double()


@pytest.mark.parametrize("prediction", ["velocity", "x_0"])
@pytest.mark.parametrize(
    ("settings", "atol"), [({}, 1e-8), ({"tangent": "model"}, 1e-8), ({"difference": 1e-4}, 1e-3)], ids=str
)
def test_the_exactly_guided_average_velocity_is_its_own_target_at_every_scale(settings, atol, prediction):
    x_t, r, t, y, g = exact_inputs()
    diffusion, u = meanflow(prediction=prediction, guidance_max=5.0, **settings), ExactlyGuided()
    unguided = u(x_t, 999 * t, y, g=torch.ones_like(g))  # the mean of the samples' velocities
    target = diffusion.average_velocity(ExactlyGuided(prediction), x_t, t, unguided, torch.arange(4), y=y, r=r, g=g)
    expected = u(x_t, 999 * t, y, r=999 * r, g=g)
    torch.testing.assert_close(target, expected, rtol=0, atol=atol)
    assert (expected - u(x_t, 999 * t, y, r=999 * r, g=torch.ones_like(g)))[1:3].abs().min() > 0.1


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_the_scale_moves_the_mean_of_what_is_sampled_at_as_many_calls(num_steps):
    noise, y = randn(3, 2, 4, 4), torch.tensor([0, 1, 1])
    for scale in SCALED.tolist():
        drawn = sample(
            meanflow(guidance_max=5.0),
            ExactlyGuided(),
            noise,
            y,
            num_steps=num_steps,
            guidance_scale=scale,
            num_classes=2,
        )
        expected = scale * CLASSES[y][:, None, None, None] + 0.4 * noise
        torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [FlowMatching, EDM, partial(GaussianDiffusion, variance="fixed_small")])
def test_the_output_of_classifier_free_guidance_at_each_scale_is_its_own_target(kind):
    labelled, unlabelled = torch.tensor([0.5, -2.0]), 0.25

    class Model(nn.Module):
        num_classes = 2

        def forward(self, x_t, t, y, *, g):
            guided = unlabelled + g * (torch.cat([labelled, torch.tensor([unlabelled])])[y] - unlabelled)
            return torch.zeros_like(x_t) + guided[:, None, None, None]

    x_t, t, y = randn(4, 2, 4, 4), torch.tensor([1, 3, 5, 7]), torch.tensor([0, 1, 1, 2])
    target = torch.tensor([*labelled, unlabelled])[y][:, None, None, None].expand_as(x_t)
    learned = kind(guidance_max=5.0).guided_target(Model(), x_t, t, y, target, {"g": SCALES})
    torch.testing.assert_close(learned, Model()(x_t, t, y, g=SCALES))


@every_kind
def test_a_scale_of_one_trains_as_without_guidance(kind):
    model, diffusion = prepared(kind=kind)
    x_0, _, y = inputs(8)
    drawn = {"noise": randn(*x_0.shape, seed=5), "t": diffusion.sample_timesteps(8, generator(1))}
    if kind in ("meanflow", "shortcut"):
        drawn |= diffusion.draw_loss_args(x_0.shape, generator(2))
    others = {**drawn, "g": torch.ones(8)}
    ours, plain = (each.training_loss(model.eval(), x_0, y, **others) for each in (diffusion, DIFFUSIONS[kind]()))
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)
    guided = diffusion.training_loss(model, x_0, y, **{**drawn, "g": torch.full((8,), 3.0)})
    assert not torch.allclose(guided["mse"], plain["mse"], rtol=1e-3)


@every_kind
def test_without_a_label_the_target_is_plain_whatever_the_scale(kind):
    """The error of a model that ignores the scale is then the same at all of them."""
    model, diffusion = prepared(kind=kind)
    nn.init.zeros_(model.cond.guidance.mlp[2].weight)
    x_0, y = inputs(8)[0], torch.full((8,), model.num_classes)
    drawn = {"noise": randn(*x_0.shape, seed=5), "t": diffusion.sample_timesteps(8, generator(1))}
    if kind in ("meanflow", "shortcut"):
        drawn |= diffusion.draw_loss_args(x_0.shape, generator(2))
    errors = [
        diffusion.training_loss(model.eval(), x_0, y, **{**drawn, "g": torch.full((8,), scale)})["mse"]
        for scale in (1.0, 4.0)
    ]
    torch.testing.assert_close(*errors, rtol=1e-5, atol=1e-6)


@families
def test_the_derivative_along_the_path_is_that_of_finite_differences_at_a_scale(name):
    diffusion = meanflow(guidance_max=5.0, tangent="model")
    model = wake(small(name, out_channels=4, **diffusion.model_args)).eval().double()
    x_t, v, y = randn(2, 4, 8, 8).double(), randn(2, 4, 8, 8, seed=1).double(), torch.tensor([1, 5])
    r, t, step = torch.tensor([0.1, 0.4]).double(), torch.tensor([0.5, 0.8]).double(), 1e-6
    told = {"g": torch.tensor([1.5, 4.0]).double()}
    target = diffusion.average_velocity(model, x_t, t, v, torch.arange(2), y=y, r=r, **told)
    u = diffusion.precondition(model)
    with torch.no_grad():
        along = u(x_t, t, y, **told)
        ends = [u(x_t + sign * step * along, t + sign * step, y, r=r, **told) for sign in (1, -1)]
        guided = diffusion.guided(model, x_t, t, v, y=y, **told)
    derivative = (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close(
        (guided - target) / 0.4, derivative, rtol=1e-4, atol=1e-4 * derivative.abs().max().item()
    )


def test_shortcuts_guide_the_shortest_steps_by_the_scale_of_each_sample():
    class Guided(nn.Module):
        """Velocities that are the label (3 is the null label); averages are ten times larger."""

        num_classes = 3

        def forward(self, x_t, t, y, *, r, g):
            return torch.zeros_like(x_t) + (y * torch.where(r < t, 10, 1))[:, None, None, None]

    x_t, y, r, g = randn(3, 1, 2, 2), torch.tensor([1, 2, 3]), torch.zeros(3), torch.tensor([2.0, 4.0, 4.0])
    for length, expected in ((1 / 64, [2 * 1 - 3, 4 * 2 - 3 * 3, 3]), (1 / 32, [10, 20, 30])):
        diffusion = shortcut(guidance_max=5.0)
        target = diffusion.average_velocity(Guided(), x_t, r + length, x_t, torch.arange(3), y=y, r=r, g=g)
        assert target[:, 0, 0, 0].tolist() == expected


@every_kind
def test_scales_are_drawn_log_uniformly_and_each_part_of_a_batch_keeps_its_own(kind):
    diffusion = DIFFUSIONS[kind](guidance_max=4.0)
    drawn = diffusion.draw_loss_args((20_000, 1, 2, 2), generator())
    shares = drawn["g"].log() / torch.tensor(4.0).log()
    assert 0 <= shares.min() < 0.01 < 0.99 < shares.max() <= 1
    torch.testing.assert_close(shares.histc(4, 0, 1) / 20_000, torch.full((4,), 0.25), rtol=0, atol=0.02)
    plain = DIFFUSIONS[kind]().draw_loss_args((20_000, 1, 2, 2), generator())
    assert all(torch.equal(drawn[name], values) for name, values in plain.items())  # the other draws stay as they are
    model, diffusion = prepared(kind=kind)
    x_0, _, y = inputs(8)
    more, t = diffusion.draw_loss_args(x_0.shape, generator(2)), diffusion.sample_timesteps(8, generator(1))
    batch, objective = Batch(x_0, y, t, randn(*x_0.shape, seed=5), more), Objective(diffusion)
    together = objective(model.eval(), batch)["mse"]
    for part in (slice(0, 3), slice(3, 8)):
        share = {name: values[part] for name, values in more.items()}
        alone = objective(model, Batch(x_0[part], y[part], t[part], batch.noise[part], share))["mse"]
        torch.testing.assert_close(alone, together[part], rtol=1e-4, atol=1e-6)


@families
def test_all_gradients_are_finite_in_bfloat16_and_reach_every_weight(name):
    diffusion = meanflow(guidance_max=5.0)
    model = wake(small(name, out_channels=4, **diffusion.model_args)).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = losses(model, diffusion, g=torch.linspace(1, 5, 8))["loss"].mean()
    loss.backward()
    for key, weight in model.named_parameters():
        assert weight.grad is not None, key
        assert weight.grad.isfinite().all(), key
        assert weight.grad.any() or "guidance" not in key, key


def test_the_settings_of_one_scale_and_of_all_scales_exclude_each_other():
    words = (
        r"--diffusion\.guidance_scale 2\.0 sets one scale, --diffusion\.guidance_max 5\.0 all up to it: leave one out"
    )
    for kind in (FlowMatching, shortcut):
        with pytest.raises(ValueError, match=words):
            kind(guidance_scale=2.0, guidance_max=5.0)
    for fixed in ({"omega": 2.0}, {"kappa": 0.5}):
        with pytest.raises(
            ValueError, match=r"--diffusion\.omega .* set one scale, --diffusion\.guidance_max 5\.0 all"
        ):
            meanflow(guidance_max=5.0, **fixed)


# Sampling.


@every_kind
def test_the_model_is_told_the_scale_and_called_once(kind):
    """With the scale in a sampler's options, and nothing else, the model gets as many rows as there are samples."""
    model, diffusion = prepared(kind=kind)
    rows, told = [], []

    def watch(model, args, keywords):
        rows.append(len(args[0]))
        told.append(keywords["g"].tolist())

    model.register_forward_pre_hook(watch, with_kwargs=True)
    options = {"num_steps": 4, "sampler": None if kind in KINDS else "euler"}
    settings = resolve_sampling(SamplingConfig(guidance_scale=3.0), diffusion, 5, **options)
    assert settings.guidance_scale == 3
    noise, y = randn(3, 4, 8, 8), torch.arange(3)
    drawn = [sample(diffusion, model, noise, y, settings, guidance_scale=scale) for scale in (1.0, 3.0)]
    assert rows == [3] * 8
    assert told == [[1.0] * 3] * 4 + [[3.0] * 3] * 4
    assert num_calls(diffusion, settings) == num_evaluations(diffusion, settings) == 4
    assert not torch.allclose(*drawn)


def test_a_shortcuts_velocity_is_guided_as_that_of_any_flow():
    model, diffusion = prepared(kind="shortcut")
    rows = []
    model.register_forward_pre_hook(lambda model, args: rows.append(len(args[0])))
    sample(diffusion, model, randn(3, 4, 8, 8), torch.arange(3), sampler="euler", num_steps=2, guidance_scale=7.0)
    assert rows == [6, 6]


REFUSED = [
    ({"guidance_scale": 5.5}, r"--sampling\.guidance_scale 5\.5: the model has learned scales from 1 to 5; give one"),
    ({"guidance_scale": 0.5}, r"--sampling\.guidance_scale 0\.5: the model has learned scales from 1 to 5; give one"),
    ({"guidance_interval": [0.2, 5.0]}, r"--sampling\.guidance_interval: the model is told its guidance scale"),
    ({"guidance_rescale": 0.7}, r"--sampling\.guidance_rescale: .* no two outputs to combine; leave it out"),
    ({"guidance_parallel": 0.0}, r"--sampling\.guidance_parallel: "),
    ({"guidance_radius": 1.0}, r"--sampling\.guidance_radius: "),
    ({"legacy_cfg_channels": 3}, r"--sampling\.legacy_cfg_channels: "),
    ({"guidance_checkpoint": "runs/small"}, r"--sampling\.guidance_checkpoint: "),
]


@every_kind
@pytest.mark.parametrize(("settings", "words"), REFUSED, ids=[next(iter(settings)) for settings, _ in REFUSED])
def test_guidance_of_two_outputs_and_scales_that_were_not_learned_are_refused(kind, settings, words):
    diffusion, settings = DIFFUSIONS[kind](guidance_max=5.0), {"guidance_scale": 2.0, **settings}
    with pytest.raises(ValueError, match=words):
        resolve_sampling(SamplingConfig(), diffusion, 5, **settings)
    guide = nn.Identity() if settings.pop("guidance_checkpoint", None) else None
    with pytest.raises(ValueError, match=words):
        sample(diffusion, nn.Identity(), randn(1, 4, 8, 8), torch.zeros(1).long(), guide_model=guide, **settings)


def test_a_run_samples_and_is_scored_at_any_scale_in_one_call_and_resumes_bitwise(folder, colour_file):
    kind = ("--diffusion.kind", "meanflow", "--diffusion.guidance_max", 4, "--sampling.sampler", "null")
    flags = ("--optim.lr", 3e-2, "--train.ema_decay", 0.5, "--sampling.num_steps", 1, "--name", "told")
    run("train.py", "--config", "tiny.yaml", *kind, *flags, cwd=folder)
    shutil.copytree(folder / "runs" / "told", folder / "runs" / "told-cut")
    shutil.rmtree(folder / "runs" / "told-cut" / "checkpoints" / "00000004")
    run("train.py", "--resume", "runs/told-cut", cwd=folder)
    assert_same_training(folder, "told", "told-cut")

    drawn = []
    for scale in (1, 3):
        flags = ("--guidance_scale", scale, "--num_per_class", 1, "--output", f"told-{scale}.npz")
        run("sample.py", "--checkpoint", "runs/told", *flags, cwd=folder)
        with np.load(folder / f"told-{scale}.npz") as file:
            drawn.append(file["arr_0"])
    assert not np.array_equal(*drawn)
    scored = ("--extractor", colour_file, "--num_samples", 4, "--metrics", "[fid]", "--output", "told.json")
    run("evaluate.py", "--samples", "runs/told", "--guidance_scale", "1,3", *scored, cwd=folder)
    rows = [row["samples"] for row in json.loads((folder / "told.json").read_text())["rows"]]
    assert [(row["guidance_scale"], row["model_calls"]) for row in rows] == [(1, 1), (3, 1)]
    for program in (("sample.py", "--checkpoint", "runs/told"), ("evaluate.py", "--samples", "runs/told", *scored)):
        done = run(*program, "--guidance_scale", 4.5, cwd=folder, check=False)
        assert done.returncode == 2
        assert "the model has learned scales from 1 to 4; give one of these" in done.stderr.strip().splitlines()[-1]
        assert "Traceback" not in done.stderr

    checkpoint = open_checkpoint(folder / "runs" / "told")
    assert checkpoint.spec.args["guidance_input"]
    with pytest.raises(ValueError, match=r"--diffusion\.guidance_max 4: the model is told its .* scale, diffusers'"):
        to_scheduler("meanflow", checkpoint.build_diffusion(), checkpoint.config.sampling)
