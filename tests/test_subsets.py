"""Subsets keep every class's share, and depend on their seed alone."""

import pytest
import torch

from data.subsets import stratified


@pytest.mark.parametrize("labels", [torch.arange(1000) % 10, torch.arange(1000) // 100])
@pytest.mark.parametrize("count", [100, 103])
def test_a_subset_holds_each_class_by_its_share(labels, count):
    chosen = stratified(labels, count, seed=0)
    assert len(chosen.unique()) == count
    of_each = labels[chosen].bincount(minlength=10)
    assert (of_each.min(), of_each.max() <= 11) == (10, True)
    assert torch.equal(chosen, stratified(labels, count, seed=0))
    assert not torch.equal(chosen, stratified(labels, count, seed=1))


def test_each_image_is_as_likely_as_any_other():
    labels = torch.tensor([0] * 17 + [1] * 3 + [2])
    seen = sum(stratified(labels, 5, seed).bincount(minlength=21) for seed in range(2000))
    assert (seen / 2000 - 5 / 21).abs().max() < 0.05


def test_subsets_larger_than_the_set_repeat_evenly():
    assert stratified(torch.zeros(3).long(), 7, seed=0).bincount().sort().values.tolist() == [2, 2, 3]
    assert len(stratified(torch.zeros(3).long(), 0, seed=0)) == 0
