"""Fréchet, inception and kernel scores, precision and recall: the only caller of torch-fidelity.

Images become features once (`Extractor`), features become scores (`compare`); `score` does both. Only on
Inception do scores bear the names FID, IS and KID, under which the literature prints them. On anything else
they are named by their extractor and compare with each other alone.

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch_fidelity
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor
from tqdm import tqdm

from metrics.torchscript import load_torchscript

INCEPTION = "inception"
TORCHSCRIPT = "torchscript"
REGISTERED = {INCEPTION: "inception-v3-compat"}  # our name -> torch-fidelity's; the others are the same
NAMES = (INCEPTION, *(name for name in FEATURE_EXTRACTORS_REGISTRY if name not in REGISTERED.values()))
METRICS = ("fid", "is", "kid", "precision", "recall")

Images = Dataset | UInt8[Tensor, "_ 3 _ _"]
"""Map-style, of uint8 RGB images [3 h w]; what stands beside an image (its label) is passed over."""


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
    """What an extractor says of a set of images, on the CPU in float32."""

    features: Float[Tensor, "n d"]
    logits: Float[Tensor, "n k"] | None  # where the extractor is a classifier


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
            self.sha256 = _state_sha256(self.module)
        elif Path(name).is_file():
            if weights_path is not None:
                raise ExtractorError(f"--weights_path {weights_path}: --extractor {name} brings its own weights")
            self.kind, self.name = TORCHSCRIPT, Path(name).stem
            self.module = _load_file(name)
            self.sha256 = _file_sha256(Path(name))
        else:
            raise ExtractorError(f"--extractor {name}: no such file, nor one of {', '.join(NAMES)}")
        self.device = torch.device(device)
        self.module.to(self.device)

    @torch.inference_mode()
    def __call__(
        self,
        images: Images,
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        progress: bool = True,
        desc: str = "features",
    ) -> Features:
        """Features of a set of images. `num_workers` processes read a dataset; a tensor needs none.

        Raises:
            ValueError: for an empty set, or images that are not uint8 RGB.
            ExtractorError: for features that are not finite, or a file without the interface.
        """
        num_images = len(images)  # pyright: ignore[reportArgumentType]
        if num_images == 0:
            raise ValueError(f"{desc}: there are no images to score")
        outputs: list[tuple[Tensor, ...]] = []
        with tqdm(total=num_images, desc=desc, unit="img", leave=False, disable=not progress) as bar:
            for batch in _batches(images, batch_size, num_workers):
                if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[1] != 3:
                    found = f"{str(batch.dtype).removeprefix('torch.')} {list(batch.shape[1:])}"
                    raise ValueError(f"{desc}: images are {found}; extractors take uint8 RGB [3, h, w]")
                outputs.append(tuple(output.float().cpu() for output in self._extract(batch.to(self.device))))
                bar.update(len(batch))
        features, *logits = (torch.cat(parts) for parts in zip(*outputs, strict=True))

        for output in (features, *logits):
            bad = int((~output.isfinite()).any(dim=1).sum())
            if bad:
                raise ExtractorError(f"--extractor {self.name}: not finite on {bad} of {num_images} images ({desc})")
        return Features(features, logits[0] if logits else None)

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


def _batches(images: Images, batch_size: int, num_workers: int) -> Iterator[Tensor]:
    if isinstance(images, Tensor):
        return iter(images.split(batch_size))
    return iter(DataLoader(images, batch_size, num_workers=num_workers, collate_fn=_collate_images))


def _collate_images(items: list) -> Tensor:
    return default_collate([item[0] if isinstance(item, (tuple, list)) else item for item in items])


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
    _check_metrics(metrics)
    if not isinstance(extractor, Extractor):
        extractor = Extractor(extractor, weights_path=weights_path, device=device)

    def extract(images: Images, desc: str) -> Features:
        return extractor(images, batch_size=batch_size, num_workers=num_workers, progress=progress, desc=desc)

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
      images.
    - `is`: exp of the mean divergence between a sample's class probabilities and their average, from 1 to the
      number of classes, over `is_splits` parts of the shuffled samples (Salimans et al. 2016). Blind to the
      reference.
    - `kid`: unbiased squared MMD with a cubic kernel, near 0 and even below it for equal distributions, over
      `kid_subsets` random subsets of `kid_subset_size`, cut to the smaller set (Bińkowski et al. 2018).
    - `precision`: share of the samples that lie within the reference's manifold, the union of balls that
      reach to each image's k-th neighbour, k = `neighbourhood`; `recall`: share of the reference within the
      samples' manifold (Kynkäänniemi et al. 2019). Both in [0, 1].

    `settings` records what was used: the subset size after the cut, one subset where the subset is the whole
    of both sets (and no standard deviation: there is nothing to vary).

    Raises:
        ValueError: for an unknown metric or a setting out of range.
    """
    _check_metrics(metrics)
    if min(neighbourhood, kid_subsets, kid_subset_size, is_splits) < 1:
        raise ValueError("neighbourhood, kid_subsets, kid_subset_size and is_splits: each must be at least 1")
    x, y = samples.features.double(), reference.features.double()
    smaller, larger = sorted((len(x), len(y)))
    kid_subset_size = min(kid_subset_size, smaller)
    kid_subsets = kid_subsets if kid_subset_size < larger else 1

    def frechet_distance() -> dict[str, Score]:
        if smaller < 2:
            return {"fid": _too_few(smaller, 2)}
        return {"fid": _score(_frechet_distance(x, y))}

    def inception_score() -> dict[str, Score]:
        if samples.logits is None:
            return {"is": Score(None, reason=f"{extractor.name} has no class probabilities")}
        if len(x) < 2 * is_splits:  # a part of one image scores 1, whatever the image
            return {"is": _too_few(len(x), 2 * is_splits)}
        value = isc_features_to_metric(samples.logits, splits=is_splits, rng_seed=seed)
        return {"is": _score(value["inception_score_mean"], value["inception_score_std"] if is_splits > 1 else None)}

    def kernel_distance() -> dict[str, Score]:
        if kid_subset_size < 2:
            return {"kid": _too_few(kid_subset_size, 2)}
        sizes = {"kid_subsets": kid_subsets, "kid_subset_size": kid_subset_size}
        value = kid_features_to_metric(x, y, **sizes, rng_seed=seed, verbose=False)
        std = value["kernel_inception_distance_std"] if kid_subsets > 1 else None
        return {"kid": _score(value["kernel_inception_distance_mean"], std)}

    def precision_recall() -> dict[str, Score]:
        if smaller <= neighbourhood:
            return dict.fromkeys(("precision", "recall"), _too_few(smaller, neighbourhood + 1))
        # torch-fidelity takes the generated features first.
        value = prc_features_to_metric(
            x, y, prc_neighborhood=neighbourhood, prc_batch_size=2048, save_cpu_ram=True, verbose=False
        )
        return {name: _score(value[name]) for name in ("precision", "recall")}

    families: dict[tuple[str, ...], Callable[[], dict[str, Score]]] = {
        ("fid",): frechet_distance,
        ("is",): inception_score,
        ("kid",): kernel_distance,
        ("precision", "recall"): precision_recall,
    }
    scores = {}
    for names, family in families.items():
        if wanted := set(names) & set(metrics):
            scores |= {metric_name(name, extractor): one for name, one in family().items() if name in wanted}

    settings = {
        "neighbourhood": neighbourhood,
        "kid_subsets": kid_subsets,
        "kid_subset_size": kid_subset_size,
        "is_splits": is_splits,
        "seed": seed,
    }
    return Scores(scores, extractor.name, extractor.sha256, len(x), len(y), x.shape[1], settings)


