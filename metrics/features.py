"""Images to features, once for all scores."""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor
from tqdm import tqdm

from metrics.agreement import Labelled, Probe
from metrics.extractors import NAMES, ExtractorError, load_extractor, naming
from metrics.frechet import Moments, RunningMoments, moments_of
from metrics.image_batches import ImageBatch
from metrics.scores import DEFAULT, INCEPTION, PER_IMAGE, needs_of


@dataclass(frozen=True)
class Features:
    """What an extractor says of images, on the CPU, in the order of their indices; None where metrics need it not."""

    moments: Moments
    spatial: Moments | None = None  # of Inception's spatial features, for sFID
    halves: tuple[Moments, Moments] | None = None  # of two random halves of the images
    features: Float[Tensor, "n d"] | None = None
    logits: Float[Tensor, "n k"] | None = None  # where the extractor is a classifier
    labels: Int64[Tensor, " n"] | None = None
    images: UInt8[Tensor, "n 3 h w"] | None = None
    probe: Probe | None = None  # of a reference with classes: of its training images

    @staticmethod
    def of(features: Float[Tensor, "n d"], logits: Tensor | None = None, labels: Tensor | None = None) -> "Features":
        """Moments and features of those at hand."""
        second = in_second_half(len(features))
        halves = (moments_of(features[~second]), moments_of(features[second])) if len(features) > 1 else None
        return Features(moments_of(features), None, halves, features, logits, labels)

    @property
    def labelled(self) -> Labelled | None:
        if self.features is None or self.labels is None:
            return None
        return Labelled(self.features, self.labels, self.probe)

    @property
    def num(self) -> int:
        """Images; 0 where the moments came from a file that does not say."""
        return self.moments.num or 0


def in_second_half(num_images: int) -> Bool[Tensor, " n"]:
    """Which images are in the second of two random halves, always the same: neighbours are often of one class."""
    return torch.randperm(num_images, generator=torch.Generator().manual_seed(0)) < num_images // 2


class Extractor:
    """Images to features: one of `NAMES`, `timm:NAME`, or the path of a program (see `metrics.extractors`);
    `weights_path` gives a named one its weights. An ExtractorError names the flag and what to give it."""

    def __init__(
        self,
        extractor: str | Path = INCEPTION,
        *,
        weights_path: str | Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.kind, self.name = naming(str(extractor))
        self.module, self.sha256, self.published_weights = load_extractor(str(extractor), weights_path)
        self.device = torch.device(device)
        try:
            self.module.to(self.device)
        except (RuntimeError, TypeError) as error:
            self._move_to_cpu(error)
        # The first seven channels of Inception's `mixed_6/conv` (Nash et al. 2021), [n 17*17*7], in ADM's order.
        self._spatial: deque[Tensor] = deque(maxlen=1)
        if self.kind == INCEPTION:
            branch: Any = self.module.get_submodule("Mixed_6d.branch1x1")
            branch.register_forward_hook(
                lambda _, __, output: self._spatial.append(rearrange(output[:, :7], "n c h w -> n (h w c)"))
            )

    @torch.inference_mode()
    def __call__(
        self,
        batches: Iterable[ImageBatch],
        num_images: int,
        *,
        metrics: Sequence[str] = DEFAULT,
        gather: Callable[[list], list] = list,
        progress: bool = True,
        desc: str = "features",
    ) -> Features:
        """Features of this process's `num_images` images and the others', put together by `gather`, with what `metrics`
        need. A ValueError for no images or other than uint8 RGB; an ExtractorError for other failures."""
        needs = needs_of(metrics)
        part = _Part(in_second_half(sum(gather([num_images]))), keep=bool(needs & PER_IMAGE))
        try:
            with tqdm(total=num_images, desc=desc, unit="img", leave=False, disable=not progress) as bar:
                for batch in batches:
                    features, *logits = self._outputs(batch.images, desc)
                    if "spatial" in needs and self._spatial:
                        part.spatial.update(self._spatial[-1].float())
                    images = batch.images.cpu() if "images" in needs else None
                    part.add(batch.indices, features, logits[0] if logits else None, batch.labels, images)
                    bar.update(len(batch.images))
        except ValueError as error:  # goes with the part, so that no process waits for one that is gone
            part.error = error
        return _joined(gather([part]), desc)

    def _outputs(self, images: Tensor, desc: str) -> list[Tensor]:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            kind = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape[1:])}"
            raise ValueError(f"{desc}: images are {kind}; extractors take uint8 RGB [3, h, w]")
        try:
            outputs = [output.float().cpu() for output in self._run(images)]
        except ExtractorError as error:
            raise ExtractorError(f"--extractor {self.name}: {error}") from None
        except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
            if self.kind in NAMES or isinstance(error, torch.OutOfMemoryError):
                raise
            last = str(error).strip().splitlines()[-1]
            raise ExtractorError(f"--extractor {self.name}: it failed on uint8 [n 3 h w] images ({last})") from error
        for output in outputs:
            if bad := int((~output.isfinite()).any(dim=1).sum()):
                raise ExtractorError(f"--extractor {self.name}: not finite on {bad} of {len(output)} images ({desc})")
        return outputs

    def _run(self, images: Tensor) -> tuple[Tensor, ...]:
        """The network, which moves to the CPU for good where its device lacks what it needs, and says so."""
        try:
            return self.module(images.to(self.device))
        except (RuntimeError, TypeError) as error:
            self._move_to_cpu(error)
        return self.module(images)

    def _move_to_cpu(self, error: Exception) -> None:
        """Where it has no such operation, or no float64, as Apple's; TorchScript passes on the words alone."""
        lacking = isinstance(error, NotImplementedError) or "float64" in str(error)
        if self.device.type == "cpu" or not lacking:
            raise error
        first, self.device = self.device, torch.device("cpu")
        self.module.to(self.device)
        tqdm.write(f"--extractor {self.name}: {first} lacks what it needs; it runs on the CPU", file=sys.stderr)


class _Part:
    """One process's share of a set's features, as it grows."""

    def __init__(self, second: Tensor, *, keep: bool) -> None:
        self.second, self.keep = second, keep  # which of all images are in the second half
        self.halves, self.spatial = (RunningMoments(), RunningMoments()), RunningMoments()
        self.kept: list[tuple[Tensor | None, ...]] = []  # indices, features, logits, labels, images
        self.error: ValueError | None = None

    def add(self, indices: Tensor, features: Tensor, *others: Tensor | None) -> None:
        if self.keep:
            self.kept.append((indices, features, *others))
        else:
            for half, moments in enumerate(self.halves):
                moments.update(features[self.second[indices] == half])


def _joined(parts: list[_Part], desc: str) -> Features:
    for error in filter(None, (part.error for part in parts)):
        raise error
    running = RunningMoments.merged(part.spatial for part in parts)
    spatial = running.moments() if running.num else None
    kept = [batch for part in parts for batch in part.kept]
    if kept:  # in the order of their indices: no sum depends on batches or processes
        columns: list[Any] = [None if column[0] is None else torch.cat(column) for column in zip(*kept, strict=True)]
        order = columns[0].argsort()
        rest: Any = (None if column is None else column[order] for column in columns[1:])
        features, logits, labels, images = rest
        return replace(Features.of(features, logits, labels), spatial=spatial, images=images)
    first, second = (RunningMoments.merged(halves) for halves in zip(*(part.halves for part in parts), strict=True))
    whole = RunningMoments.merged([first, second])
    if whole.num == 0:
        raise ValueError(f"{desc}: there are no images to score")
    halves = (first.moments(), second.moments()) if first.num and second.num else None
    return Features(whole.moments(), spatial, halves)
