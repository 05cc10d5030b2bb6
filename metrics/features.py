"""Extraction of features from images, once for all scores."""

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
from metrics.extractors import NAMES, ExtractorError, kind_and_name, load_extractor
from metrics.frechet import Moments, RunningMoments, moments_of
from metrics.image_batches import ImageBatch
from metrics.scores import DEFAULT, INCEPTION, PER_IMAGE, required_features


@dataclass(frozen=True)
class Features:
    """Features of a set of images and their statistics, on the CPU, in order; what no metric needs is None."""

    moments: Moments
    spatial: Moments | None = None  # moments of Inception's spatial features, for sFID
    halves: tuple[Moments, Moments] | None = None  # moments of two random halves of the images
    features: Float[Tensor, "n d"] | None = None
    logits: Float[Tensor, "n k"] | None = None  # if the extractor is a classifier
    labels: Int64[Tensor, " n"] | None = None
    images: UInt8[Tensor, "n 3 h w"] | None = None
    probe: Probe | None = None  # if this is a reference with classes: the probe of its training images

    @staticmethod
    def of(features: Float[Tensor, "n d"], logits: Tensor | None = None, labels: Tensor | None = None) -> "Features":
        in_second = second_half_mask(len(features))
        halves = (moments_of(features[~in_second]), moments_of(features[in_second])) if len(features) > 1 else None
        return Features(moments_of(features), None, halves, features, logits, labels)

    @property
    def labelled(self) -> Labelled | None:
        if self.features is None or self.labels is None:
            return None
        return Labelled(self.features, self.labels, self.probe)

    @property
    def num(self) -> int:
        """Number of images; 0 if the moments are from a file that does not state it."""
        return self.moments.num or 0


def second_half_mask(num_images: int) -> Bool[Tensor, " n"]:
    """Return a mask of the images in the second of two fixed random halves; neighbouring images often share a class."""
    return torch.randperm(num_images, generator=torch.Generator().manual_seed(0)) < num_images // 2


class Extractor:
    """An extractor (see `metrics.extractors`) on a device; it moves to the CPU if the device lacks an operation."""

    def __init__(
        self,
        extractor: str | Path = INCEPTION,
        *,
        weights_path: str | Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.kind, self.name = kind_and_name(str(extractor))
        self.module, self.sha256, self.published_weights = load_extractor(str(extractor), weights_path)
        self.device = torch.device(device)
        try:
            self.module.to(self.device)
        except (RuntimeError, TypeError) as error:
            self._move_to_cpu(error)
        # sFID uses the first seven channels of Inception's `mixed_6/conv` (Nash et al. 2021): [n 17*17*7], in the
        # order of ADM's code.
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
        """Extract the features of a set of images that is distributed over all processes.

        Args:
            batches: this process's share of the images, of which there are `num_images`.
            metrics: names of the metrics to compute from the features, which decide what is kept.
            gather: collects a list from all processes.
            desc: name of the images in the progress bar and in errors.
        """
        needs = required_features(metrics)
        part = _Part(second_half_mask(sum(gather([num_images]))), keep=bool(needs & PER_IMAGE))
        try:
            with tqdm(total=num_images, desc=desc, unit="img", leave=False, disable=not progress) as bar:
                for batch in batches:
                    features, *logits = self._outputs(batch.images, desc)
                    if "spatial" in needs and self._spatial:
                        part.spatial.update(self._spatial[-1].float())
                    images = batch.images.cpu() if "images" in needs else None
                    part.add(batch.indices, features, logits[0] if logits else None, batch.labels, images)
                    bar.update(len(batch.images))
        except ValueError as error:  # raised after gathering, so that no process waits for this one
            part.error = error
        return _merged(gather([part]), desc)

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
        """Run the network; if its device lacks an operation, move it to the CPU for good and print so."""
        try:
            return self.module(images.to(self.device))
        except (RuntimeError, TypeError) as error:
            self._move_to_cpu(error)
        return self.module(images)

    def _move_to_cpu(self, error: Exception) -> None:
        """Move the network to the CPU if its device lacks an operation, or float64; otherwise raise `error`."""
        is_unsupported = isinstance(error, NotImplementedError) or "float64" in str(error)  # TorchScript changes types
        if self.device.type == "cpu" or not is_unsupported:
            raise error
        first, self.device = self.device, torch.device("cpu")
        self.module.to(self.device)
        tqdm.write(f"--extractor {self.name}: {first} lacks what it needs; it runs on the CPU", file=sys.stderr)


class _Part:
    """One process's share of the features: either all rows (`keep`), or running moments of both halves."""

    def __init__(self, in_second: Tensor, *, keep: bool) -> None:
        self.in_second, self.keep = in_second, keep  # mask over the images of all processes
        self.halves, self.spatial = (RunningMoments(), RunningMoments()), RunningMoments()
        self.batches: list[tuple[Tensor | None, ...]] = []  # indices, features, logits, labels, images
        self.error: ValueError | None = None

    def add(self, indices: Tensor, features: Tensor, *others: Tensor | None) -> None:
        if self.keep:
            self.batches.append((indices, features, *others))
        else:
            for half, moments in enumerate(self.halves):
                moments.update(features[self.in_second[indices] == half])


def _merged(parts: list[_Part], desc: str) -> Features:
    """Merge the shares of all processes, and raise their errors."""
    for error in filter(None, (part.error for part in parts)):
        raise error
    running = RunningMoments.merged(part.spatial for part in parts)
    spatial = running.moments() if running.num else None
    rows = [batch for part in parts for batch in part.batches]
    if rows:  # sorted by index, so that no sum depends on the number of batches or processes
        columns: list[Any] = [None if column[0] is None else torch.cat(column) for column in zip(*rows, strict=True)]
        order = columns[0].argsort()
        rest: Any = (None if column is None else column[order] for column in columns[1:])
        features, logits, labels, images = rest
        return replace(Features.of(features, logits, labels), spatial=spatial, images=images)
    first, second = (RunningMoments.merged(halves) for halves in zip(*(part.halves for part in parts), strict=True))
    total = RunningMoments.merged([first, second])
    if total.num == 0:
        raise ValueError(f"{desc}: there are no images to score")
    halves = (first.moments(), second.moments()) if first.num and second.num else None
    return Features(total.moments(), spatial, halves)
