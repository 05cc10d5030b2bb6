"""Training batches are a function of (seed, step, position), whatever the processes and micro-batches."""

from copy import copy

import pytest
import torch

from autoencoders.codec import PixelCodec
from data import open_dataset
from data.encoding import build_cache
from data.latents import LatentCache
from data.prefetch import Prefetcher
from diffusion import FlowMatching, GaussianDiffusion
from experiment.config import TrainConfig
from machine.randomness import generator_for
from training.batches import STEPS_AHEAD, BalancedStream, Batches, permutation, positions
from training.objective import Objective


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder, codec = tmp_path_factory.mktemp("cache"), PixelCodec()
    dataset = open_dataset("shapes", split="train", image_size=8, num_images=30)
    build_cache(folder, dataset, codec.prepare, codec.identity, flips=True)
    return LatentCache(folder, {**codec.identity, **dataset.describe(), "flips": True})


@pytest.fixture(scope="module")
def in_files(cache):
    return LatentCache(cache.folder, {}, device=None)


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Features of the same images, read from files and from memory."""
    folder = tmp_path_factory.mktemp("features")
    dataset = open_dataset("shapes", split="train", image_size=8, num_images=30)
    build_cache(folder, dataset, lambda images: images.float().square(), {}, flips=True)
    return [LatentCache(folder, {}, device) for device in (None, "cpu")]


def batches(cache, features=None, *, negatives=False, rank=0, num_ranks=1, **settings):
    objective = Objective(FlowMatching(contrast=0.05) if negatives else GaussianDiffusion())
    train = TrainConfig(**{"batch_size": 12, "label_dropout": 0.5, **settings})
    return Batches(cache, PixelCodec(), objective, train, features, rank, num_ranks)


def joined(parts):
    parts = list(parts)
    names = ("x_0", "y", "t", "noise")
    return {
        **{name: torch.cat([getattr(part, name) for part in parts]) for name in names},
        **{name: torch.cat([part.loss_args[name] for part in parts]) for name in parts[0].loss_args},
    }


@pytest.mark.parametrize("class_balanced", [False, True])
def test_processes_and_micro_batches_take_shares_of_the_same_random_numbers(cache, class_balanced):
    settings = {"class_balanced": class_balanced, "negatives": True}
    whole, shares = joined(batches(cache, **settings).micro_batches(3)), {"num_ranks": 2, "grad_accumulation": 3}
    two_ranks = [list(batches(cache, rank=rank, **settings, **shares).micro_batches(3)) for rank in (0, 1)]
    shared = joined([part for pair in zip(*two_ranks, strict=True) for part in pair])
    for name, expected in whole.items():
        assert torch.equal(shared[name], expected), name
    assert torch.equal(whole["negative"], torch.stack([whole["x_0"], whole["noise"]], dim=1).roll(-1, dims=0))


@pytest.mark.parametrize("settings", [{}, {"class_balanced": True}, {"negatives": True, "grad_accumulation": 2}])
def test_what_is_read_from_files_is_what_lies_in_memory(cache, in_files, features, settings):
    """Checked for step after step, across epochs, after going back in another order, and for features."""
    places = [(0, 0), (1, 0), (2, 0), (3, 0), (1, 1), (2, 1), (9, 1)]
    shares = {"num_ranks": 2, "rank": 1}
    caches = zip((in_files, cache), features, strict=True)
    ours, theirs = (batches(latents, features=more, **shares, **settings) for latents, more in caches)
    for place in places:
        found, expected = (list(stream.micro_batches(*place)) for stream in (ours, theirs))
        assert len(found) == settings.get("grad_accumulation", 1)
        for one, other in zip(found, expected, strict=True):
            for name in ("x_0", "y", "t", "noise", "features"):
                assert torch.equal(getattr(one, name), getattr(other, name)), name
            assert set(one.loss_args) == set(other.loss_args) == ({"negative"} if "negatives" in settings else set())
            assert all(torch.equal(one.loss_args[name], other.loss_args[name]) for name in one.loss_args)


def test_files_are_read_steps_ahead_once_a_step_and_in_whatever_order_steps_come(in_files, monkeypatch):
    read, asked = in_files.stored.read, []

    def reads(index, **settings):
        asked.append(index.tolist())
        return read(index, **settings)

    monkeypatch.setattr(in_files.stored, "read", reads)
    stream = batches(in_files)
    for step in range(3):
        list(stream.micro_batches(step))
    stream._latents._prefetched._threads.shutdown()
    assert sorted(asked) == sorted(stream._order(step).tolist() for step in range(3 + STEPS_AHEAD))


def test_what_goes_wrong_ahead_is_raised_where_it_is_asked_for():
    def invert(step):
        return 1 / (step - 2)

    ahead = Prefetcher(invert, 2, end=5)
    assert [ahead(0), ahead(1)] == [-0.5, -1.0]
    with pytest.raises(ZeroDivisionError):
        ahead(2)
    assert [ahead(4), ahead(3)] == [0.5, 1.0]
    assert ahead._results.keys() == {(3,), (4,)}


def test_epochs_are_permutations_laid_end_to_end(cache):
    order = torch.cat([batches(cache)._order(step) for step in range(5)])
    for epoch in order.split(30):
        assert epoch.sort().values.tolist() == list(range(30))
    assert order[:30].tolist() != order[30:].tolist()


def test_each_epochs_permutation_is_drawn_once_and_steps_may_span_epochs():
    permutation.cache_clear()
    orders = [torch.randperm(7, generator=generator_for(0, "epoch", epoch, 1)) for epoch in range(4)]
    steps = torch.cat([positions(7, step * 4, 4, 0, "epoch", 1) for step in range(7)])
    assert torch.equal(steps, torch.cat(orders))
    assert torch.equal(positions(7, 5, 17, 0, "epoch", 1), torch.cat(orders)[5:22])
    assert permutation.cache_info().misses == 4


UNEVEN = torch.tensor([5] + [1] * 4 + [3] * 9)  # labels of 14 images


def test_classes_of_any_size_come_equally_often_and_each_in_permuted_epochs():
    stream = BalancedStream(UNEVEN, seed=0).positions(0, 3 * 36)
    turns = UNEVEN[stream].view(36, 3)
    assert torch.equal(turns.sort(dim=1).values, torch.tensor([[1, 3, 5]]).expand(36, 3))
    assert len(set(map(tuple, turns.tolist()))) > 3  # of six orders of a round
    for label in (1, 3, 5):
        members = UNEVEN.eq(label).nonzero().flatten()
        epochs = stream[UNEVEN[stream] == label].view(-1, len(members))
        assert torch.equal(epochs.sort(dim=1).values, members.expand_as(epochs))
        assert label == 5 or not torch.equal(epochs[0], epochs[1])


def test_a_stream_of_rounds_begins_anywhere_as_it_would_have_gone_on():
    whole, resumed = BalancedStream(UNEVEN, seed=0).positions(0, 108), BalancedStream(UNEVEN, seed=0)
    assert torch.equal(torch.cat([resumed.positions(step * 8, 8) for step in range(4, 9)]), whole[32:72])
    assert not torch.equal(resumed.positions(0, 108, order=1), whole)
    assert not torch.equal(BalancedStream(UNEVEN, seed=1).positions(0, 108), whole)


def test_balanced_batches_skip_empty_classes_and_refuse_unlabelled_images(cache):
    uneven, unlabelled = copy(cache), copy(cache)
    uneven.labels = torch.tensor([3] * 20 + [0] * 7 + [9] * 3)
    parts = joined(batches(uneven, class_balanced=True, label_dropout=0.0).micro_batches(2))
    assert parts["y"].bincount().tolist() == [4, 0, 0, 4, 0, 0, 0, 0, 0, 4]
    unlabelled.num_classes = 0
    with pytest.raises(ValueError, match=r"--train.class_balanced true: these images have no classes; leave it out"):
        batches(unlabelled, class_balanced=True)


def test_steps_and_seeds_differ(cache):
    first, second = (joined(batches(cache).micro_batches(step)) for step in (0, 1))
    other = joined(batches(cache, seed=1).micro_batches(0))
    assert not torch.equal(first["noise"], second["noise"])
    assert not torch.equal(first["noise"], other["noise"])


def test_labels_are_dropped_and_images_mirrored(cache):
    parts = joined(part for step in range(20) for part in batches(cache).micro_batches(step))
    dropped = (parts["y"] == cache.num_classes).float().mean()
    assert 0.35 < dropped < 0.65


def test_batch_that_does_not_divide_names_the_flags(cache):
    with pytest.raises(ValueError, match=r"--train.batch_size 12 must be a multiple.*--train.grad_accumulation 5"):
        batches(cache, grad_accumulation=5)


def test_streams_depend_on_their_whole_key():
    draws = {
        tuple(torch.rand(2, generator=generator_for(*key)).tolist())
        for key in [(0, "a", 1), (0, "b", 1), (1, "a", 1), (0, "a", 2)]
    }
    assert len(draws) == 4
