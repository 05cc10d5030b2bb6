"""Files of a reference's features: our own format, in safetensors, and ADM's npz.

Our files are named by a hash of their `key`, a description of the images, their size and the extractor. A file with
another key or checksum is refused.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from machine.atomic_files import atomic_path
from metrics.agreement import FITTING, Probe, fit_probe
from metrics.downloads import download
from metrics.features import Extractor, Features
from metrics.frechet import Moments
from metrics.npz import Arrays, images_in, read_arrays
from metrics.scores import INCEPTION

FORMAT, OF_INCEPTION = 3, 4  # since version 4, Inception's spatial features are in ADM's order
PER_IMAGE = ("features", "logits", "labels", "images")
# ADM's reference batches, listed in its evaluations/README.md: moments of all training images, and 10,000 images.
ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
NAMES = {side: f"VIRTUAL_imagenet{side}{'_labeled' if side < 512 else ''}.npz" for side in (64, 128, 256, 512)}
PUBLIC = {name: f"{ADM}/{side}/{name}" for side, name in NAMES.items()}


class ReferenceError(ValueError):
    """A reference cannot be read, or is of other images or another extractor; the message is for users."""


def reference_path(folder: Path, key: Mapping[str, object]) -> Path:
    """Return the path of the features with this key: the name of their source, and a hash of the key."""
    version = OF_INCEPTION if key.get("extractor") == INCEPTION else FORMAT
    digest = hashlib.sha256(json.dumps({**key, "format": version}, sort_keys=True).encode()).hexdigest()
    return folder / f"{Path(str(key.get('source', 'images'))).stem}-{digest[:16]}.safetensors"


def save_features(features: Features, path: Path, key: Mapping[str, object]) -> None:
    first, second = features.halves or (None, None)
    candidates = {"whole": features.moments, "spatial": features.spatial, "first": first, "second": second}
    named_moments = {name: moments for name, moments in candidates.items() if moments is not None}
    tensors = {name: tensor.contiguous() for name in PER_IMAGE if (tensor := getattr(features, name)) is not None}
    for name, moments in named_moments.items():
        tensors |= {f"{name}.mean": moments.mean.contiguous(), f"{name}.covariance": moments.covariance.contiguous()}
    counts = json.dumps({name: moments.num for name, moments in named_moments.items()})
    _save(tensors, path, key, counts)


def fit_cached_probe(features: Features, num_classes: int, path: Path, key: Mapping[str, object]) -> Probe:
    """Fit a probe to the labelled features of the file at `path`, or load the one that was fitted to it before."""
    key = {**key, "probe": FITTING, "num_classes": num_classes}
    path = path.with_name(f"{path.stem}-probe.safetensors")
    if path.exists():
        return Probe(**_load(path, key)[0])
    labelled = features.labelled
    assert labelled is not None
    probe = fit_probe(labelled.features, labelled.labels, num_classes)
    with suppress(OSError, ReferenceError):  # a complete cache may be shared, and not be written
        _save(vars(probe), path, key)
    return probe


def _save(tensors: dict[str, Tensor], path: Path, key: Mapping[str, object], counts: str = "") -> None:
    metadata = {"key": json.dumps(key, sort_keys=True), "counts": counts, "sha256": _sha256(tensors, counts)}
    try:
        with atomic_path(path) as partial:
            save_file(tensors, partial, metadata=metadata)
    except SafetensorError as error:
        raise ReferenceError(
            f"--data.cache: reference {path} could not be written ({error}); check the disk"
        ) from error


def load_features(path: Path, key: Mapping[str, object]) -> Features:
    tensors, counts = _load(path, key)
    moments = {
        name: Moments(tensors[f"{name}.mean"], tensors[f"{name}.covariance"], num)
        for name, num in json.loads(counts).items()
    }
    halves = (moments["first"], moments["second"]) if "first" in moments else None
    per_image = {name: tensors.get(name) for name in PER_IMAGE}
    return Features(moments["whole"], moments.get("spatial"), halves, **per_image)


def _load(path: Path, key: Mapping[str, object]) -> tuple[dict[str, Any], str]:
    """Return tensors and counts of a file; raise `ReferenceError` if it is damaged, or of another key."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ReferenceError(f"reference {path} is damaged ({error}); delete it") from error
    stored, expected = json.loads(metadata.get("key", "{}")), json.loads(json.dumps(key))
    if metadata.get("sha256") != _sha256(tensors, metadata.get("counts", "")):
        raise ReferenceError(f"reference {path} is damaged (its checksum differs); delete it")
    if different := sorted(name for name in expected | stored if stored.get(name) != expected.get(name)):
        raise ReferenceError(f"reference {path} is of another {', '.join(different)}; delete it")
    return tensors, metadata["counts"]


