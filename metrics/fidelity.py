"""Images to features to scores: the only caller of torch-fidelity.

Images become features once (`Extractor`), features become scores (`compare`); `score` does both. Only on
Inception do scores bear the names FID, sFID, IS and KID, under which the literature prints them. On anything else
they are named by their extractor and compare with each other alone. docs/evaluation.md tells what each is worth.

Nothing is cached: torch-fidelity keys its cache by the name that a caller gives, which outlives what the name
meant.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import socket
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch_fidelity
from jaxtyping import Float, Int64
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor
from tqdm import tqdm

from metrics.frechet import Moments, RunningMoments, frechet_distance, moments_of
from metrics.images import ImageBatch, Images, image_batches
from metrics.manifold import density_and_coverage
from metrics.torchscript import load_torchscript

INCEPTION = "inception"
TORCHSCRIPT = "torchscript"
REGISTERED = {INCEPTION: "inception-v3-compat"}  # our name -> torch-fidelity's; the others are the same
NAMES = (INCEPTION, *(name for name in FEATURE_EXTRACTORS_REGISTRY if name not in REGISTERED.values()))
METRICS = ("fid", "sfid", "is", "kid", "precision", "recall", "density", "coverage")
OF_MOMENTS = {"fid", "sfid"}  # need no image's own features: memory does not grow with the number of images


class ExtractorError(ValueError):
    """A feature extractor that cannot be had or used, in the user's words."""


# --- what comes out


@dataclass(frozen=True)
class Score:
    """One number, its spread where it has one, or the reason why there is none."""

    value: float | None
    std: float | None = None
    reason: str | None = None

    def __str__(self) -> str:
        if self.value is None:
            return f"none: {self.reason}"
        return f"{self.value:.4f}" + ("" if self.std is None else f" ± {self.std:.4f}")


@dataclass(frozen=True)
class Scores:
    """Scores by name, and all that it takes to derive them again from the same images.

    `extractor_sha256` is of the file for TorchScript, else of the loaded weights, wherever they came from.
    """

    scores: dict[str, Score]
    extractor: str
    extractor_sha256: str
    num_samples: int
    num_reference: int
    num_features: int
    settings: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(
        default_factory=lambda: {
            "torch_fidelity": torch_fidelity.__version__,
            "torch": str(torch.__version__),
        }
    )

    def to_dict(self) -> dict[str, object]:
        """Plain containers."""
        return asdict(self)

    def to_json(self) -> str:
        """Strict JSON: no NaN, `null` where there is no value."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False)

    def table(self) -> str:
        """A Markdown table that is also aligned for the terminal, a score a row."""
        rows = [(name, str(score), self.extractor) for name, score in self.scores.items()]
        rows = [("metric", "value", "extractor"), *rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
        rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
        return "\n".join([lines[0], rule, *lines[1:]])


# --- images to features


class TorchScriptExtractor(FeatureExtractorBase):
    """A TorchScript file as torch-fidelity sees an extractor.

    The file takes uint8 RGB [n 3 h w], resizes by itself, and returns features [n d] and class probabilities
    [n k]. torch-fidelity's inception score takes a softmax of what it gets, so it gets their logarithms.
    """

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str, **_: object) -> None:
        super().__init__(name, features_list)
        self.module = load_torchscript(feature_extractor_weights_path)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        features, probabilities = self.module(input)
        if features.ndim != 2 or probabilities.ndim != 2:
            shapes = f"{list(features.shape)} and {list(probabilities.shape)}"
            raise ExtractorError(f"it returns {shapes}, not features [n d] and class probabilities [n k]")
        sums = probabilities.double().sum(dim=1)
        if probabilities.isfinite().all() and (probabilities.min() < 0 or (sums - 1).abs().max() > 1e-2):
            raise ExtractorError("its second output is not class probabilities (are they logits? add a softmax)")
        outputs = {"features": features, "log_probabilities": probabilities.float().clamp(min=1e-30).log()}
        return tuple(outputs[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "features", "log_probabilities"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "log_probabilities" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return False


if TORCHSCRIPT not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor(TORCHSCRIPT, TorchScriptExtractor)

HAS_CLASSES = (INCEPTION, TORCHSCRIPT)
"""The others' default layer for the inception score holds features, of which a softmax means nothing."""


