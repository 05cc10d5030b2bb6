"""The cascade: its stages, its three training phases, and its sampling."""

import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import test_backbones as promises
import torch
import yaml
from exact import generator, labels, randn
from processes import TINY, log, run, weights
from torch import nn

from autoencoders.codec import PixelCodec
from checkpoints.averages import EMA
from diffusion import GaussianDiffusion, SamplingOptions, sample
from diffusion.samplers import SamplerRun
from experiment.build import model_spec
from experiment.config import DiffusionConfig, ExperimentConfig, OptimConfig
from models import create_model
from sampling.panels import StagesPanel
from studies.cascade import cascade as Cascade
from studies.cascade.denoising import Denoising
from studies.cascade.refinement import SuperResolution
from studies.cascade.three_stages import COARSE, REFINERS, UPSAMPLERS
from training.objective import phase_at
from training.optimizer import build_optimizer, learning_rate

SMALL = {
    "diffusion": {"width": 8, "latent": 16, "num_blocks": 2},
    "dae": {"width": 8, "latent": 16},
    "resnet": {"width": 8, "latent": 16, "num_blocks": 2},
    **{name: {"width": 8} for name in ("pixelshuffle", "upsampler resnet", "conv")},
    "vit": {"width": 16, "depth": 1, "num_heads": 2},
    "refiner diffusion": {"width": 8, "num_blocks": 1},
}
CHOICES = [
    *((name, "pixelshuffle", "vit") for name in COARSE),
    *(("diffusion", name, "conv") for name in UPSAMPLERS),
    *(("diffusion", "interpolation", name) for name in REFINERS if name != "conv"),
    ("dae", "interpolation", "diffusion"),
]


def cascade(coarse="diffusion", upsampler="pixelshuffle", refiner="vit", num_classes=3, **settings):
    diffusion = Cascade(coarse, upsampler, refiner, num_timesteps=50, **settings)
    torch.manual_seed(0)
    sizes = {
        "coarse_args": SMALL[coarse],
        "upsampler_args": SMALL.get(f"upsampler {upsampler}", SMALL.get(upsampler, {})),
        "refiner_args": SMALL.get(f"refiner {refiner}", SMALL.get(refiner, {})),
    }
    shape = {"input_size": 16, "in_channels": 3, "out_channels": 3, "num_classes": num_classes}
    return diffusion, create_model("Cascade", **shape, **diffusion.model_args, **sizes)


def wake(model):
    """Give zero-initialised layers values, as they block the gradients behind them."""
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.1, generator=generator(2))
    return model


X_0, Y = randn(4, 3, 16, 16, seed=5), torch.tensor([0, 1, 2, 3])


def loss_of(diffusion, model, phase, progress=0.5):
    return diffusion.training_loss(model, X_0, Y, generator=generator(1), **diffusion.phase_loss_args(phase, progress))


def names_with_gradients(model):
    return {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(("coarse", "upsampler", "refiner"), CHOICES, ids=[" ".join(choice) for choice in CHOICES])
def test_every_choice_trains_two_steps_in_each_phase_and_samples(coarse, upsampler, refiner):
    promises.test_every_name_builds_on_the_meta_device("Cascade", coarse=coarse, upsampler=upsampler, refiner=refiner)
    diffusion, model = cascade(coarse, upsampler, refiner)
    learned = {name for name, part in model.named_children() if any(True for _ in part.parameters())}
    expected = [{"coarse"}, learned - {"coarse"}, learned]
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3))
    for phase in range(3):
        if not expected[phase]:
            continue
        losses = []
        for _ in range(3):
            terms = loss_of(diffusion, model, phase)
            assert all(values.shape == (4,) and values.isfinite().all() for values in terms.values())
            terms["loss"].mean().backward()
            assert names_with_gradients(model) == expected[phase]
            losses.append(terms["loss"].mean().item())
            optimizer.step()
            optimizer.zero_grad()
        assert losses[2] < losses[0]
        trained = diffusion.phase_loss_args(phase, 0.0)["trained"]
        assert trained == ("mse" in terms, "refined" in terms)
    shown = {}
    drawn = sample(diffusion, model.eval(), randn(2, 3, 16, 16), labels(2), num_steps=3, on_stage=shown.__setitem__)
    assert {name: image.shape[-1] for name, image in shown.items()} == {"coarse": 8, "upsampler": 16, "refiner": 16}
    assert torch.equal(shown["refiner"], drawn)
    assert drawn.isfinite().all()
    assert model(X_0, torch.zeros(4), Y).shape == X_0.shape  # as any backbone