def _sha256(tensors: Mapping[str, Tensor], counts: str) -> str:
    digest = hashlib.sha256(counts.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def write_adm(path: Path, features: Features, images: UInt8[Tensor, "n 3 h w"], extractor: Extractor) -> None:
    """Write a reference batch in ADM's format (Dhariwal and Nichol 2021).

    It holds `arr_0` [n h w 3], `mu`, `sigma` and, if the extractor has spatial features, `mu_s` and `sigma_s`. The
    extractor's name and hash are added, which ADM's own files lack. Another file of that name is kept.
    """
    description = {"extractor": extractor.name, "extractor_sha256": extractor.sha256, "format": OF_INCEPTION}
    arrays: dict[str, Any] = {name: np.array(value) for name, value in description.items()}
    arrays |= {"arr_0": images.permute(0, 2, 3, 1).numpy()}
    arrays |= {"mu": features.moments.mean.numpy(), "sigma": features.moments.covariance.numpy()}
    if features.spatial is not None:
        arrays |= {"mu_s": features.spatial.mean.numpy(), "sigma_s": features.spatial.covariance.numpy()}
    with atomic_path(path, keep=True) as partial:
        np.savez(partial, **arrays)


def read_adm(
    path: Path, extractor: Extractor, image_size: tuple[int, int] | None = None
) -> tuple[Features | None, UInt8[Tensor, "n 3 h w"] | None]:
    """Read moments and images of a reference batch in ADM's format; either may be missing. A file that does not name
    its extractor is of Inception. If `path` does not exist but is the name of one of ADM's own files, that is
    downloaded."""
    flag = f"--reference {path}"
    if not path.exists() and str(path) in PUBLIC:
        path = download(PUBLIC[str(path)], str(path), flag)
    arrays = read_arrays(path, flag)
    if not {"mu", "sigma"} <= arrays.keys() and "arr_0" not in arrays:
        raise ReferenceError(f"{flag}: it holds {sorted(arrays)}, not mu and sigma or arr_0")

    images = None
    if "arr_0" in arrays:
        images = images_in(arrays, flag)
        if image_size is not None and images.shape[2:] != image_size:
            size, theirs = "x".join(map(str, image_size)), "x".join(map(str, images.shape[2:]))
            raise ReferenceError(f"{flag}: its images are {theirs}, the samples {size}")
    num = None if images is None else len(images)
    moments, spatial = (_moments_in(arrays, names, num, flag) for names in (("mu", "sigma"), ("mu_s", "sigma_s")))
    if moments is None:
        return None, images

    name = str(arrays.get("extractor", INCEPTION))
    digest = str(arrays.get("extractor_sha256", extractor.sha256))
    if name != extractor.name or digest != extractor.sha256:
        raise ReferenceError(
            f"{flag}: its mu and sigma are of the extractor {name}"
            f"{' (other weights)' if name == extractor.name else ''}, the samples' features of {extractor.name}; "
            "give the same --extractor"
        )
    if spatial is not None and "extractor" in arrays and int(arrays.get("format", 0)) < OF_INCEPTION:
        raise ReferenceError(f"{flag}: its mu_s and sigma_s are in an outdated order; write it again")
    return Features(moments, spatial), images


def hash_adm(features: Features | None, images: UInt8[Tensor, "n 3 h w"] | None) -> str:
    """Hash what `read_adm` returned: files of one name may differ."""
    tensors = {} if images is None else {"images": images}
    for name in ("moments", "spatial") if features else ():
        if moments := getattr(features, name):
            tensors |= {f"{name}.mean": moments.mean, f"{name}.covariance": moments.covariance}
    return _sha256(tensors, "")


def _moments_in(arrays: Arrays, names: tuple[str, str], num: int | None, flag: str) -> Moments | None:
    """Return the moments with these names, None if they are missing; raise `ReferenceError` if they are malformed."""
    if not arrays.keys() >= {*names}:
        return None
    mean, covariance = (arrays[name] for name in names)
    is_pair = mean.dtype.kind == covariance.dtype.kind == "f" and mean.ndim == 1 and covariance.shape == mean.shape * 2
    if not is_pair or not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ReferenceError(
            f"{flag}: {' and '.join(names)} are not a finite mean [d] and covariance [d d]; write it again"
        )
    return Moments(torch.from_numpy(mean).double(), torch.from_numpy(covariance).double(), num)
