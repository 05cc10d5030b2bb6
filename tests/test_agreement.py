"""Class agreement on data for which the probe's answer is known."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, linear, one_hot

from metrics.agreement import DECAYS, Labelled, _regress, class_agreement, classification_accuracy, fit_probe

NUM_CLASSES = 4


def clusters(num=25, spread=0.1, seed=0):
    """Points of each class around corners that lie far apart."""
    labels = torch.arange(NUM_CLASSES).repeat_interleave(num)
    noise = torch.randn(len(labels), 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Labelled(one_hot(labels, 6) + spread * noise, labels)


@cache
def reference():
    train, held_out = clusters(seed=1), clusters(seed=2)
    probe = fit_probe(train.features, train.labels, NUM_CLASSES)
    return Labelled(held_out.features, held_out.labels, probe)


def values(samples, reference):
    scores = class_agreement(samples, reference) | classification_accuracy(samples, reference)
    return {name: score.value for name, score in scores.items()}


def test_perfect_samples_have_perfect_agreement_and_cas():
    assert values(clusters(), reference()) == {"agreement": 1, "agreement_top5": 1, "cas": 1}


@settings(max_examples=10)
@given(wrong=st.integers(0, 100))
def test_agreement_counts_the_samples_that_are_of_another_class(wrong):
    samples = clusters()
    labels = samples.labels.clone()
    labels[:wrong] = (labels[:wrong] + 1) % NUM_CLASSES
    score = class_agreement(Labelled(samples.features, labels), reference())["agreement"]
    share = 1 - wrong / 100
    assert score.value == pytest.approx(share)
    assert score.std == pytest.approx((share * (1 - share) / 100) ** 0.5, abs=1e-12)


def test_samples_of_a_single_class_agree_but_have_a_low_cas():
    samples = clusters()
    ones = Labelled(samples.features[:25], samples.labels[:25])
    found = values(ones, reference())
    assert found["agreement"] == 1
    assert found["cas"] == 1 / NUM_CLASSES


def test_a_single_sample_gives_numbers_too():
    one = Labelled(clusters().features[:1], clusters().labels[:1])
    assert values(one, reference()) == {"agreement": 1, "agreement_top5": 1, "cas": 1 / NUM_CLASSES}


def test_top_five_of_more_classes_forgives_what_top_one_does_not():
    labels = torch.arange(8).repeat_interleave(10)
    draw = torch.Generator().manual_seed(0)
    train, held_out = (one_hot(labels, 8) + torch.randn(80, 8, generator=draw) for _ in range(2))
    real = Labelled(held_out, labels, fit_probe(train, labels, 8))
    found = values(Labelled(held_out, labels), real)
    assert 0.2 < found["agreement"] < found["agreement_top5"] < 1


@pytest.mark.parametrize("decay", DECAYS)
def test_the_probe_is_the_minimum_of_its_objective(decay):
    x, labels = clusters(spread=0.7).features.float(), clusters().labels
    weight, bias = (tensor.requires_grad_() for tensor in _regress(x, labels, NUM_CLASSES, decay, None, None))
    cross_entropy(linear(x, weight, bias), labels).backward()
    assert weight.grad is not None
    torch.testing.assert_close(-weight.grad, decay * weight.detach(), rtol=0.02, atol=2e-4)


def test_the_held_out_fifth_chooses_a_strong_decay_where_most_features_are_noise():
    labels = torch.arange(2).repeat_interleave(100)
    features = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    features[:, 0] = labels + 0.4 * features[:, 0]
    standard = (features - features.mean(dim=0)) / features.std(dim=0)
    norms = {decay: float(_regress(standard, labels, 2, decay, None, None)[0].norm()) for decay in DECAYS}
    chosen = float(fit_probe(features, labels, 2).weight.norm())
    assert min(norms, key=lambda decay: abs(norms[decay] - chosen)) >= 1e-2
