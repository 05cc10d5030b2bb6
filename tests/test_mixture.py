"""Two dimensions, a mixture of Gaussians, and a backbone that knows it: samples against the density.

`python tests/test_mixture.py` draws docs/pictures/mixture.png.
"""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from exact import DIFFUSIONS, backbone, gaussian_data, generator, randn

from diffusion import EDM, FlowMatching, GaussianDiffusion, sample
from diffusion.paths import Flow

MEANS = torch.tensor([[-1.2, 0.6], [-0.5, -1.0], [0.2, 1.1], [1.1, 0.4], [0.9, -0.8]])
WEIGHTS = torch.tensor([0.3, 0.15, 0.2, 0.2, 0.15])
LABELS = torch.tensor([0, 0, 1, 1, 1])  # of the components
STD, NULL = 0.22, 2


def log_weights(y):
    """Log-weights of the components under each label [b k]; under the null label, all components are allowed."""
    allowed = (y[:, None] == LABELS) | (y[:, None] == NULL)
    return torch.where(allowed, WEIGHTS.log(), -math.inf)


def posterior_mean(x_t, alpha, sigma, y):
    x, alpha, variance = x_t[:, :, 0, 0], alpha[:, :, 0, 0], ((alpha * STD) ** 2 + sigma**2)[:, :, 0, 0]
    gap = x[:, None] - alpha[:, None] * MEANS  # [b k 2]
    share = torch.softmax(log_weights(y) - gap.square().sum(-1) / (2 * variance), dim=1)
    component = MEANS + (alpha * STD**2 / variance)[:, None] * gap
    return (share[:, :, None] * component).sum(1)[:, :, None, None]


def density(x, y):
    """`p(x | y)` at x [n 2]."""
    logits = torch.log_softmax(log_weights(y), dim=1) - (x[:, None] - MEANS).square().sum(-1) / (2 * STD**2)
    return logits.exp().sum(1) / (2 * math.pi * STD**2)


def draw_exactly(num, seed):
    component = torch.multinomial(WEIGHTS, num, replacement=True, generator=generator(seed))
    return MEANS[component] + STD * randn(num, 2, seed=seed + 1)


def draw(diffusion, num, label=NULL, seed=0, **settings):
    x_0 = sample(
        diffusion,
        backbone(diffusion, posterior_mean),
        randn(num, 2, 1, 1, seed=seed),
        torch.full((num,), label),
        num_classes=NULL,
        generator=generator(seed + 1),
        **settings,
    )
    return x_0[:, :, 0, 0]


def energy_distance(x, y):
    """`2 E|x - y| - E|x - x'| - E|y - y'|`: zero for equal distributions alone (Székely and Rizzo 2004)."""
    return (2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()).item()


@pytest.mark.parametrize("diffusion", ["cosine v", "linear flow", "EDM"])
@pytest.mark.parametrize(("sampler", "num_steps"), [("euler_maruyama", 100), ("unipc", 50)])
def test_samples_of_a_mixture_cannot_be_told_from_exact_ones(diffusion, sampler, num_steps):
    spacing = "uniform" if isinstance(DIFFUSIONS[diffusion]().path, Flow) else "log_snr"
    drawn = draw(DIFFUSIONS[diffusion](), 1000, sampler=sampler, num_steps=num_steps, spacing=spacing)
    exact = [draw_exactly(1000, seed) for seed in range(10, 30, 2)]
    by_chance = [energy_distance(a, b) for a, b in pairwise(exact)]
    assert energy_distance(drawn, exact[0]) < 2 * max(by_chance)
    assert energy_distance(drawn + 0.15, exact[0]) > 2 * max(by_chance)  # the statistic would see it


@pytest.mark.parametrize("num_steps", [2, 5, 10])
@pytest.mark.parametrize("diffusion", ["cosine v", "EDM"])
def test_euler_maruyama_is_bounded_in_few_steps(diffusion, num_steps):
    """Without the bound, a standard deviation of 0.4 became 89, 10 and 0.57 on EDM, and 1.1 in two steps of a cosine
    schedule."""
    diffusion = DIFFUSIONS[diffusion]()
    model, y = backbone(diffusion, gaussian_data(0.7, 0.4)), torch.zeros(4, dtype=torch.int64)
    settings = {"sampler": "euler_maruyama", "num_steps": num_steps, "generator": generator(1)}
    x_0 = sample(diffusion, model, randn(4, 1, 32, 32), y, **settings)
    assert x_0.mean().item() == pytest.approx(0.7, abs=0.05)
    assert 0.1 < x_0.std().item() < 0.9