def test_a_frozen_stage_and_its_average_stay_bitwise():
    diffusion, model = cascade()
    ema, optimizer = EMA(model, 0.9), build_optimizer(model, OptimConfig(lr=1e-2, weight_decay=0.1))

    def step(phase, number):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        averages = {name: value.clone() for name, value in ema.tensors.items()}
        loss_of(diffusion, model, phase)["loss"].mean().backward()
        optimizer.step()
        ema.update(model, number)
        optimizer.zero_grad()
        moved = {name.split(".")[0] for name, value in model.state_dict().items() if not value.equal(before[name])}
        followed = {name.split(".")[0] for name, value in ema.tensors.items() if not value.equal(averages[name])}
        assert moved == followed
        return moved

    others = {"upsampler", "refiner"}
    found = [step(phase, number) for number, phase in enumerate([0, 0, 1, 1, 2])]
    assert found == [{"coarse"}, {"coarse"}, others, others, {"coarse", *others}]


def test_the_gradient_of_the_refined_image_reaches_the_coarse_stage_unless_the_teacher_forces():
    diffusion, model = cascade(forcing=((0.0, 0.0), (1.0, 0.0)))
    wake(model)
    for progress, reaches in ((0.0, False), (1.0, True)):
        model.zero_grad()
        terms = loss_of(diffusion, model, 2, progress)
        assert terms["forced"].tolist() == [1.0 - progress] * 4
        terms["refined"].mean().backward()
        gradients = [parameter.grad for parameter in model.coarse.parameters()]
        assert any(gradient is not None and bool(gradient.any()) for gradient in gradients) is reaches


def test_unforced_the_upsampler_sees_the_one_step_prediction():
    diffusion, model = cascade(forcing=((0.0, 0.0), (0.0, 0.0)), prediction="epsilon")
    wake(model)
    seen = []
    model.upsampler.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    t, noise = torch.tensor([3, 20, 30, 49]), randn(*X_0.shape, seed=9)
    diffusion.training_loss(model, X_0, Y, t=t, noise=noise, **diffusion.phase_loss_args(1, 0.0))
    small, small_noise = (nn.functional.avg_pool2d(each, 2) for each in (X_0, 2 * noise))
    chain = GaussianDiffusion(num_timesteps=50, variance="fixed_small")
    alpha, sigma = chain.path.levels(t)
    x_t = alpha * small + sigma * small_noise
    expected = (x_t - sigma * model.coarse(x_t, t, Y)) / alpha
    torch.testing.assert_close(seen[0], expected)


def test_phases_and_forcing_are_functions_of_the_step():
    diffusion = Cascade()
    phases = [phase_at(diffusion.phases, step, 1000) for step in range(1000)]
    assert [phase.number for phase in phases] == [0] * 350 + [1] * 350 + [2] * 300
    assert [phase.step for phase in phases] == [*range(350), *range(350), *range(300)]
    assert {phase.end for phase in phases} == {350, 700, 1000}
    ends = [diffusion.phase_loss_args(phases[step].number, phases[step].progress) for step in (350, 699, 700, 999)]
    assert [end["forcing"] for end in ends] == pytest.approx([0.9, 0.1, 0.1, 0.0])
    middle = [diffusion.phase_loss_args(1, progress)["forcing"] for progress in (0.25, 0.5, 0.75)]
    assert middle == pytest.approx([0.7, 0.5, 0.3])
    validated = diffusion.training_loss(cascade()[1], X_0, Y)
    assert validated["forced"].tolist() == [1.0] * 4  # outside of the phases
    forced = [loss_of(*cascade(), 1, 0.5)["forced"].tolist() for _ in range(2)]
    assert forced[0] == forced[1]
    draws = diffusion.draw_loss_args((20_000, 1, 2, 2), generator(3))["forcing"]
    assert (draws < 0.3).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert [phase_at((1, 0, 1), step, 4).number for step in range(4)] == [0, 0, 2, 2]
    assert [phase_at((1.0,), step, 3).end for step in range(3)] == [3, 3, 3]


