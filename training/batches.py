"""Training batches: everything random in a step is a function of (seed, step, position in the global batch), whatever
the number of processes and micro-batches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
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
from diffusion.times import Device, DrawTimes
from machine.randomness import generator_for

STEPS_AHEAD = 4  # that files are read before they are needed, each by a thread

if TYPE_CHECKING:
    from experiment.config import ExperimentConfig
    from training.objective import Objective
    from training.run import Run


@dataclass(frozen=True)
class Batch:
    """One process's share of a micro-batch."""

    x_0: Float[Tensor, "b c h w"]
    y: Int64[Tensor, " b"]
    t: Tensor  # [b]
    noise: Float[Tensor, "b c h w"]
    more: dict[str, Any] = field(default_factory=dict)  # that the loss is given by name: tensors [b ...], extras
    features: Float[Tensor, "b d h_out w_out"] | None = None  # of a frozen network, of the same views of the images


@dataclass(frozen=True)
class Batches:
    """The training stream over a cache: permuted epochs laid end to end, or if `class_balanced` rounds of the classes.
    `batch_size` counts all processes, `features` is a cache of the same views, `negatives` are next samples; `augment`
    is the probability of each change of an image, of a codec that stores images."""

    cache: LatentCache
    codec: Codec
    times: DrawTimes
    seed: int
    batch_size: int
    num_micro_batches: int = 1
    label_dropout: float = 0.0
    class_balanced: bool = False
    augment: float = 0.0
    negatives: bool = False
    rank: int = 0
    num_ranks: int = 1
    device: Device = "cpu"
    draw_more: Callable[..., dict[str, Tensor]] | None = None  # the objective's
    features: LatentCache | None = None

    def __post_init__(self) -> None:
        parts = self.num_micro_batches * self.num_ranks
        if self.batch_size < parts or self.batch_size % parts:
            raise ValueError(
                f"--train.batch_size {self.batch_size} must be a multiple of the {self.num_ranks} processes times "
                f"--train.grad_accumulation {self.num_micro_batches}"
            )
        if self.class_balanced and not self.cache.num_classes:
            raise ValueError("--train.class_balanced true: these images have no classes; leave it out")

    def micro_batches(self, step: int, order: int = 0) -> Iterator[Batch]:
        """This process's micro-batches of an optimizer step; `order` numbers the permutations to go by."""
        device = self.device
        shape = (self.batch_size, *self.codec.latent_shape(*self.cache.image_size))
        draw = generator_for(self.seed, "step", step, device=device)
        views = torch.randint(self.cache.num_views, (self.batch_size,), generator=draw, device=device)
        posterior_noise, noise = (torch.randn(shape, generator=draw, device=device) for _ in range(2))
        t = self.times(self.batch_size, draw, device)
        uniform = torch.rand(self.batch_size, generator=draw, device=device)
        y = self._labels[self._order(step, order, device)]
        y = drop_labels(y, self.label_dropout, self.cache.num_classes, uniform=uniform)
        more = self.draw_more(shape, draw, device) if self.draw_more else {}
        drawn = [views, posterior_noise, noise]
        if self.augment:
            alone = generator_for(self.seed, "augment", step, device=device)  # so that nothing else is drawn otherwise
            drawn.append(draw_changes(self.augment, views, self.cache.image_size, alone))

        mine = self._share
        samples = [[self._latents(step, order, views), *map(mine, drawn[1:])]]
        if self.negatives:  # the next samples
            views_after, *after = (values.roll(-1, dims=0) for values in drawn)
            samples.append([self._following(step, order, views_after), *map(mine, after)])
        features = self._features(step, order, views) if self._features else None
        y, t, more = mine(y), mine(t), {name: mine(values) for name, values in more.items()}
        for micro in range(self.num_micro_batches):
            (x_0, noise_part), *negative = (self._data(*(values[micro] for values in each)) for each in samples)
            more_part: dict[str, Any] = {name: values[micro] for name, values in more.items()}
            if self.augment:
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
        split = {"micro": self.num_micro_batches, "rank": self.num_ranks}
        return rearrange(values, "(micro rank b) ... -> micro rank b ...", **split)[:, self.rank]

    def _order(self, step: int, order: int = 0, device: Device = "cpu") -> Int64[Tensor, " b"]:
        start, size = step * self.batch_size, self.batch_size
        if self.class_balanced:
            return self._rounds.positions(start, size, order, device=device)
        return positions(len(self.cache), start, size, self.seed, "epoch", order, device=device)

    def _reader(self, cache: LatentCache, shift: int = 0) -> "Reader":
        return Reader(cache, lambda *place: self._order(*place).roll(-shift), self._share, self.device)

    @cached_property
    def _latents(self) -> "Reader":
        return self._reader(self.cache)

    @cached_property
    def _following(self) -> "Reader":
        return self._reader(self.cache, shift=1)

    @cached_property
    def _features(self) -> "Reader | None":
        return None if self.features is None else self._reader(self.features)

    @cached_property
    def _labels(self) -> Int64[Tensor, " n"]:
        return self.cache.labels.to(self.device)

    @cached_property
    def _rounds(self) -> "Rounds":
        return Rounds(self.cache.labels, self.seed)


def open_batches(
    run: "Run[ExperimentConfig]", cache: LatentCache, codec: Codec, objective: "Objective", features: LatentCache | None
) -> Batches:
    """A run's, with what its objective draws, shared out over its processes."""
    train, accelerator, diffusion = run.config.train, run.accelerator, objective.diffusion
    told = {name: getattr(train, name) for name in ("seed", "batch_size", "label_dropout", "class_balanced", "augment")}
    told |= {"num_micro_batches": train.grad_accumulation, "negatives": diffusion.contrast > 0}
    told |= {"rank": accelerator.process_index, "num_ranks": accelerator.num_processes, "device": accelerator.device}
    told |= {"draw_more": objective.draw_more, "features": features}
    return Batches(cache, codec, diffusion.sample_timesteps, **told)


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