@dataclass(frozen=True)
class Features:
    """What an extractor says of a set of images, on the CPU, in the order of their indices.

    `features`, `logits` and `labels` are None where only moments were asked for, or the extractor has none.
    """

    moments: Moments
    spatial: Moments | None = None  # of Inception's spatial features, for sFID
    halves: tuple[Moments, Moments] | None = None  # of the images of even and of odd index
    features: Float[Tensor, "n d"] | None = None
    logits: Float[Tensor, "n k"] | None = None  # where the extractor is a classifier
    labels: Int64[Tensor, " n"] | None = None

    @staticmethod
    def of(features: Float[Tensor, "n d"], logits: Tensor | None = None, labels: Tensor | None = None) -> Features:
        """From features at hand."""
        halves = (moments_of(features[0::2]), moments_of(features[1::2])) if len(features) > 1 else None
        return Features(moments_of(features), None, halves, features, logits, labels)

    @property
    def num(self) -> int:
        """Images; 0 where the moments came from a file that does not say."""
        return self.moments.num or 0


class Extractor:
    """Images to features: one of `NAMES`, or the path of a TorchScript file (see `TorchScriptExtractor`).

    `weights_path` gives a named one its weights, in torch-fidelity's format, where they cannot be downloaded.

    Raises:
        ExtractorError: in one line, naming the flag and what to give it.
    """

    def __init__(
        self,
        extractor: str | Path = INCEPTION,
        *,
        weights_path: str | Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        name = str(extractor)
        if name in NAMES:
            self.kind = self.name = name
            self.module = _load_named(name, weights_path)
            self.published_weights = weights_path is None or _is_published(name, Path(weights_path))
            self.sha256 = _state_sha256(self.module)
        elif Path(name).is_file():
            if weights_path is not None:
                raise ExtractorError(f"--weights_path {weights_path}: --extractor {name} brings its own weights")
            self.kind, self.name, self.published_weights = TORCHSCRIPT, Path(name).stem, False
            self.module = _load_file(name)
            self.sha256 = _file_sha256(Path(name))
        else:
            raise ExtractorError(f"--extractor {name}: no such file, nor one of {', '.join(NAMES)}")
        self.device = torch.device(device)
        self.module.to(self.device)
        self._mixed_6: deque[Tensor] = deque(maxlen=1)
        if name == INCEPTION:
            branch: Any = self.module.get_submodule("Mixed_6d.branch1x1")
            branch.register_forward_hook(lambda _, __, output: self._mixed_6.append(output[:, :7].flatten(1)))

    @torch.inference_mode()
    def __call__(
        self,
        batches: Iterable[ImageBatch],
        num_images: int,
        *,
        metrics: Sequence[str] = METRICS,
        gather: Callable[[list], list] = list,
        progress: bool = True,
        desc: str = "features",
    ) -> Features:
        """Features of this process's `num_images` images, put together with the other processes' by `gather`.

        What is kept is what `metrics` need: for Fréchet distances moments alone.

        Raises:
            ValueError: for an empty set, or images that are not uint8 RGB.
            ExtractorError: for features that are not finite, or a file without the interface.
        """
        part = _Part(keep=not OF_MOMENTS.issuperset(metrics))
        with tqdm(total=num_images, desc=desc, unit="img", leave=False, disable=not progress) as bar:
            for batch in batches:
                if batch.images.dtype != torch.uint8 or batch.images.ndim != 4 or batch.images.shape[1] != 3:
                    found = f"{str(batch.images.dtype).removeprefix('torch.')} {list(batch.images.shape[1:])}"
                    raise ValueError(f"{desc}: images are {found}; extractors take uint8 RGB [3, h, w]")
                outputs = [output.float().cpu() for output in self._extract(batch.images.to(self.device))]
                for output in outputs:
                    bad = int((~output.isfinite()).any(dim=1).sum())
                    if bad:
                        raise ExtractorError(
                            f"--extractor {self.name}: not finite on {bad} of {len(output)} images ({desc})"
                        )
                spatial = self._spatial() if "sfid" in metrics else None
                part.add(batch, outputs[0], outputs[1] if len(outputs) > 1 else None, spatial)
                bar.update(len(batch.images))
        return _Part.joined(gather([part]), desc)

    def _spatial(self) -> Tensor | None:
        """The first seven channels of Inception's `mixed_6/conv`, [n 7*17*17], of the batch just seen (Nash et al.
        2021, as in ADM's evaluation)."""
        return self._mixed_6[-1].float().cpu() if self._mixed_6 else None

    def _extract(self, batch: Tensor) -> tuple[Tensor, ...]:
        try:
            return self.module(batch)
        except ExtractorError as error:
            raise ExtractorError(f"--extractor {self.name}: {error}") from None
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            if self.kind != TORCHSCRIPT or isinstance(error, torch.OutOfMemoryError):
                raise
            last = str(error).strip().splitlines()[-1]
            raise ExtractorError(f"--extractor {self.name}: it failed on uint8 [n 3 h w] images ({last})") from error


class _Part:
    """One process's share of a set's features, as it grows."""

    def __init__(self, *, keep: bool) -> None:
        self.keep = keep
        self.even, self.odd, self.spatial = RunningMoments(), RunningMoments(), RunningMoments()
        self.kept: list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]] = []

    def add(self, batch: ImageBatch, features: Tensor, logits: Tensor | None, spatial: Tensor | None) -> None:
        if spatial is not None:
            self.spatial.update(spatial)
        if self.keep:
            self.kept.append((batch.indices, features, logits, batch.labels))
        else:
            self.even.update(features[batch.indices % 2 == 0])
            self.odd.update(features[batch.indices % 2 == 1])

    @staticmethod
    def joined(parts: list[_Part], desc: str) -> Features:
        running = RunningMoments.merged(part.spatial for part in parts)
        spatial = running.moments() if running.num else None
        kept = [batch for part in parts for batch in part.kept]
        if kept:  # in the order of their indices: no sum depends on batches or processes
            indices, *columns = zip(*kept, strict=True)
            order = torch.cat(indices).argsort()
            features, logits, labels = (None if column[0] is None else torch.cat(column)[order] for column in columns)
            assert features is not None  # every extractor has them
            return replace(Features.of(features, logits, labels), spatial=spatial)
        even = RunningMoments.merged(part.even for part in parts)
        odd = RunningMoments.merged(part.odd for part in parts)
        whole = RunningMoments.merged([even, odd])
        if whole.num == 0:
            raise ValueError(f"{desc}: there are no images to score")
        halves = (even.moments(), odd.moments()) if even.num and odd.num else None
        return Features(whole.moments(), spatial, halves)


