"""Averages against closed forms, and any length of average from snapshots of two."""

import pytest
import torch
from torch import nn

from experiment.ema import EMA, PowerAverage, gamma_of, reconstruction_weights


class Scalar(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


def trajectory(step):
    """Weights that wander: what an average makes of them depends on its length."""
    return torch.tensor([step / 100 + torch.sin(torch.tensor(step / 30.0)).item()])


@pytest.mark.parametrize(("gamma", "sigma_rel"), [(6.94, 0.10), (16.97, 0.05)])
def test_gamma_is_edm2s(gamma, sigma_rel):
    assert gamma_of(sigma_rel) == pytest.approx(gamma, abs=0.01)


@pytest.mark.parametrize("sigma_rel", [0.0, 0.5, -1.0])
def test_lengths_that_no_exponent_gives_are_told(sigma_rel):
    with pytest.raises(ValueError, match=r"--train.ema_profiles .*: lengths lie between"):
        gamma_of(sigma_rel)


def test_power_average_is_the_weighted_mean_of_its_definition():
    """Of T steps, step t counts in proportion to t^gamma."""
    model, num_steps = Scalar(), 3000
    average = PowerAverage(model, 0.1)
    for step in range(num_steps):
        model.weight.data.copy_(trajectory(step))
        average.update(model, step)
    t = torch.arange(1, num_steps + 1, dtype=torch.float64)
    shares = t**average.gamma / (t**average.gamma).sum()
    expected = sum((share * trajectory(step)).item() for step, share in enumerate(shares.tolist()))
    assert average.model.weight.item() == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("sigma_rel", [0.06, 0.08, 0.15])
def test_snapshots_of_two_lengths_give_any_other(sigma_rel):
    model, num_steps, every = Scalar(), 1600, 100
    kept = EMA(model, 0.9, [0.05, 0.1])
    direct = PowerAverage(model, sigma_rel)
    snapshots, values = [], []
    for step in range(num_steps):
        model.weight.data.copy_(trajectory(step))
        kept.update(model, step)
        direct.update(model, step)
        if (step + 1) % every == 0:
            for average in kept.profiles.values():
                snapshots.append((step + 1, average.gamma))
                values.append(average.model.weight.item())
    weights = reconstruction_weights(snapshots, (num_steps, gamma_of(sigma_rel)))
    found = sum(weight * value for weight, value in zip(weights, values, strict=True))
    assert found == pytest.approx(direct.model.weight.item(), rel=5e-3)
    assert abs(values[-1] - found) > abs(found - direct.model.weight.item())


@pytest.mark.parametrize(("num", "sigmas"), [(4, (0.05, 0.1)), (1, (0.05,)), (1, (0.05, 0.1))])
def test_weights_of_snapshots_sum_to_one_however_few(num, sigmas):
    snapshots = [(100 * (number + 1), gamma_of(sigma)) for number in range(num) for sigma in sigmas]
    weights = reconstruction_weights(snapshots, (100 * num, gamma_of(0.25)))
    assert sum(weights) == pytest.approx(1, abs=1e-9)
