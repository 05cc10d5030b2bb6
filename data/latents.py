"""The latent cache: each image's encoding, computed once and read in every epoch.

A cache is a folder of shards (`data/shards.py`) with a `manifest.json` that describes the codec and the images. The
manifest is written last, so a folder that has one is complete (`data/encoding.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

from data.layout import DataError
from data.shards import Rows, read_labels, read_shard, verify_once

FORMAT = 2


class LatentCache:
    """The encoded images of a split, with their labels in main memory.

    Args:
        folder: the cache
        expected: the run's codec and images; a manifest that differs raises `DataError`
        device: where to load the encodings, verifying checksums; None leaves them in the files, verified once
    """

    def __init__(self, folder: Path, expected: Mapping[str, object], device: torch.device | str | None = "cpu") -> None:
        manifest = _read_manifest(folder)
        differences = [
            f"{key} is {abbreviate(manifest.get(key))}, the run has {abbreviate(value)}"
            for key, value in expected.items()
            if manifest.get(key) != value
        ]
        if differences:
            raise DataError(
                f"latent cache {folder} does not fit: {'; '.join(differences)}; delete it, or give another --data.cache"
            )
        self.folder, self.manifest = folder, manifest
        self.classes: list[str] = manifest["classes"]
        self.num_classes = len(self.classes)
        self.image_size: tuple[int, int] = tuple(manifest["image_size"])
        paths = [folder / name for name in manifest["shards"]]
        if device is None:
            verify_once(paths)
            shards = [read_labels(path) for path in paths]
            self.stored = Rows(paths)
        else:
            shards = [read_shard(path) for path in paths]
            self.stored = torch.cat([shard["stored"].to(device) for shard in shards])
        self.labels, self.source_indices = (
            torch.cat([shard[name] for shard in shards]) for name in ("labels", "source_indices")
        )
        self.num_views = self.stored.shape[1]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: Int64[Tensor, " b"], view: Int64[Tensor, " b"]) -> Tensor:
        """Read the encodings [b ...] of images; `view` is 1 for the mirrored image."""
        if isinstance(self.stored, Rows):
            return self.stored.read(index.cpu())[torch.arange(len(index)), view.cpu()]
        return self.stored[index.to(self.stored.device), view.to(self.stored.device)]


def cache_name(expected: Mapping[str, object]) -> str:
    """Name the cache of a combination of codec, images and crop."""
    digest = hashlib.sha256(json.dumps([FORMAT, expected], sort_keys=True, default=str).encode()).hexdigest()
    source = Path(str(expected.get("source", "images"))).stem
    return f"{source}-{digest[:12]}"


def num_bytes(folder: Path) -> int:
    """Total size of a cache's shards; missing ones count as 0."""
    paths = [folder / name for name in _read_manifest(folder)["shards"]]
    return sum(path.stat().st_size for path in paths if path.is_file())


def _read_manifest(folder: Path) -> dict:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}, not {FORMAT}")
        types = {"classes": str, "image_size": int, "shards": str}
        if not all(isinstance(item, type_) for name, type_ in types.items() for item in [*manifest[name]]):
            raise ValueError(f"{', '.join(types)} are no lists of names and numbers")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"latent cache {folder}: manifest.json is missing, damaged or of another version ({error}); "
            "delete the folder"
        ) from error
    return manifest


def abbreviate(value: object) -> str:
    """Format a value for a message; long values are truncated and followed by a hash."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:40]}... ({hashlib.sha256(text.encode()).hexdigest()[:8]})"
