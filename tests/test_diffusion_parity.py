"""Gaussian diffusion and its samplers against outputs of the published implementation."""

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
    """Compare shapes, and values relative to the largest."""
    assert ours.shape == theirs.shape
    error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    assert error < tolerance, f"relative error {error:.2e}"


def assert_each_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Compare values, each relative to its own size."""
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=tolerance, atol=0)


def toy_model(a: torch.Tensor):
    """The fixture's model `tanh(A x) * (0.5 + t / 2000)`: noise channels, followed by as many variance channels."""

    def model(x, t, y):
        scale = 0.5 + t.float() / 2000
        return torch.tanh(torch.einsum("oc,bchw->bohw", a, x)) * scale[:, None, None, None]

    return model


@schedules
def test_tables_match(schedule):
    diffusion, expected = GaussianDiffusion(schedule), numbers(schedule, "full")
    assert_each_close(diffusion.path.betas, expected["betas"], 1e-10)
    assert_each_close(diffusion.path.alphas_cumprod, expected["alphas_cumprod"], 1e-10)
    transition = diffusion.path.transition(torch.arange(1000))
    assert_each_close(transition.posterior_std.flatten().square(), expected["posterior_variance"], 1e-6)
    log_variance = transition.log_variance_min.flatten()
    assert_each_close(log_variance, expected["posterior_log_variance_clipped"], 1e-6)
    assert_each_close(transition.log_variance_max.flatten().exp(), expected["betas"], 1e-5)


@schedules
@pytest.mark.parametrize("num_steps", [10, 150])
def test_respacing_matches(schedule, num_steps):
    diffusion, expected = GaussianDiffusion(schedule), numbers(schedule, f"respaced{num_steps}")
    assert diffusion.path.timesteps(num_steps).tolist() == expected["timestep_map"].tolist()
    times, transitions = zip(*diffusion.reverse_steps(num_steps), strict=True)
    assert list(times[::-1]) == expected["timestep_map"].tolist()
    betas = torch.stack([transition.log_variance_max.exp() for transition in transitions[::-1]])
    assert_each_close(betas, expected["betas"], 1e-5)


@schedules
def test_losses_match(schedule):
    diffusion, expected = GaussianDiffusion(schedule), numbers(schedule, "train")
    x_0, t, noise = expected["x0"], expected["t"], expected["noise"]
    assert_close(diffusion.q_sample(x_0, t, noise), expected["x_t"])
    model = toy_model(expected["A"])
    assert_close(model(expected["x_t"], t, None), expected["model_out"])
    terms = diffusion.training_loss(model, x_0, torch.zeros(len(x_0), dtype=torch.int64), t=t, noise=noise)
    assert set(terms) == {"loss", "mse", "vb"}
    for name, values in terms.items():
        assert_each_close(values, expected[name])


@schedules
@pytest.mark.parametrize(
    ("chain", "sampler", "eta"),
    [("ddpm", "ddpm", 0.0), ("ddim_eta0", "ddim", 0.0), ("ddim_eta05", "ddim", 0.5)],
)
def test_every_step_of_the_chains_matches(schedule, chain, sampler, eta):
    expected = numbers(schedule, "sample10")
    noises, seen = iter(expected["noise"]), []
    result = sample(
        GaussianDiffusion(schedule),
        toy_model(expected["A"]),
        expected["x_T"],
        torch.zeros(2, dtype=torch.int64),
        sampler=sampler,
        num_steps=10,
        sampler_args={"eta": eta} if sampler == "ddim" else {},
        generator=lambda like: next(noises),
        callback=lambda step, x_t, x_0: seen.append((step, x_t, x_0)),
    )
    assert [step for step, _, _ in seen] == list(range(10))
    for step, x_t, x_0 in seen:
        assert_close(x_t, expected[f"{chain}/x"][step])
        assert_close(x_0, expected[f"{chain}/pred_x0"][step])
    assert torch.equal(result, seen[-1][1])
