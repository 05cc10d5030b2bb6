"""The Gaussian process and its samplers against numbers of the published implementation."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusion import GaussianDiffusion, sample

NUMBERS = load_file(Path(__file__).parent / "fixtures" / "gaussian_diffusion.safetensors")
PUBLISHED = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
schedules = pytest.mark.parametrize("schedule", PUBLISHED)


def numbers(schedule: str, part: str) -> dict[str, torch.Tensor]:
    prefix = f"{PUBLISHED[schedule]}/{part}/"
    return {name.removeprefix(prefix): value for name, value in NUMBERS.items() if name.startswith(prefix)}


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> None:
    error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    assert error < tolerance, f"relative error {error:.2e}"


def toy_model(a: torch.Tensor):
    def model(x, t, y):
        return torch.tanh(torch.einsum("oc,bchw->bohw", a, x)) * (0.5 + t.float() / 2000)[:, None, None, None]

    return model


@schedules
def test_tables_match(schedule):
    process, expected = GaussianDiffusion(schedule), numbers(schedule, "full")
    assert_close(process.betas, expected["betas"], 1e-12)
    assert_close(process.alphas_cumprod, expected["alphas_cumprod"], 1e-12)
    t = torch.arange(1000)
    variance = torch.cat([torch.zeros(1), process.posterior(*_zeros(999), t[1:], t[:-1])[1].exp().flatten()])
    assert_close(variance, expected["posterior_variance"], 1e-5)
    log_variance = process.posterior(*_zeros(1000), t, t - 1)[1].flatten()
    assert_close(log_variance, expected["posterior_log_variance_clipped"], 1e-5)


def _zeros(n):
    return torch.zeros(n, 1, 1, 1), torch.zeros(n, 1, 1, 1)


@schedules
@pytest.mark.parametrize("num_steps", [10, 150])
def test_respacing_matches(schedule, num_steps):
    process, expected = GaussianDiffusion(schedule), numbers(schedule, f"respaced{num_steps}")
    steps = process.timesteps(num_steps)
    assert steps.tolist() == expected["timestep_map"].tolist()
    alpha_bar = process.alphas_cumprod[steps]
    betas = 1 - alpha_bar / torch.cat([torch.ones(1), alpha_bar[:-1]])
    assert_close(betas, expected["betas"], 1e-9)


@schedules
def test_losses_match(schedule):
    process, expected = GaussianDiffusion(schedule), numbers(schedule, "train")
    x_0, t, noise = expected["x0"], expected["t"], expected["noise"]
    assert_close(process.q_sample(x_0, t, noise), expected["x_t"])
    model = toy_model(expected["A"])
    assert_close(model(expected["x_t"], t, None), expected["model_out"])
    terms = process.training_loss(model, x_0, torch.zeros(len(x_0), dtype=torch.int64), t=t, noise=noise)
    for name in ("loss", "mse", "vb"):
        assert_close(terms[name] / expected[name], torch.ones(len(t)))


@schedules
@pytest.mark.parametrize(
    ("chain", "sampler", "eta"), [("ddpm", "ddpm", 0.0), ("ddim_eta0", "ddim", 0.0), ("ddim_eta05", "ddim", 0.5)]
)
def test_every_step_of_the_chains_matches(schedule, chain, sampler, eta):
    expected = numbers(schedule, "sample10")
    seen = []
    result = sample(
        GaussianDiffusion(schedule),
        toy_model(expected["A"]),
        expected["x_T"],
        torch.zeros(2, dtype=torch.int64),
        sampler=sampler,
        num_steps=10,
        eta=eta,
        step_noise=expected["noise"],
        callback=lambda step, x_t, x_0: seen.append((step, x_t, x_0)),
    )
    assert [step for step, _, _ in seen] == list(range(10))
    for step, x_t, x_0 in seen:
        assert_close(x_t, expected[f"{chain}/x"][step])
        assert_close(x_0, expected[f"{chain}/pred_x0"][step])
    assert torch.equal(result, seen[-1][1])
