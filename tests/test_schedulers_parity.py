"""The samplers against diffusers' schedulers: the same model outputs in, the same trajectory out.

`tests/test_samplers.py` has DDPM, DDIM and DPM-Solver++(2M); here are the others. Where diffusers' sampler works in
other variables, the test says how they are related.
"""

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from exact import generator, labels, randn

from diffusion import EDM, FlowMatching, GaussianDiffusion, sample

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation"),  # diffusers, with numpy 2
    pytest.mark.filterwarnings("ignore:divide by zero"),  # the log of its last sigma, 0
]
PREDICTIONS = {"epsilon": "epsilon", "x_0": "sample", "v": "v_prediction"}


def model(x, t, y):
    """A model that depends on the input alone, as diffusers' times have other units."""
    return 0.8 * torch.tanh(x) + 0.1


def chain(diffusion, x, **settings):
    seen = []
    own = settings.pop("model", model)
    sample(
        diffusion,
        own,
        x,
        labels(len(x)),
        generator=generator(5),
        callback=lambda step, x_t, x_0: seen.append(x_t),
        **settings,
    )
    return seen


def their_chain(scheduler, x, model=model, scaled=False):
    seen, draw = [], {"generator": generator(5)}
    if "generator" not in type(scheduler).step.__code__.co_varnames:
        draw = {}
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t) if scaled else x
        x = scheduler.step(model(given, t.expand(len(x)), None), t, x, **draw).prev_sample
        seen.append(x)
    return seen


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4 * b.abs().max().item())


def dpm_solver(diffusion, num_steps, **settings):
    scheduler = DPMSolverMultistepScheduler(
        1000,
        trained_betas=diffusion.path.betas.numpy(),
        prediction_type=PREDICTIONS[diffusion.prediction],
        solver_type="midpoint",
        final_sigmas_type="zero",
        lower_order_final=False,
        **settings,
    )
    scheduler.set_timesteps(timesteps=diffusion.path.timesteps(num_steps).flip(0).tolist())
    return scheduler


@pytest.mark.parametrize("num_steps", [8, 20])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_dpmpp_2m_sde(prediction, num_steps):
    diffusion = GaussianDiffusion(prediction=prediction, variance="fixed_small")
    scheduler, x = dpm_solver(diffusion, num_steps, algorithm_type="sde-dpmsolver++"), randn(2, 3, 4, 4)
    assert_same(chain(diffusion, x, sampler="dpmpp_2m_sde", num_steps=num_steps), their_chain(scheduler, x))


@pytest.mark.parametrize("num_steps", [8, 20])
@pytest.mark.parametrize("prediction", ["x_0", "v"])
def test_dpmpp_3m(prediction, num_steps):
    """Without epsilon, for which `x_0` at pure noise is divided by an alpha of 0.006: float32 errors then show."""
    diffusion = GaussianDiffusion(prediction=prediction, variance="fixed_small")
    scheduler = dpm_solver(diffusion, num_steps, solver_order=3, algorithm_type="dpmsolver++")
    x = randn(2, 3, 4, 4)
    assert_same(chain(diffusion, x, sampler="dpmpp_3m", num_steps=num_steps), their_chain(scheduler, x))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_unipc(prediction):
    diffusion = GaussianDiffusion(prediction=prediction, variance="fixed_small")
    scheduler = UniPCMultistepScheduler(
        1000,
        trained_betas=diffusion.path.betas.numpy(),
        prediction_type=PREDICTIONS[prediction],
        solver_order=2,
        solver_type="bh2",
        lower_order_final=True,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(10)  # its own spacing: a step's neighbours in the trained chain
    times = [int(t) for t in scheduler.timesteps]
    diffusion.path.timesteps = lambda num_steps: torch.tensor(times[::-1])
    x = randn(2, 3, 4, 4)
    assert_same(chain(diffusion, x, sampler="unipc", num_steps=10), their_chain(scheduler, x))


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_euler(prediction):
    """EulerDiscrete integrates `x_t / alpha` along sigma / alpha."""
    diffusion = GaussianDiffusion(prediction=prediction, variance="fixed_small")
    scheduler = EulerDiscreteScheduler(
        1000, trained_betas=diffusion.path.betas.numpy(), prediction_type=PREDICTIONS[prediction]
    )
    scheduler.set_timesteps(timesteps=diffusion.path.timesteps(15).flip(0).tolist())
    x = randn(2, 3, 4, 4)
    steps = diffusion.reverse_steps(15)
    ours = [
        x_t / at.alpha_next
        for x_t, (_, at) in zip(chain(diffusion, x, sampler="euler", num_steps=15), steps, strict=True)
    ]
    assert_same(ours, their_chain(scheduler, x / steps[0][1].alpha.float(), scaled=True))


def test_heun(tmp_path):
    """HeunDiscrete integrates `x_t / alpha` along sigma / alpha, which is EDM's own path; each of its two calls counts
    as a step."""
    gaussian = GaussianDiffusion(variance="fixed_small")
    scheduler = HeunDiscreteScheduler(1000, trained_betas=gaussian.path.betas.numpy(), prediction_type="epsilon")
    scheduler.set_timesteps(10)
    levels = scheduler.sigmas.unique()[1:].double()
    (tmp_path / "levels.txt").write_text(" ".join(map(str, levels.tolist())))
    diffusion = EDM(sigma_data=1.0, sigma_min=levels[0].item(), sigma_max=levels[-1].item())

    def as_edm(x, t, y):
        """The same noise as EDM's F would predict it; both see inputs of unit variance."""
        sigma = (levels[0].log() + t.double() / 999 * (levels[-1] / levels[0]).log()).exp().float()[:, None, None, None]
        x_t = x * (sigma**2 + 1).sqrt()
        return (sigma * (x_t - sigma * model(x, t, y)) - model(x, t, y)) / (sigma**2 + 1).sqrt()

    x = randn(2, 3, 4, 4)
    ours = chain(diffusion, x, sampler="heun", num_steps=10, spacing=str(tmp_path / "levels.txt"), model=as_edm)
    theirs = their_chain(scheduler, x * levels[-1].float(), scaled=True)
    assert_same(ours, theirs[1::2] + theirs[-1:])


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_euler(shift):
    diffusion, x = FlowMatching(shift=shift), randn(2, 3, 4, 4)
    scheduler = FlowMatchEulerDiscreteScheduler(1000, shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 12, 12))
    assert_same(chain(diffusion, x, num_steps=12), their_chain(scheduler, x))


@pytest.mark.parametrize("kind", ["euler", "dpmpp_2m"])
def test_edm(kind):
    """Preconditioning, Karras' levels and the step agree; only `c_noise` has another scale here."""
    diffusion, x = EDM(sigma_data=0.5), randn(2, 3, 4, 4)
    if kind == "euler":
        scheduler = EDMEulerScheduler(sigma_data=0.5)
    else:
        scheduler = EDMDPMSolverMultistepScheduler(
            sigma_data=0.5, solver_type="midpoint", final_sigmas_type="zero", lower_order_final=False
        )
    scheduler.set_timesteps(14)
    theirs = their_chain(scheduler, x * 80.0, scaled=True)
    assert_same(chain(diffusion, x, sampler=kind, num_steps=14), theirs)