def test_the_learning_rate_halves_every_fifteen_epochs_of_each_phase():
    config = OptimConfig(lr=2e-4, decay="step", decay_epochs=15.0, decay_factor=0.5)
    rates = []
    for step in range(1000):  # 100 epochs of 10 steps
        phase = phase_at((35, 35, 30), step, 1000)
        rates.append(learning_rate(config, phase.step, phase.num_steps, epoch_steps=10.0))
    a_phase = [2e-4] * 150 + [1e-4] * 150 + [0.5e-4] * 50
    assert rates == pytest.approx([*a_phase, *a_phase, *a_phase[:300]])


def test_small_noise_is_unit_normal_and_small_images_are_means():
    diffusion = Cascade(factor=4)
    noise = diffusion.downsample_noise(randn(64, 1, 64, 64))
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert diffusion.downsample(torch.full((1, 1, 8, 8), 0.3)).tolist() == [[[[pytest.approx(0.3)] * 2] * 2]]


def test_repeated_denoising_has_the_variance_of_its_markov_chain():
    """On N(0, s^2) the exact denoiser shrinks by c, so the variance goes v -> c^2 v + sigma^2 in each round."""
    diffusion, s = Denoising(1.0, 0.5), 0.7
    c = s**2 / (s**2 + 0.5**2)
    seen = []
    drawn = sample(
        diffusion,
        lambda x, t, y: c * x,
        randn(4, 1, 64, 64),
        labels(4),
        num_steps=4,
        generator=generator(1),
        callback=lambda step, x_t, x_0: seen.append(x_0.var().item()),
    )
    variance, expected = 1.0, []
    for _ in range(4):
        expected.append(c**2 * variance)
        variance = c**2 * variance + 0.5**2
    assert seen == pytest.approx(expected, rel=0.03)
    assert drawn.var().item() == pytest.approx(seen[-1])
    with pytest.raises(ValueError, match=r"--sampling.sampler ddim: unknown, choose from iterated"):
        sample(diffusion, lambda x, t, y: x, randn(1, 1, 2, 2), labels(1), sampler="ddim")


def test_a_coarse_stage_with_alpha_zero_sees_only_noise():
    diffusion = Denoising(0.0, 1.0)
    noise = randn(*X_0.shape)
    given = []
    diffusion.training_loss(lambda x, t, y: given.append(x) or x, X_0, Y, noise=noise)
    assert torch.equal(given[0], noise)
    drawn = sample(diffusion, lambda x, t, y: 2 * x, noise, Y, num_steps=1)
    assert torch.equal(drawn, 2 * noise)


def test_with_a_guide_model_no_stage_uses_the_null_label():
    """The null label may never have been trained."""
    process, model = cascade("diffusion", "interpolation", "diffusion")
    seen = []
    for stage in (model.coarse, model.refiner):
        stage.cond.register_forward_pre_hook(lambda _, given: seen.append(given[1].unique().tolist()))
    settings = {"num_steps": 2, "guidance_scale": 2.0}
    sample(process, model, randn(2, 3, 16, 16), torch.tensor([0, 2]), guide_model=cascade()[1], **settings)
    assert seen == [[0, 2]] * 4
    sample(process, model, randn(2, 3, 16, 16), torch.tensor([0, 2]), **settings)
    assert seen[4:] == [[0, 2, 3]] * 4


