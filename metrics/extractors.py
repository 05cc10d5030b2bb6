"""Feature extractors and their weights: torch-fidelity's and timm's by name, or a program in a file."""

import contextlib
import hashlib
import io
import warnings
from collections import OrderedDict
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import Resize

from machine.atomic_files import sha256_of
from metrics.downloads import hub_answers, network_timeout
from metrics.programs import first_line, load_program
from metrics.scores import INCEPTION

PROGRAM = "program"
TIMM = "timm:"
REGISTERED = {INCEPTION: "inception-v3-compat"}  # torch-fidelity's name, where it differs from ours
PUBLISHED = Path(URL_INCEPTION_V3).stem.split("-")[-1]  # prefix of the hash of Inception's weights, in the file's name
NAMES = (INCEPTION, *(name for name in FEATURE_EXTRACTORS_REGISTRY if name not in REGISTERED.values()))
UNREADABLE = (  # errors of downloading and reading a file of weights, or of a file that is not a state dict
    *(OSError, HTTPException, RuntimeError, ValueError, EOFError, UnpicklingError),
    *(TypeError, KeyError, AttributeError, SafetensorError),
)


class ExtractorError(ValueError):
    """A feature extractor cannot be loaded or used; the message is for users."""


class ProgramExtractor(nn.Module):
    """A program from uint8 RGB [n 3 h w] to features [n d] and probabilities [n k], which become logarithms."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.module = load_program(path)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, probabilities = self.module(images)
        if features.ndim != 2 or probabilities.ndim != 2:
            shapes = f"{list(features.shape)} and {list(probabilities.shape)}"
            raise ExtractorError(f"it returns {shapes}, not features [n d] and class probabilities [n k]")
        sums = probabilities.cpu().double().sum(dim=1)
        if probabilities.isfinite().all() and (probabilities.min() < 0 or (sums - 1).abs().max() > 1e-2):
            raise ExtractorError("its second output is not class probabilities (are they logits? add a softmax)")
        return features, probabilities.float().clamp(min=1e-30).log()


def with_resizing(network: nn.Module, side: int) -> nn.Module:
    """Precede a network by bicubic resizing, as in published scores on DINOv2 (dgm-eval, Stein et al. 2023; EDM2)."""
    return nn.Sequential(OrderedDict(resize=Resize([side, side], InterpolationMode.BICUBIC), network=network))


def load_extractor(name: str, weights_path: str | Path | None = None) -> tuple[nn.Module, str, bool]:
    """Load an extractor: one of `NAMES` or `timm:NAME`, with weights of its own or from a file, or the path of a
    program.

    It returns a network from uint8 images to features [n d] and, for classifiers, logits [n k]; its hash; and whether
    its weights are those of published scores.
    """
    kind, short_name = kind_and_name(name)
    if kind == PROGRAM:
        if not Path(name).is_file():
            raise ExtractorError(f"--extractor {name}: no such file, nor one of {', '.join(NAMES)}, nor timm:NAME")
        if weights_path is not None:
            raise ExtractorError(f"--weights_path {weights_path}: --extractor {name} brings its own weights")
        try:
            return ProgramExtractor(name), sha256_of(Path(name)), False
        except ValueError as error:
            raise ExtractorError(f"--extractor {error}") from error
    if weights_path is not None and name.startswith("dinov2"):
        raise ExtractorError(f"--weights_path {weights_path}: torch-fidelity loads {name} only from torch hub's cache")
    if weights_path is not None and not Path(weights_path).is_file():
        raise ExtractorError(f"--weights_path {weights_path}: no such file")
    if kind == "timm":
        module, published = _load_timm(short_name, weights_path), False
    else:
        module = _load_named(name, weights_path)
        module = with_resizing(module, FeatureExtractorDinoV2.INPUT_IMAGE_SIZE) if name.startswith("dinov2") else module
        published = weights_path is None or (name == INCEPTION and sha256_of(Path(weights_path)).startswith(PUBLISHED))
    return module, _state_sha256(module), published


def kind_and_name(extractor: str) -> tuple[str, str]:
    """Return the kind of an extractor (one of `NAMES`, `timm` or `PROGRAM`) and its name in scores."""
    if extractor in NAMES:
        return extractor, extractor
    return ("timm", extractor.removeprefix(TIMM)) if extractor.startswith(TIMM) else (PROGRAM, Path(extractor).stem)


def _load_timm(name: str, weights_path: str | Path | None) -> nn.Module:
    from metrics.timm_models import find_timm, is_downloaded, load_timm  # not at the top: it takes seconds

    flag = f"--extractor {TIMM}{name}"
    remedy = "give --weights_path FILE (.safetensors, .pth or .bin), timm's weights of this model or your own"
    try:
        find_timm(name)
    except ValueError as error:
        raise ExtractorError(f"{flag}: {error}") from error
    if weights_path is None and not is_downloaded(name) and not hub_answers():
        raise ExtractorError(f"{flag}: the hub does not answer, and has not served its weights; {remedy}")
    try:
        with network_timeout(seconds=10.0):
            return load_timm(name, weights_path)
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        if weights_path is None:
            raise ExtractorError(f"{flag}: its weights cannot be had ({reason}); {remedy}") from error
        raise ExtractorError(f"--weights_path {weights_path}: not weights of timm's {name} ({reason})") from error


def _load_named(name: str, weights_path: str | Path | None) -> FeatureExtractorBase:
    """Load a network of torch-fidelity, without its output to stderr and its warnings."""
    registered = REGISTERED.get(name, name)
    layer_for = FEATURE_EXTRACTORS_REGISTRY[registered].get_default_feature_layer_for_metric
    # Only Inception has logits; the inception score's default layer of other networks holds features.
    layers = [layer_for("fid"), *([layer_for("isc")] if name == INCEPTION else [])]
    path = None if weights_path is None else str(weights_path)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings(), network_timeout(seconds=10.0):
            warnings.filterwarnings("ignore", message=r"`?torch\.jit\.", category=FutureWarning)  # CLIP's file
            # torch-fidelity unpickles files without checks, except CLIP's, which is TorchScript.
            if path and not name.startswith("clip"):
                torch.load(path, weights_only=True, map_location="cpu")
            return create_feature_extractor(
                registered, layers, cuda=False, verbose=False, feature_extractor_weights_path=path
            )
    except UNREADABLE as error:
        if path:
            raise ExtractorError(
                f"--weights_path {path}: not the weights of {name} that torch-fidelity downloads ({first_line(error)})"
            ) from error
        weights_of = f"torch-fidelity's {Path(URL_INCEPTION_V3).name}" if name == INCEPTION else f"of {name}"
        file = "" if name.startswith("dinov2") else f"--weights_path FILE ({weights_of}) or "
        raise ExtractorError(
            f"--extractor {name}: its weights cannot be downloaded ({first_line(error)}); give {file}"
            "--extractor timm:NAME or FILE.pt2 (a program: one that you trust). `python scripts/recognise.py "
            "--data.path IMAGES --classifier FILE.pt2` trains one: its scores compare runs with each other, not with "
            "published ones"
        ) from error


def _state_sha256(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
