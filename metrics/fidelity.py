"""Fréchet distance, inception score, kernel distance, precision and recall: the only caller of torch-fidelity.

Features come from a named extractor of torch-fidelity or a TorchScript file. Only on Inception do the scores bear
the names FID, IS and KID; on anything else they are named by their extractor and compare with each other alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch_fidelity
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor
from tqdm import tqdm

INCEPTION = "inception"
NAMES = (INCEPTION, *(name for name in FEATURE_EXTRACTORS_REGISTRY if name != "inception-v3-compat"))


class ExtractorError(ValueError):
    """A feature extractor that cannot be had or used, in the user's words."""


@dataclass(frozen=True)
class Score:
    """One number, its spread where it has one, or the reason why there is none."""

    value: float | None
    std: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Scores:
    """Scores by name, and all it takes to derive them again."""

    scores: dict[str, Score]
    extractor: str
    extractor_sha256: str
    num_samples: int
    num_reference: int
    settings: dict[str, float | int] = field(default_factory=dict)
    torch_fidelity: str = torch_fidelity.__version__

    def to_dict(self) -> dict[str, object]:
        """Plain containers, for JSON."""
        return asdict(self)

    def table(self) -> str:
        """A Markdown table, a score a row."""
        rows = ["| metric | value |", "|---|---|"]
        for name, score in self.scores.items():
            if score.value is None:
                text = f"none: {score.reason}"
            else:
                text = f"{score.value:.4f}" + (f" ± {score.std:.4f}" if score.std is not None else "")
            rows.append(f"| {name} | {text} |")
        return "\n".join(rows)


@dataclass(frozen=True)
class Features:
    """What an extractor says of a set of images."""

    features: Tensor  # [n d]
    logits: Tensor | None  # [n k]