@pytest.mark.parametrize("num_steps", [20, 40])
def test_the_published_3m_errs_less_in_few_steps(num_steps):
    """Compared with the method of order 3, which is better in many steps, and with Heun's in many more."""

    def error(sampler):
        return (draw(EDM(), 256, sampler=sampler, num_steps=num_steps) - exact).square().mean().sqrt()

    exact = draw(EDM(), 256, sampler="heun", num_steps=300)
    assert error("dpmpp_3m") < 0.9 * error("exponential_ab3")


@pytest.mark.parametrize("diffusion", DIFFUSIONS)
@pytest.mark.parametrize("scale", [0.5, 2.5])
def test_guided_gaussians_have_the_tilted_density(diffusion, scale):
    """For p(x | y) = N(m, s^2) and p(x) = N(m_0, s^2), the density p(x | y)^w p(x)^(1 - w) is
    N(m_0 + w (m - m_0), s^2), and guidance by w leads there."""
    diffusion = DIFFUSIONS[diffusion]()
    mean, null_mean, std = 0.6, -0.2, 0.4

    def of_label(x_t, alpha, sigma, y):
        m = torch.where(y == 0, mean, null_mean)[:, None, None, None]
        return m + std**2 * alpha / ((alpha * std) ** 2 + sigma**2) * (x_t - alpha * m)

    y, model = torch.zeros(4, dtype=torch.int64), backbone(diffusion, of_label)
    settings = {"sampler": "unipc", "num_steps": 100, "spacing": "log_snr", "num_classes": 1}
    x_0 = sample(diffusion, model, randn(4, 1, 48, 48), y, guidance_scale=scale, **settings)
    assert x_0.mean().item() == pytest.approx(null_mean + scale * (mean - null_mean), abs=0.02)
    assert x_0.std().item() == pytest.approx(std, abs=0.02)


def test_guidance_in_an_interval_keeps_more_of_the_class_than_guidance_everywhere():
    """Kynkäänniemi et al. 2024: at strong noise guidance drops modes. The class has three."""
    diffusion, settings = EDM(), {"label": 1, "sampler": "heun", "num_steps": 30, "guidance_scale": 5.0}

    def rarest(x):
        nearest = torch.cdist(x, MEANS).argmin(dim=1)
        return torch.bincount(nearest, minlength=5)[2:].min().item() / len(x)

    everywhere = draw(diffusion, 1000, **settings)
    inside = draw(diffusion, 1000, guidance_interval=[0.0, 0.6], **settings)
    assert rarest(inside) > rarest(everywhere) + 0.05


if __name__ == "__main__":
    from matplotlib import pyplot as plt

    side = torch.linspace(-2.2, 2.2, 200)
    grid = torch.stack(torch.meshgrid(side, side, indexing="xy"), dim=-1).reshape(-1, 2)
    columns = {
        "Gaussian, DDPM, 150 steps": (GaussianDiffusion("cosine", variance="fixed_small"), {"num_steps": 150}),
        "flow, Euler, 50 steps": (FlowMatching(), {"num_steps": 50}),
        "EDM, Heun, 18 steps": (EDM(), {"num_steps": 18}),
    }
    rows = {
        "all classes": {"label": NULL},
        "one class": {"label": 1},
        "guided by 3": {"label": 1, "guidance_scale": 3.0},
        "guided by 3\nat sigma / alpha < 0.6": {
            "label": 1,
            "guidance_scale": 3.0,
            "guidance_interval": [0.0, 0.6],
        },
    }
    figure, axes = plt.subplots(len(rows), len(columns), figsize=(7.5, 10), layout="constrained")
    for line, (row, given) in zip(axes, rows.items(), strict=True):
        for ax, (column, (diffusion, settings)) in zip(line, columns.items(), strict=True):
            exact = density(grid, torch.full((len(grid),), given["label"])).reshape(200, 200)
            ax.contourf(side, side, exact, levels=12, cmap="Blues")
            x, y = draw(diffusion, 1500, **given, **settings).T
            ax.scatter(x, y, s=1.5, color="black", alpha=0.5, linewidths=0)
            ax.set(xticks=[], yticks=[], xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), aspect="equal")
            if row == "all classes":
                ax.set_title(column, fontsize=9)
        line[0].set_ylabel(row, fontsize=9)
    figure.savefig(Path(__file__).parent.parent / "docs" / "pictures" / "mixture.png", dpi=110)
