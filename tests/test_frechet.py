"""Moments in one pass and the Fréchet distance, against closed forms, numpy and scipy."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics.features import Features
from metrics.frechet import Moments, RunningMoments, extrapolated_distance, frechet_distance, moments_of
from metrics.scores import Score


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 5), st.floats(0, 1e6))
@settings(max_examples=30)
def test_batches_do_not_matter_nor_does_a_large_mean(sizes, dim, offset):
    sizes = [*sizes, 3]
    x = torch.randn(sum(sizes), dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + offset
    parts = [RunningMoments() for _ in range(2)]
    for number, batch in enumerate(x.split(sizes)):
        parts[number % 2].update(batch)
    found = RunningMoments.merged(parts).moments()
    assert found.num == len(x)
    assert torch.allclose(found.mean, x.mean(dim=0))
    expected = torch.from_numpy(np.cov(x.numpy() - offset, rowvar=False).reshape(dim, dim))
    assert torch.allclose(found.covariance, expected, atol=1e-6)


def test_known_gaussians():
    a = Moments(torch.tensor([3.0, 0.0]).double(), torch.diag(torch.tensor([4.0, 1.0])).double())
    b = Moments(torch.tensor([0.0, 0.0]).double(), torch.diag(torch.tensor([1.0, 9.0])).double())
    assert frechet_distance(a, b) == pytest.approx(9 + (2 - 1) ** 2 + (1 - 3) ** 2)
    assert frechet_distance(b, a) == pytest.approx(14)


def test_agrees_with_scipys_square_root_where_that_is_stable():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(200, 12, generator=generator).double() @ torch.randn(12, 12).double() for _ in range(2))
    a, b = moments_of(x), moments_of(y + 0.3)
    root = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy()).real
    expected = ((a.mean - b.mean) ** 2).sum() + a.covariance.trace() + b.covariance.trace() - 2 * np.trace(root)
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)


def test_fewer_images_than_features():
    """With singular covariances, equal sets have distance 0, and a shift alone counts by its square."""
    x = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)).double()
    assert frechet_distance(moments_of(x), moments_of(x)) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(moments_of(x), moments_of(x + 2)) == pytest.approx(4 * 50, rel=1e-6)


def test_halves_of_features_are_random_not_alternating():
    """With labels i % 2, the even and the odd positions would each be a single class."""
    x = torch.tensor([0.0, 10.0]).repeat(200)[:, None]
    halves = Features.of(x).halves
    assert [half.num for half in halves] == [200, 200]
    assert all(4 < half.mean.item() < 6 for half in halves)


def test_an_extrapolated_distance_loses_the_bias_of_few_samples():
    """Two Gaussians in 24 dimensions, a shift of 1 apart: from 240 samples the plain distance is a fifth too large."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(20_000, 24, generator=generator).double()
    plain, extrapolated = [], []
    for seed in range(6):
        samples = torch.randn(240, 24, generator=generator).double()
        samples[:, 0] += 1
        plain.append(frechet_distance(moments_of(samples), moments_of(reference)))
        extrapolated.append(extrapolated_distance(samples, reference, seed=seed))
    bias, left = torch.tensor(plain).mean() - 1, torch.tensor(extrapolated).mean() - 1
    assert bias > 0.2
    assert left.abs() < bias / 3
    refused = extrapolated_distance(samples[:95], reference)
    assert isinstance(refused, Score)
    assert refused.reason == "too few images: 95, and it needs 96"