# --- features to scores


def score(
    samples: Images,
    reference: Images,
    *,
    extractor: str | Path | Extractor = INCEPTION,
    metrics: Sequence[str] = METRICS,
    batch_size: int = 64,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    weights_path: str | Path | None = None,
    neighbourhood: int = 3,
    kid_subsets: int = 100,
    kid_subset_size: int = 1000,
    is_splits: int = 10,
    seed: int = 0,
    progress: bool = True,
) -> Scores:
    """Score samples against a reference: `Extractor` on both, then `compare`, whose arguments are told there.

    Raises:
        ExtractorError: for an extractor that cannot be had or used.
        ValueError: for an unknown metric, an empty set, or images that are not uint8 RGB.
    """
    check_metrics(metrics)
    if not isinstance(extractor, Extractor):
        extractor = Extractor(extractor, weights_path=weights_path, device=device)

    def extract(images: Images, desc: str) -> Features:
        batches = image_batches(images, batch_size, num_workers=num_workers)
        num_images = len(images)  # pyright: ignore[reportArgumentType]
        return extractor(batches, num_images, metrics=metrics, progress=progress, desc=desc)

    return compare(
        extract(samples, "samples"),
        extract(reference, "reference"),
        extractor,
        metrics=metrics,
        neighbourhood=neighbourhood,
        kid_subsets=kid_subsets,
        kid_subset_size=kid_subset_size,
        is_splits=is_splits,
        seed=seed,
    )