def test_super_resolution_is_told_how_much_noise_the_coarse_image_holds():
    """In training the level varies, at sampling it is constant; a perfect denoiser then returns the image."""
    images = GaussianDiffusion(num_timesteps=50, variance="fixed_small")
    stage = SuperResolution(images, [0.5, 0.2])
    draws = stage.draw((1000, 1, 4, 4), 2, generator(1), "cpu")
    assert (draws["level"].min().item(), draws["level"].max().item()) == (0, 24)
    low = randn(1000, 1, 2, 2, seed=3)
    alpha, sigma = images.path.levels(draws["level"])
    assert torch.equal(stage.augment(low, draws), alpha * low + sigma * draws["level_noise"])
    assert SuperResolution(images, [0, 0]).augment(low, draws) is low

    told = []

    def refiner(up, given):
        x_t, t, level, _ = given
        told.append((level.tolist(), len(up)))
        return images.target(up, (x_t - images.path.levels(t).alpha * up) / images.path.levels(t).sigma, t)

    model = SimpleNamespace(upsampler=partial(nn.functional.interpolate, scale_factor=2.0), refiner=refiner)
    for scale in (1.0, 2.0):
        run_sampler = SamplerRun(SamplingOptions(num_steps=5, guidance_scale=scale), 3, None, None, None)
        up, drawn = stage.generate(run_sampler, model, low[:2], labels(2), torch.zeros_like)
        torch.testing.assert_close(drawn, up, atol=1e-4, rtol=1e-4)
        assert told[-1] == ([9, 9], 2) if scale == 1 else ([9] * 4, 4)


@pytest.mark.parametrize("refiner", ["vit", "diffusion"])
def test_a_sample_depends_on_its_own_stream_alone(refiner):
    diffusion, model = cascade(refiner=refiner)
    wake(model).eval()
    noise = randn(3, 3, 16, 16)

    def draw(part):
        streams = [generator(number) for number in range(3)][part]
        return sample(diffusion, model, noise[part], Y[:3][part], num_steps=3, guidance_scale=2.0, generator=streams)

    together = draw(slice(3))
    alone, size = draw(slice(1, 2)), together.abs().max()
    assert (alone - together[1:2]).abs().max() < 1e-4 * size
    assert (alone - together[:1]).abs().max() > 1e-2 * size