class Extractor:
    """Images to features, by name (`NAMES`) or from a TorchScript file.

    A TorchScript file takes uint8 RGB `[n 3 h w]`, resizes by itself, and returns features `[n d]` and class
    probabilities `[n k]`. `weights_path` gives a named extractor its weights where they cannot be downloaded.

    Raises:
        ExtractorError: naming the flag and what to give it.
    """

    def __init__(
        self, extractor: str = INCEPTION, *, weights_path: str | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.device = torch.device(device)
        if Path(extractor).is_file():
            self.name = Path(extractor).stem
            self.sha256 = _file_hash(Path(extractor))
            self.module: nn.Module = _load_torchscript(extractor).to(self.device)
            self.named = None
        elif extractor in NAMES:
            self.name = extractor
            self.named = self.module = _load_named(extractor, weights_path).to(self.device)
            self.sha256 = _state_hash(self.module)
        else:
            raise ExtractorError(
                f"--extractor {extractor}: neither a file nor a known name; names are {', '.join(NAMES)}"
            )

    @property
    def is_inception(self) -> bool:
        """Whether scores may bear the literature's names."""
        return self.name == INCEPTION and self.named is not None

    @torch.inference_mode()
    def __call__(self, images: Dataset | Tensor, *, batch_size: int = 64, desc: str = "features") -> Features:
        """Features of a set of images: uint8 [n 3 h w], or a dataset of such images (with or without labels).

        Raises:
            ExtractorError: when features are not finite.
        """
        features, logits = [], []
        num = len(images)  # pyright: ignore[reportArgumentType]
        with tqdm(total=num, desc=desc, unit="img", leave=False) as bar:
            for start in range(0, num, batch_size):
                batch = [images[i] for i in range(start, min(start + batch_size, num))]
                batch = torch.stack([item[0] if isinstance(item, tuple) else item for item in batch])
                outputs = self._forward(batch.to(self.device))
                features.append(outputs[0].float().cpu())
                if len(outputs) > 1:
                    logits.append(outputs[1].float().cpu())
                bar.update(len(batch))
        joined = torch.cat(features)
        if not joined.isfinite().all():
            raise ExtractorError(f"--extractor {self.name}: features of {desc} are not finite")
        return Features(joined, torch.cat(logits) if logits else None)

    def _forward(self, batch: Tensor) -> tuple[Tensor, ...]:
        if self.named is not None:
            return self.named(batch)
        features, probabilities = self.module(batch)
        return features, probabilities.float().clamp(min=1e-12).log()


def compare(
    samples: Features,
    reference: Features,
    extractor: Extractor,
    *,
    neighbourhood: int = 3,
    kid_subsets: int = 100,
    kid_subset_size: int = 1000,
    seed: int = 0,
) -> Scores:
    """Score samples against a reference.

    Fréchet distance (Heusel et al. 2017), inception score (Salimans et al. 2016), kernel distance (Binkowski et al.
    2018; its subsets are cut to the smaller set), k-NN precision (share of samples inside the reference's manifold)
    and recall (Kynkäänniemi et al. 2019). A score that so few images do not allow is None, with the reason.
    """
    x, y = samples.features.double(), reference.features.double()
    smaller = min(len(x), len(y))
    subset_size = min(kid_subset_size, smaller)
    names = _score_names(extractor)
    few = Score(None, reason=f"{smaller} images are too few")
    scores = {}

    scores[names["frechet"]] = few
    if smaller >= 2:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # eigenvalues that round below zero
            value = fid_statistics_to_metric(fid_features_to_statistics(x), fid_features_to_statistics(y), False)
        scores[names["frechet"]] = _score(value["frechet_inception_distance"])

    if samples.logits is None:
        scores[names["inception_score"]] = Score(None, reason=f"{extractor.name} has no classes")
    elif len(samples.logits) < 10:
        scores[names["inception_score"]] = few
    else:
        value = isc_features_to_metric(samples.logits, splits=10, rng_seed=seed)
        scores[names["inception_score"]] = _score(value["inception_score_mean"], value["inception_score_std"])

    scores[names["kernel"]] = few
    if subset_size >= 2:
        value = kid_features_to_metric(
            x, y, kid_subsets=kid_subsets, kid_subset_size=subset_size, rng_seed=seed, verbose=False
        )
        mean, std = value["kernel_inception_distance_mean"], value["kernel_inception_distance_std"]
        scores[names["kernel"]] = _score(mean, std)

    scores["precision"] = scores["recall"] = few
    if smaller > neighbourhood:
        value = prc_features_to_metric(
            x.float(), y.float(), prc_neighborhood=neighbourhood, save_cpu_ram=True, verbose=False
        )
        scores["precision"], scores["recall"] = _score(value["precision"]), _score(value["recall"])

    settings = {"neighbourhood": neighbourhood, "kid_subsets": kid_subsets, "kid_subset_size": subset_size, "seed": seed}
    return Scores(scores, extractor.name, extractor.sha256, len(x), len(y), settings)


def _score_names(extractor: Extractor) -> dict[str, str]:
    if extractor.is_inception:
        return {"frechet": "fid", "inception_score": "is", "kernel": "kid"}
    return {
        "frechet": f"frechet_distance[{extractor.name}]",
        "inception_score": f"classifier_score[{extractor.name}]",
        "kernel": f"kernel_distance[{extractor.name}]",
    }


def _score(value: float, std: float | None = None) -> Score:
    return Score(float(value), std) if math.isfinite(value) else Score(None, reason="not a finite number")


def _load_named(name: str, weights_path: str | None) -> FeatureExtractorBase:
    registered = "inception-v3-compat" if name == INCEPTION else name
    extractor_class = FEATURE_EXTRACTORS_REGISTRY[registered]
    layers = [extractor_class.get_default_feature_layer_for_metric("fid")]
    with contextlib.suppress(Exception):  # extractors without a classifier raise here, each in its own way
        layers.append(extractor_class.get_default_feature_layer_for_metric("isc"))
    if weights_path is not None:
        _check_weights(weights_path)
    quiet = {"cuda": False, "verbose": False}
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return create_feature_extractor(
                registered, layers, feature_extractor_weights_path=weights_path, **quiet
            )
    except Exception as error:  # a download, a file or a state dict can fail in many types
        reason = " ".join(str(error).split())[:200]
        given = f"--weights_path {weights_path}" if weights_path else f"--extractor {name}"
        raise ExtractorError(
            f"{given}: its weights could not be had ({reason}); give --weights_path FILE, or --extractor FILE.pt "
            "(a TorchScript extractor; what its scores are worth is in docs/results.md)"
        ) from error


def _check_weights(path: str) -> None:
    """torch-fidelity unpickles the file; let it do so only with one that holds nothing but tensors."""
    try:
        torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise ExtractorError(f"--weights_path {path}: missing, or not a plain state dict of tensors") from error


def _load_torchscript(path: str) -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is the field's format for extractors
            return torch.jit.load(path, map_location="cpu").eval()
    except RuntimeError as error:
        raise ExtractorError(f"--extractor {path}: not a TorchScript file") from error


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state_hash(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