NAEEM_NEIGHBOURHOOD = 5


def compare(
    samples: Features,
    reference: Features,
    extractor: Extractor,
    *,
    metrics: Sequence[str] = METRICS,
    neighbourhood: int = 3,
    kid_subsets: int = 100,
    kid_subset_size: int = 1000,
    is_splits: int = 10,
    seed: int = 0,
) -> Scores:
    """Scores of features, in float64. What too few images do not allow is None, with the reason.

    - `fid`: Fréchet distance of the Gaussians fitted to both sets, >= 0, lower is better (Heusel et al.
      2017). With fewer images than features their covariances are singular: compare only scores of as many
      images. `sfid`: the same of Inception's spatial features (Nash et al. 2021).
    - `is`: exp of the mean divergence between a sample's class probabilities and their average, from 1 to the
      number of classes, over `is_splits` parts of the shuffled samples (Salimans et al. 2016). Blind to the
      reference.
    - `kid`: unbiased squared MMD with a cubic kernel, near 0 and even below it for equal distributions, over
      `kid_subsets` random subsets of `kid_subset_size`, cut to the smaller set (Bińkowski et al. 2018).
    - `precision`: share of the samples that lie within the reference's manifold, the union of balls that
      reach to each image's k-th neighbour, k = `neighbourhood`; `recall`: share of the reference within the
      samples' manifold (Kynkäänniemi et al. 2019). Both in [0, 1].
    - `density`, `coverage`: see `metrics.manifold`; their neighbourhood is 5, its authors' (Naeem et al. 2020).

    `settings` records what was used: the subset size after the cut, one subset where the subset is the whole
    of both sets (and no standard deviation: there is nothing to vary).

    Raises:
        ValueError: for an unknown metric or a setting out of range.
    """
    check_metrics(metrics)
    if min(neighbourhood, kid_subsets, kid_subset_size, is_splits) < 1:
        raise ValueError("neighbourhood, kid_subsets, kid_subset_size and is_splits: each must be at least 1")
    smaller, larger = sorted((samples.num, reference.num))
    kid_subset_size = min(kid_subset_size, smaller)
    kid_subsets = kid_subsets if kid_subset_size < larger else 1
    x = y = None
    if samples.features is not None and reference.features is not None:
        x, y = samples.features.double(), reference.features.double()
    no_features = Score(None, reason="the reference holds moments, not the features of each image")

    def frechet() -> dict[str, Score]:
        if samples.num < 2:
            return {"fid": _too_few(samples.num, 2)}
        return {"fid": _score(frechet_distance(samples.moments, reference.moments))}

    def spatial_frechet() -> dict[str, Score]:
        if samples.spatial is None or reference.spatial is None:
            return {"sfid": Score(None, reason=f"{extractor.name} has no spatial features; Inception has")}
        if samples.num < 2:
            return {"sfid": _too_few(samples.num, 2)}
        return {"sfid": _score(frechet_distance(samples.spatial, reference.spatial))}

    def inception_score() -> dict[str, Score]:
        if samples.logits is None:
            return {"is": Score(None, reason=f"{extractor.name} has no class probabilities")}
        if samples.num < 2 * is_splits:  # a part of one image scores 1, whatever the image
            return {"is": _too_few(samples.num, 2 * is_splits)}
        value = isc_features_to_metric(samples.logits, splits=is_splits, rng_seed=seed)
        return {"is": _score(value["inception_score_mean"], value["inception_score_std"] if is_splits > 1 else None)}

    def kernel_distance() -> dict[str, Score]:
        if x is None or y is None:
            return {"kid": no_features}
        if kid_subset_size < 2:
            return {"kid": _too_few(kid_subset_size, 2)}
        sizes = {"kid_subsets": kid_subsets, "kid_subset_size": kid_subset_size}
        value = kid_features_to_metric(x, y, **sizes, rng_seed=seed, verbose=False)
        std = value["kernel_inception_distance_std"] if kid_subsets > 1 else None
        return {"kid": _score(value["kernel_inception_distance_mean"], std)}

    def precision_recall() -> dict[str, Score]:
        if x is None or y is None:
            return dict.fromkeys(("precision", "recall"), no_features)
        if smaller <= neighbourhood:
            return dict.fromkeys(("precision", "recall"), _too_few(smaller, neighbourhood + 1))
        # torch-fidelity takes the generated features first.
        value = prc_features_to_metric(
            x, y, prc_neighborhood=neighbourhood, prc_batch_size=2048, save_cpu_ram=True, verbose=False
        )
        return {name: _score(value[name]) for name in ("precision", "recall")}

    def density_coverage() -> dict[str, Score]:
        if x is None or y is None:
            return dict.fromkeys(("density", "coverage"), no_features)
        if reference.num <= NAEEM_NEIGHBOURHOOD:
            return dict.fromkeys(("density", "coverage"), _too_few(reference.num, NAEEM_NEIGHBOURHOOD + 1))
        density, coverage = density_and_coverage(x, y, NAEEM_NEIGHBOURHOOD)
        return {"density": _score(density), "coverage": _score(coverage)}

    families: dict[tuple[str, ...], Callable[[], dict[str, Score]]] = {
        ("fid",): frechet,
        ("sfid",): spatial_frechet,
        ("is",): inception_score,
        ("kid",): kernel_distance,
        ("precision", "recall"): precision_recall,
        ("density", "coverage"): density_coverage,
    }
    scores = {}
    for names, family in families.items():
        if wanted := set(names) & set(metrics):
            scores |= {metric_name(name, extractor): one for name, one in family().items() if name in wanted}

    settings = {
        "neighbourhood": neighbourhood,
        "density_neighbourhood": NAEEM_NEIGHBOURHOOD,
        "kid_subsets": kid_subsets,
        "kid_subset_size": kid_subset_size,
        "is_splits": is_splits,
        "seed": seed,
    }
    dim = len(samples.moments.mean)
    return Scores(scores, extractor.name, extractor.sha256, samples.num, reference.num, dim, settings)