SIZES = {"in_channels": 3, "out_channels": 3, "num_classes": 0}
MISTAKES = {
    "coarse": (lambda: Cascade("gan"), "--diffusion.coarse gan: unknown, choose from diffusion, dae, resnet"),
    "phases": (lambda: Cascade(phases=[1, 2]), r"--diffusion.phases \[1, 2\]: give the lengths of three phases"),
    "forcing": (
        lambda: Cascade(forcing=[[0.9, 1.5], [0, 0]]),
        r"--diffusion.forcing \[\[0.9, 1.5\], .*a first and a last",
    ),
    "sigma": (lambda: Cascade("dae", sigma=0.0), r"--diffusion.sigma 0.0 must be above 0"),
    "augmentation": (lambda: Cascade(refiner="diffusion", augmentation=[0.1, 0.5]), r"augmentation \[0.1, 0.5\]: give"),
    "stages": (lambda: StagesPanel(GaussianDiffusion()), "--stages true: this model draws in one stage"),
    "backbone": (
        lambda: model_spec(ExperimentConfig(diffusion=DiffusionConfig(kind="cascade")), PixelCodec(), Cascade(), 0),
        "--model XSwin: kind cascade takes --model Cascade$",
    ),
    "path": (lambda: Cascade().q_sample(X_0, torch.zeros(4), X_0), "leave --reconstruct or --likelihood out"),
    "upsampler": (
        lambda: cascade(upsampler="bicubic"),
        "upsampler=bicubic must be one of pixelshuffle, bilinear, resnet, interpolation",
    ),
    "refiner": (lambda: cascade(refiner="gan"), "refiner=gan must be one of vit, conv, none, diffusion"),
    "argument": (
        partial(create_model, "Cascade", input_size=8, **SIZES, refiner_args={"widht": 3}),
        "--model_args.refiner_args.widht: vit takes width, depth",
    ),
    "factor": (
        partial(create_model, "Cascade", input_size=9, **SIZES),
        "factor=2 must divide the 9x9 input",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_in_words(mistake):
    attempt, words = MISTAKES[mistake]
    with pytest.raises(ValueError, match=words):
        attempt()


# As a user runs it: six steps, two a phase.

SETTINGS = {
    **TINY,
    "model": "Cascade",
    "model_args": {
        "coarse_args": SMALL["diffusion"],
        "upsampler_args": SMALL["pixelshuffle"],
        "refiner_args": SMALL["vit"],
    },
    "autoencoder": "pixel",
    "data": {"path": "shapes", "num_images": 40, "image_size": 16},
    "diffusion": {"kind": "cascade", "num_timesteps": 50, "phases": [1, 1, 1], "forcing": [[0.5, 0.5], [0.5, 0.5]]},
    "optim": {"lr": 1e-3, "decay": "step", "decay_epochs": 0.1},
    "train": {"num_steps": 6, "batch_size": 8, "precision": "fp32"},
    "sampling": {"num_steps": 3},
    "log": {
        "every": 100,
        "validate_every": 6,
        "sample_every": 0,
        "checkpoint_every": 1,
        "keep_checkpoints": 9,
        "trackers": [],
    },
}
FILES = ("ema.safetensors", "state/model.safetensors", "state/optimizer.safetensors")


@pytest.fixture(scope="module")
def trained(folder):
    (folder / "cascade.yaml").write_text(yaml.safe_dump(SETTINGS))
    run("train.py", "--config", "cascade.yaml", "--name", "cascade", cwd=folder)
    return folder


def test_a_training_goes_through_its_phases(trained):
    events = [event for event in log(trained, "cascade") if "loss" in event]
    assert [event["step"] for event in events] == [2, 4, 6]  # a line at the end of each
    assert [{"mse", "refined"} & event.keys() for event in events] == [{"mse"}, {"refined"}, {"mse", "refined"}]
    assert events[0]["lr"] == pytest.approx(1e-3 * 0.5 ** int(0.25 / 0.1))
    (validation,) = (event for event in log(trained, "cascade") if "validation_loss" in event)
    assert validation["validation_forced"] == 1
    for file in FILES[:2]:
        early, late, last = (weights(trained, "cascade", step=step, file=file) for step in (2, 4, 6))
        coarse = {name for name in early if name.startswith("coarse.")}
        assert all(early[name].equal(late[name]) for name in coarse)
        assert not any(early[name].equal(late[name]) for name in early.keys() - coarse)
        assert not all(late[name].equal(last[name]) for name in coarse)


@pytest.mark.parametrize("step", [1, 3, 5])
def test_resuming_in_the_middle_of_any_phase_equals_going_on(trained, step):
    name = f"cascade-cut-{step}"
    shutil.copytree(trained / "runs" / "cascade", trained / "runs" / name)
    for later in range(step + 1, 7):
        shutil.rmtree(trained / "runs" / name / "checkpoints" / f"{later:08d}")
    run("train.py", "--resume", f"runs/{name}", cwd=trained)
    for file in FILES:
        straight, resumed = (weights(trained, each, step=6, file=file) for each in ("cascade", name))
        assert all(torch.equal(straight[key], resumed[key]) for key in straight), file


def test_two_processes_equal_one(trained):
    flags = ("--config", "cascade.yaml", "--name", "cascade-two", "--log.checkpoint_every", 0)
    run("train.py", *flags, cwd=trained, processes=2)
    for one, two in zip(log(trained, "cascade"), log(trained, "cascade-two"), strict=True):
        shared = [key for key in ("loss", "validation_loss", "refined", "forced") if key in one]
        assert [two[key] for key in shared] == pytest.approx([one[key] for key in shared], rel=1e-4)
    ours, theirs = (weights(trained, name, step=6) for name in ("cascade", "cascade-two"))
    gap = sum((ours[key].double() - theirs[key].double()).square().sum() for key in ours).sqrt()
    assert gap < 1e-3 * sum(ours[key].double().square().sum() for key in ours).sqrt()


def test_samples_show_their_stages(trained):
    flags = ("--checkpoint", "runs/cascade", "--num_per_class", 1, "--stages", "true", "--panel", 3)
    done = run("sample.py", *flags, "--output", "cascade.npz", cwd=trained)
    assert "stages: cascade-stages.png" in done.stdout
    assert (trained / "cascade-panel.png").is_file()
    with np.load(trained / "cascade.npz") as file:
        assert file["arr_0"].shape == (10, 16, 16, 3)
