"""Why a published score-based attempt on anime faces diverged: its reverse step, on Gaussian data with the exact score.

The step of the variance-preserving SDE is `x + beta x / 2 + beta score + sqrt(beta) z` (Song et al. 2021b, eq. 6). The
attempt left the drift `beta x / 2` out and drew noise of twice the variance. On N(0, s^2) the score is `-x / v_t`, each
step is linear, and the variance of the chain follows by recursion, without a sample.
"""

import pytest
from exact import backbone, gaussian_data, generator, labels, randn

from diffusion import GaussianDiffusion, sample


def final_std(std, drift, noise):
    """Standard deviation at the end of the chain; `drift` and `noise` are the fractions of `beta x / 2` and `beta` in
    the step."""
    diffusion, variance = GaussianDiffusion(), 1.0
    marginals = diffusion.path.alphas_cumprod * std**2 + 1 - diffusion.path.alphas_cumprod
    for beta, marginal in zip(reversed(diffusion.path.betas.tolist()), reversed(marginals.tolist()), strict=True):
        variance = variance * (1 + drift * beta / 2 - beta / marginal) ** 2 + noise * beta
    return variance**0.5


@pytest.mark.parametrize("std", [0.25, 0.5, 1.0, 2.0])
def test_the_right_step_ends_at_the_datas_spread(std):
    assert final_std(std, drift=1.0, noise=1.0) == pytest.approx(std, rel=0.01)


@pytest.mark.parametrize(("std", "wrong"), [(0.25, 0.331), (0.5, 0.600), (2.0, 1.504)])
def test_the_faulty_step_drives_the_standard_deviation_towards_one(std, wrong):
    assert final_std(std, drift=0.0, noise=2.0) == pytest.approx(wrong, abs=0.001)


def test_unit_variance_hides_the_faulty_step():
    """For unit variance the missing drift and the surplus noise cancel: `-beta + 2 beta / 2` is what the drift would
    give."""
    assert final_std(1.0, drift=0.0, noise=2.0) == pytest.approx(1.0, abs=0.002)


def test_the_same_chain_by_this_projects_sampler():
    """Euler-Maruyama with the exact denoiser, sampled."""

    diffusion = GaussianDiffusion(variance="fixed_small")
    settings = {"sampler": "euler_maruyama", "num_steps": 250, "generator": generator(1)}
    x_0 = sample(diffusion, backbone(diffusion, gaussian_data(0.0, 0.5)), randn(4, 1, 64, 64), labels(4), **settings)
    assert x_0.std().item() == pytest.approx(0.5, abs=0.02)
