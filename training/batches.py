"""Training batches.

All random numbers of a step are functions of (seed, step, position in the global batch), so they do not depend on the
number of processes and micro-batches.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor

from autoencoders.codec import Codec
from data.augmentation import apply_augmentation, sample_augmentation
from data.latents import LatentCache
from data.prefetch import Prefetcher
from diffusion.guidance import drop_labels
from diffusion.times import Device
from experiment.config import TrainConfig
from machine.randomness import generator_for

STEPS_AHEAD = 4  # number of steps that are prefetched from files, each by a thread

if TYPE_CHECKING:
    from training.objective import Objective


@dataclass(frozen=True)
class Batch:
    """One process's part of a micro-batch."""

    x_0: Float[Tensor, "b c h w"]
    y: Int64[Tensor, " b"]
    t: Tensor  # [b]
    noise: Float[Tensor, "b c h w"]
    loss_args: dict[str, Any] = field(default_factory=dict)  # further arguments: tensors [b ...], model extras
    features: Float[Tensor, "b d h_out w_out"] | None = None  # a frozen network's features of the same views


class Batches:
    """The infinite stream of training batches from a latent cache.

    Images come in permuted epochs or, with `train.class_balanced`, in rounds with one image of each class. `features`
    is a cache of a frozen network's features of the same views, for alignment. Each rank gets its part of each
    micro-batch.
    """

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
        self._rounds = BalancedStream(cache.labels, train.seed) if train.class_balanced else None
        self._latents = Reader(cache, self._order, self._share, device)
        self._next_latents = Reader(cache, lambda *args: self._order(*args).roll(-1), self._share, device)
        self._features = None if features is None else Reader(features, self._order, self._share, device)

    def micro_batches(self, step: int, order: int = 0) -> Iterator[Batch]:
        """Iterate over this process's micro-batches of an optimizer step, in the permutations of `order`."""
        train, diffusion, device = self.train, self.objective.diffusion, self.device
        shape = (train.batch_size, *self.codec.latent_shape(*self.cache.image_size))

        # Random numbers for the global batch.
        generator = generator_for(train.seed, "step", step, device=device)
        views = torch.randint(self.cache.num_views, (train.batch_size,), generator=generator, device=device)
        posterior_noise, noise = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
        t = diffusion.sample_timesteps(train.batch_size, generator, device)
        uniform = torch.rand(train.batch_size, generator=generator, device=device)
        y = self._labels[self._order(step, order, device)]
        y = drop_labels(y, train.label_dropout, self.cache.num_classes, uniform=uniform)
        loss_args = self.objective.draw_loss_args(shape, generator, device)
        inputs = [posterior_noise, noise]
        if train.augment:  # by a generator of its own, so that the other numbers stay the same without augmentation
            generator = generator_for(train.seed, "augment", step, device=device)
            inputs.append(sample_augmentation(train.augment, views, self.cache.image_size, generator))

        # This process's share, [micro b ...]. The negatives of contrastive flow matching are the next samples.
        samples = [[self._latents(step, order, views), *map(self._share, inputs)]]
        if diffusion.contrast:
            next_views, *next_inputs = (values.roll(-1, dims=0) for values in (views, *inputs))
            samples.append([self._next_latents(step, order, next_views), *map(self._share, next_inputs)])
        features = self._features(step, order, views) if self._features else None
        y, t = self._share(y), self._share(t)
        loss_args = {name: self._share(values) for name, values in loss_args.items()}

        for micro in range(train.grad_accumulation):
            (x_0, micro_noise), *negative = (self._data(*(values[micro] for values in sample)) for sample in samples)
            micro_args: dict[str, Any] = {name: values[micro] for name, values in loss_args.items()}
            if train.augment:
                micro_args["extras"] = {"augment": samples[0][-1][micro]}
            if negative:
                micro_args["negative"] = torch.stack(negative[0], dim=1)
            micro_features = None if features is None else features[micro]
            yield Batch(x_0, y[micro], t[micro], micro_noise, micro_args, micro_features)

    def _data(
        self, stored: Tensor, posterior_noise: Tensor, noise: Tensor, changes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Augment what the cache stores, and compute `x_0`; return it with its noise."""
        if changes is not None:
            stored = apply_augmentation(stored, changes)
        return self.codec.draw(stored, posterior_noise), noise

    def source_indices(self, step: int, order: int = 0) -> list[int]:
        """Return the indices in the dataset of the images of a step's global batch."""
        return self.cache.source_indices[self._order(step, order)].tolist()

    def _share(self, values: Tensor) -> Tensor:
        """Select this rank's part of values of the global batch, as [micro b ...]."""
        split = {"micro": self.train.grad_accumulation, "rank": self.num_ranks}
        return rearrange(values, "(micro rank b) ... -> micro rank b ...", **split)[:, self.rank]

    def _order(self, step: int, order: int = 0, device: Device = "cpu") -> Int64[Tensor, " b"]:
        """Return the indices in the cache of a step's global batch."""
        start, size = step * self.train.batch_size, self.train.batch_size
        if self._rounds:
            return self._rounds.positions(start, size, order, device=device)
        return positions(len(self.cache), start, size, self.train.seed, "epoch", order, device=device)


class Reader:
    """Reads what a cache stores for a step: this rank's `share` of the indices `order(step, number, device)`.

    A cache in files is prefetched by threads. They read all views of an image, because the views of a step are drawn on
    the device, and copying them to the CPU would make it wait.
    """

    def __init__(self, cache: LatentCache, order: Callable[..., Tensor], share: Callable, device: Device) -> None:
        self.cache, self.order, self.share, self.device = cache, order, share, torch.device(device)
        self._prefetched = Prefetcher(self._read, STEPS_AHEAD)

    def __call__(self, step: int, number: int, view: Int64[Tensor, " b"]) -> Tensor:
        """Return these views of the step's images as [micro b ...] on the device; `view` is of the global batch."""
        view = self.share(view)
        if isinstance(self.cache.stored, Tensor):
            return self.cache.stored[self.share(self.order(step, number, self.device)), view]
        rows = self._prefetched(step, number).to(self.device, non_blocking=True)  # [(micro b) v ...]
        stored = rows[torch.arange(len(rows), device=self.device), view.flatten()]
        return stored.unflatten(0, view.shape)

    def _read(self, step: int, number: int) -> Tensor:
        rows: Any = self.cache.stored
        return rows.read(self.share(self.order(step, number, "cpu")).flatten(), pinned=self.device.type == "cuda")


class BalancedStream:
    """An infinite stream of rounds with one image per class, in random order; each class in permuted epochs."""

    def __init__(self, labels: Int64[Tensor, " n"], seed: int) -> None:
        sizes = labels.bincount()
        self.classes, self.seed = labels.argsort(stable=True).split(sizes[sizes > 0].tolist()), seed
        self.rounds_per_chunk = -(-len(labels) // len(self.classes))  # chunks of about an epoch are computed and cached
        self._chunk = lru_cache(maxsize=4)(self._make_chunk)

    def positions(self, start: int, num: int, order: int = 0, device: Device = "cpu") -> Int64[Tensor, " num"]:
        """Return the indices of images `start` to `start + num` of the stream."""
        length = self.rounds_per_chunk * len(self.classes)
        return slice_of_stream(lambda number: self._chunk(number, order, device), length, start, num)

    def _make_chunk(self, number: int, order: int, device: Device) -> Int64[Tensor, " n"]:
        first, num, num_classes = number * self.rounds_per_chunk, self.rounds_per_chunk, len(self.classes)
        class_order = positions(num_classes, first * num_classes, num * num_classes, self.seed, "round", order)
        images = [
            members[positions(len(members), first, num, self.seed, f"class {label}", order)]
            for label, members in enumerate(self.classes)
        ]
        return torch.stack(images, dim=1).gather(1, class_order.view(num, num_classes)).flatten().to(device)


def positions(
    num_images: int, start: int, num: int, seed: int, purpose: str, order: int = 0, device: Device = "cpu"
) -> Int64[Tensor, " n"]:
    """Return the indices of images `start` to `start + num` of an infinite stream of permuted epochs."""

    def epoch(number: int) -> Int64[Tensor, " n"]:
        return permutation(num_images, seed, purpose, number, order, device=device)

    return slice_of_stream(epoch, num_images, start, num)


def slice_of_stream(chunk: Callable[[int], Tensor], length: int, start: int, num: int) -> Int64[Tensor, " n"]:
    """Return elements `start` to `start + num` of an infinite stream, the concatenation of chunks of this length."""
    parts = []
    for number in range(start // length, -(-(start + num) // length)):
        first = number * length
        parts.append(chunk(number)[max(0, start - first) : start + num - first])
    return torch.cat(parts)


@lru_cache(maxsize=4)  # for two sources, the current epoch and the next
def permutation(num_images: int, *key: int | str, device: Device = "cpu") -> Int64[Tensor, " n"]:
    """Return the permutation of images that is seeded by `key`, cached because it takes as long as a small step."""
    return torch.randperm(num_images, generator=generator_for(*key)).to(device)
