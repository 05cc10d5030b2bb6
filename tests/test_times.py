"""Training times have the distributions of their formulas, and a shift moves them as it says."""

import math
from typing import Any

import pytest
import torch
from exact import generator

from diffusion import EDM, FlowMatching, GaussianDiffusion
from diffusion.times import mode, uniform


def logit_normal_quantile(share, location=0.0, scale=1.0):
    return (location + scale * torch.special.ndtri(share)).sigmoid()


def mode_quantile(share, scale=1.29):
    u = 1 - share  # of which Esser et al. 2024, eq. 20, is a falling function
    return 1 - u - scale * ((0.5 * torch.pi * u).cos() ** 2 - 1 + u)


@pytest.mark.parametrize(
    ("times", "arguments"),
    [
        ("logit_normal", {}),
        ("logit_normal", {"location": -0.5, "scale": 1.2}),
        ("mode", {}),
        ("mode", {"scale": -1.0}),
        ("mode", {"scale": 1.7519}),
    ],
)
def test_training_times_have_the_quantiles_of_their_formula(times, arguments):
    quantile = {"logit_normal": logit_normal_quantile, "mode": mode_quantile}[times]
    settings = {"times": times, "times_args": arguments}
    flow = FlowMatching(**settings).sample_timesteps(20_000, generator())
    gaussian = GaussianDiffusion(**settings).sample_timesteps(20_000, generator())
    assert gaussian.dtype == torch.int64
    shares = torch.tensor([0.02, 0.1587, 0.5, 0.8413, 0.98])
    for drawn in (flow, (gaussian + 0.5) / 1000):
        torch.testing.assert_close(drawn.quantile(shares), quantile(shares, **arguments), atol=0.015, rtol=0)


@pytest.mark.parametrize(("scale", "grows"), [(-1.1, False), (-1.0, True), (0.0, True), (1.7519, True), (1.8, False)])
def test_mode_times_grow_with_what_is_drawn_within_their_interval(scale, grows):
    order = uniform(20_000, generator(), "cpu").argsort()
    steps = mode(20_000, generator(), "cpu", scale=scale)[order].diff()
    assert (steps.min().item() > -1e-6) == grows


def test_training_times_are_never_rounded_beyond_the_last():
    settings: dict[str, Any] = {"times": "logit_normal", "times_args": {"location": 100.0}}
    assert FlowMatching(**settings).sample_timesteps(9, generator()).max() < 1
    assert GaussianDiffusion(**settings).sample_timesteps(9, generator()).tolist() == [999] * 9


def test_a_shift_is_a_location_of_logit_normal_times():
    shifted = FlowMatching(times="logit_normal", shift=3.0).sample_timesteps(50, generator())
    located = FlowMatching(times="logit_normal", times_args={"location": math.log(3)}).sample_timesteps(50, generator())
    torch.testing.assert_close(located, shifted)


def test_cosmap_times_have_the_ratios_of_a_cosine_schedule():
    t = FlowMatching(times="cosmap").sample_timesteps(20_000, generator())
    for share in (0.1, 0.5, 0.8):
        ratio = torch.tan(torch.tensor(0.5 * torch.pi * share))  # sigma / alpha of the cosine schedule at this time
        assert t.quantile(share).item() == pytest.approx((ratio / (1 + ratio)).item(), abs=0.01)


def test_a_shift_moves_training_and_sampling_times_alike():
    plain, shifted = FlowMatching(), FlowMatching(shift=3.0)
    for ours, theirs in [
        (shifted.sample_timesteps(50, generator()), plain.sample_timesteps(50, generator())),
        (shifted.path.timesteps(10), plain.path.timesteps(10)),
    ]:
        ratio, plain_ratio = ours / (1 - ours), theirs / (1 - theirs)
        torch.testing.assert_close(ratio[:9], 3 * plain_ratio[:9], rtol=1e-4, atol=0)  # Esser et al. 2024, eq. 22


def test_noise_levels_of_edm_are_log_normal():
    log_sigma = EDM().sample_timesteps(20_000, generator()).log()
    assert log_sigma.mean().item() == pytest.approx(-0.5, abs=0.03)
    assert log_sigma.std().item() == pytest.approx(1.2, abs=0.03)