def metric_name(metric: str, extractor: Extractor) -> str:
    """What a metric may be called: FID, IS and KID are Inception's, precision and recall are anyone's."""
    if extractor.kind == INCEPTION:
        return metric
    elsewhere = {
        "fid": "frechet_distance",
        "sfid": "spatial_frechet_distance",
        "is": "classifier_score",
        "kid": "kernel_distance",
    }
    return f"{elsewhere[metric]}[{extractor.name}]" if metric in elsewhere else metric


def class_distances(samples: Features, reference: Features, min_images: int = 50) -> dict[int, Score]:
    """Fréchet distance within each class of the reference; None, with the reason, where either has too few images.

    Raises:
        ValueError: when either set has no labels.
    """
    if samples.features is None or reference.features is None or samples.labels is None or reference.labels is None:
        raise ValueError("--per_class: it needs samples and reference with a class each")
    scores = {}
    for label in reference.labels.unique().tolist():
        pair = [each.features[each.labels == label] for each in (samples, reference)]  # pyright: ignore
        fewest = min(map(len, pair))
        enough = fewest >= max(2, min_images)
        scores[label] = (
            _score(frechet_distance(*(moments_of(rows) for rows in pair)))
            if enough
            else _too_few(fewest, max(2, min_images))
        )
    return scores


