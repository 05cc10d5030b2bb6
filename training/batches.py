"""Training batches: everything random in a step is a function of (seed, step, position in the global batch), whatever
the number of processes and micro-batches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor

from autoencoders.codec import Codec
from data.augmentation import change, draw_changes
from data.latents import LatentCache
from data.lookahead import Lookahead
from diffusion.guidance import drop_labels
from diffusion.times import Device
from experiment.config import TrainConfig
from machine.randomness import generator_for

STEPS_AHEAD = 4  # that files are read before they are needed, each by a thread

if TYPE_CHECKING:
    from training.objective import Objective


@dataclass(frozen=True)
class Batch:
    """One process's share of a micro-batch."""

    x_0: Float[Tensor, "b c h w"]
    y: Int64[Tensor, " b"]
    t: Tensor  # [b]
    noise: Float[Tensor, "b c h w"]
    more: dict[str, Any] = field(default_factory=dict)  # that the loss is given by name: tensors [b ...], extras
    features: Float[Tensor, "b d h_out w_out"] | None = None  # of a frozen network, of the same views of the images


class Batches:
    """The training stream over a cache: permuted epochs laid end to end, or if `class_balanced` rounds of the classes.
    `features` is a cache of the same views; this process is the one of this rank among so many."""

    def __init__(
        self,
        cache: LatentCache,
        codec: Codec,
        objective: "Objective",
        train: TrainConfig,
        features: LatentCache | None = None,
        rank: int = 0,
        num_ranks: int = 1,
        device: Device = "cpu",
    ) -> None:
        if train.batch_size % (train.grad_accumulation * num_ranks):
            raise ValueError(
                f"--train.batch_size {train.batch_size} must be a multiple of the {num_ranks} processes times "
                f"--train.grad_accumulation {train.grad_accumulation}"
            )
        if train.class_balanced and not cache.num_classes:
            raise ValueError("--train.class_balanced true: these images have no classes; leave it out")
        self.cache, self.codec, self.objective, self.train = cache, codec, objective, train
        self.rank, self.num_ranks, self.device = rank, num_ranks, device
        self._labels = cache.labels.to(device)
        self._rounds = Rounds(cache.labels, train.seed) if train.class_balanced else None
        self._latents = Reader(cache, self._order, self._share, device)
        self._following = Reader(cache, lambda *place: self._order(*place).roll(-1), self._share, device)
        self._features = None if features is None else Reader(features, self._order, self._share, device)

    def micro_batches(self, step: int, order: int = 0) -> Iterator[Batch]:
        """This process's micro-batches of an optimizer step; `order` numbers the permutations to go by."""
        train, diffusion, device = self.train, self.objective.diffusion, self.device
        shape = (train.batch_size, *self.codec.latent_shape(*self.cache.image_size))
        draw = generator_for(train.seed, "step", step, device=device)
        views = torch.randint(self.cache.num_views, (train.batch_size,), generator=draw, device=device)
        posterior_noise, noise = (torch.randn(shape, generator=draw, device=device) for _ in range(2))
        t = diffusion.sample_timesteps(train.batch_size, draw, device)
        uniform = torch.rand(train.batch_size, generator=draw, device=device)
        y = self._labels[self._order(step, order, device)]
        y = drop_labels(y, train.label_dropout, self.cache.num_classes, uniform=uniform)
        more = self.objective.draw_more(shape, draw, device)
        drawn = [posterior_noise, noise]
        if train.augment:
            alone = generator_for(train.seed, "augment", step, device=device)  # so that nothing else is drawn otherwise
            drawn.append(draw_changes(train.augment, views, self.cache.image_size, alone))

        samples = [[self._latents(step, order, views), *map(self._share, drawn)]]
        if diffusion.contrast:  # the next samples
            views_after, *after = (values.roll(-1, dims=0) for values in (views, *drawn))
            samples.append([self._following(step, order, views_after), *map(self._share, after)])
        features = self._features(step, order, views) if self._features else None
        y, t, more = self._share(y), self._share(t), {name: self._share(values) for name, values in more.items()}
        for micro in range(train.grad_accumulation):
            (x_0, noise_part), *negative = (self._data(*(values[micro] for values in each)) for each in samples)
            more_part: dict[str, Any] = {name: values[micro] for name, values in more.items()}
            if train.augment:
                more_part["extras"] = {"augment": samples[0][-1][micro]}
            if negative:
                more_part["negative"] = torch.stack(negative[0], dim=1)
            features_part = None if features is None else features[micro]
            yield Batch(x_0, y[micro], t[micro], noise_part, more_part, features_part)

    def _data(
        self, stored: Tensor, posterior_noise: Tensor, noise: Tensor, changes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if changes is not None:
            stored = change(stored, changes)
        return self.codec.draw(stored, posterior_noise), noise

    def source_indices(self, step: int, order: int = 0) -> list[int]:
        return self.cache.source_indices[self._order(step, order)].tolist()

    def _share(self, values: Tensor) -> Tensor:
        """Of values of the global batch those of this process, a row a micro-batch."""
        split = {"micro": self.train.grad_accumulation, "rank": self.num_ranks}
        return rearrange(values, "(micro rank b) ... -> micro rank b ...", **split)[:, self.rank]

    def _order(self, step: int, order: int = 0, device: Device = "cpu") -> Int64[Tensor, " b"]:
        start, size = step * self.train.batch_size, self.train.batch_size
        if self._rounds:
            return self._rounds.positions(start, size, order, device=device)
        return positions(len(self.cache), start, size, self.train.seed, "epoch", order, device=device)


class Reader:
    """What a cache stores of a step's samples, this process's `share` of `order(step, number, device)`. Of a cache in
    files, threads read all views of the images some steps before they are asked for: the view is drawn on the device,
    and nothing waits to know it."""

    def __init__(self, cache: LatentCache, order: Callable[..., Tensor], share: Callable, device: Device) -> None:
        self.cache, self.order, self.share, self.device = cache, order, share, torch.device(device)
        self._ahead = Lookahead(self._read, STEPS_AHEAD)

    def __call__(self, step: int, number: int, view: Int64[Tensor, " b"]) -> Tensor:
        """[micro b ...] of these views of the whole batch, on the device."""
        view = self.share(view)
        if isinstance(self.cache.stored, Tensor):
            return self.cache.stored[self.share(self.order(step, number, self.device)), view]
        rows = self._ahead(step, number).to(self.device, non_blocking=True)  # [(micro b) v ...]
        stored = rows[torch.arange(len(rows), device=self.device), view.flatten()]
        return stored.unflatten(0, view.shape)

    def _read(self, step: int, number: int) -> Tensor:
        rows: Any = self.cache.stored
        return rows.read(self.share(self.order(step, number, "cpu")).flatten(), pinned=self.device.type == "cuda")


class Rounds:
    """An endless stream of rounds: an image of every class, in an order of its own; each class in permuted epochs."""

    def __init__(self, labels: Int64[Tensor, " n"], seed: int) -> None:
        sizes = labels.bincount()
        self.classes, self.seed = labels.argsort(stable=True).split(sizes[sizes > 0].tolist()), seed
        self.num_at_once = -(-len(labels) // len(self.classes))  # about an epoch, which is kept
        self._drawn = lru_cache(maxsize=4)(self._draw)

    def positions(self, start: int, num: int, order: int = 0, device: Device = "cpu") -> Int64[Tensor, " num"]:
        """Which images stand at places `start .. start + num`."""
        length = self.num_at_once * len(self.classes)
        return end_to_end(lambda number: self._drawn(number, order, device), length, start, num)

    def _draw(self, number: int, order: int, device: Device) -> Int64[Tensor, " n"]:
        first, num, num_classes = number * self.num_at_once, self.num_at_once, len(self.classes)
        turns = positions(num_classes, first * num_classes, num * num_classes, self.seed, "round", order)
        images = [
            members[positions(len(members), first, num, self.seed, f"class {number}", order)]
            for number, members in enumerate(self.classes)
        ]
        return torch.stack(images, dim=1).gather(1, turns.view(num, num_classes)).flatten().to(device)


def positions(
    num_images: int, start: int, num: int, seed: int, purpose: str, order: int = 0, device: Device = "cpu"
) -> Int64[Tensor, " n"]:
    """Which images stand at places `start .. start + num` of an endless stream of permuted epochs."""

    def epoch(number: int) -> Int64[Tensor, " n"]:
        return permutation(num_images, seed, purpose, number, order, device=device)

    return end_to_end(epoch, num_images, start, num)


def end_to_end(epoch: Callable[[int], Tensor], length: int, start: int, num: int) -> Int64[Tensor, " n"]:
    """What stands at places `start .. start + num` of an endless stream of epochs of this length."""
    parts = []
    for number in range(start // length, -(-(start + num) // length)):
        first = number * length
        parts.append(epoch(number)[max(0, start - first) : start + num - first])
    return torch.cat(parts)


@lru_cache(maxsize=4)  # an epoch's and the next one's, of two sources
def permutation(num_images: int, *key: int | str, device: Device = "cpu") -> Int64[Tensor, " n"]:
    """All images in the order of this key, kept on their device: drawing takes as long as a small step."""
    return torch.randperm(num_images, generator=generator_for(*key)).to(device)