def metric_name(metric: str, extractor: Extractor) -> str:
    """What a metric may be called: FID, IS and KID are Inception's, precision and recall are anyone's."""
    if extractor.kind == INCEPTION:
        return metric
    elsewhere = {"fid": "frechet_distance", "is": "classifier_score", "kid": "kernel_distance"}
    return f"{elsewhere[metric]}[{extractor.name}]" if metric in elsewhere else metric


def _frechet_distance(x: Tensor, y: Tensor) -> float:
    """|mu_1 - mu_2|² + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)), as torch-fidelity computes it."""
    statistics = [fid_features_to_statistics(features) for features in (x, y)]
    for each in statistics:
        each["sigma"] = each["sigma"].reshape(x.shape[1], x.shape[1])  # np.cov of one feature is a scalar
    distance = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    return max(distance, 0.0)  # it rounds below zero where the sets are equal


def _score(value: float, std: float | None = None) -> Score:
    if not math.isfinite(value):
        return Score(None, reason=f"it came out as {value}")
    return Score(float(value), std)


def _too_few(num_images: int, needed: int) -> Score:
    return Score(None, reason=f"too few images: {num_images}, and it needs {needed}")


def _check_metrics(metrics: Sequence[str]) -> None:
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
        with _network_timeout(seconds=10.0):
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
def _network_timeout(seconds: float) -> Iterator[None]:
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


def _state_sha256(module: FeatureExtractorBase) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