def _score(value: float, std: float | None = None) -> Score:
    if not math.isfinite(value):
        return Score(None, reason=f"it came out as {value}")
    return Score(float(value), std)


def _too_few(num_images: int, needed: int) -> Score:
    return Score(None, reason=f"too few images: {num_images}, and it needs {needed}")


def check_metrics(metrics: Sequence[str]) -> None:
    """Fail in words for a metric that there is not.

    Raises:
        ValueError: naming it.
    """
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise ValueError(f"--metrics {','.join(unknown) or '(none)'}: choose from {', '.join(METRICS)}")


# --- loading extractors

UNREADABLE = (OSError, HTTPException, RuntimeError, ValueError, EOFError, UnpicklingError)
"""What resolving, connecting, reading and unpacking a file of weights raise between them."""


def _load_file(path: str) -> FeatureExtractorBase:
    layers = list(TorchScriptExtractor.get_provided_features_list())
    try:
        return _create(TORCHSCRIPT, layers, path)
    except ValueError as error:
        raise ExtractorError(f"--extractor {error}") from error


def _load_named(name: str, weights_path: str | Path | None) -> FeatureExtractorBase:
    registered = REGISTERED.get(name, name)
    layer_for = FEATURE_EXTRACTORS_REGISTRY[registered].get_default_feature_layer_for_metric
    layers = [layer_for("fid"), *([layer_for("isc")] if name in HAS_CLASSES else [])]
    if weights_path is not None:
        return _load_weights(name, registered, layers, Path(weights_path))
    try:
        with network_timeout(seconds=10.0):
            return _create(registered, layers, None)
    except UNREADABLE as error:
        weights_of = f"torch-fidelity's {Path(URL_INCEPTION_V3).name}" if name == INCEPTION else f"of {name}"
        own = "" if name.startswith("dinov2") else f"--weights_path FILE ({weights_of}) or "
        raise ExtractorError(
            f"--extractor {name}: its weights cannot be downloaded ({_one_line(error)}); give {own}"
            "--extractor FILE.pt (TorchScript), such as the small classifier that `make demo` trains: "
            "its scores compare runs with each other, not with published ones"
        ) from error


def _load_weights(name: str, registered: str, layers: list[str], path: Path) -> FeatureExtractorBase:
    if name.startswith("dinov2"):
        raise ExtractorError(f"--weights_path {path}: torch-fidelity loads {name} from torch hub's cache alone")
    if not path.is_file():
        raise ExtractorError(f"--weights_path {path}: no such file")
    try:
        if not name.startswith("clip"):  # CLIP's is TorchScript; the others torch-fidelity would unpickle unchecked
            torch.load(path, weights_only=True, map_location="cpu")
        return _create(registered, layers, str(path))
    except (*UNREADABLE, TypeError, KeyError) as error:  # not whole, no state dict, or another model's
        raise ExtractorError(
            f"--weights_path {path}: these are not the weights of {name} ({_one_line(error)}); "
            "give the file that torch-fidelity would download"
        ) from error


def _create(registered: str, layers: list[str], path: str | None) -> FeatureExtractorBase:
    """torch-fidelity's constructor, without its talk: on failure, ours is the one line that the user
    reads."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`?torch\.jit\.", category=FutureWarning)  # CLIP's file
        return create_feature_extractor(
            registered, layers, cuda=False, verbose=False, feature_extractor_weights_path=path
        )


@contextlib.contextmanager
def network_timeout(seconds: float) -> Iterator[None]:
    """torch.hub opens its URLs without a timeout: where packets vanish it would wait for minutes."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(lines[0].split())[:160]


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_published(name: str, path: Path) -> bool:
    """torch-fidelity names its file of Inception weights by the first digits of the file's hash."""
    return name == INCEPTION and Path(URL_INCEPTION_V3).stem.split("-")[-1] == _file_sha256(path)[:8]


def _state_sha256(module: FeatureExtractorBase) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
