"""The latent cache: what a codec stores of each image, encoded once and read by every epoch after.

A folder of shards (`data/shards.py`) and a `manifest.json` that says what they were made of; it comes last, so that a
folder with one is whole (`data/encoding.py`).
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
from data.shards import Rows, check_once, read_about, read_shard

FORMAT = 2


class LatentCache:
    """An encoded split; `expected`, codec and images of the run, must stand in its manifest.

    What is stored lies in the memory of `device`, each shard held against its checksum on the way there; without a
    device it stays in the files, which are checked once. Labels are in main memory.
    """

    def __init__(self, folder: Path, expected: Mapping[str, object], device: torch.device | str | None = "cpu") -> None:
        manifest = _read_manifest(folder)
        differences = [
            f"{key} is {short(manifest.get(key))}, the run has {short(value)}"
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
            check_once(paths)
            shards = [read_about(path) for path in paths]
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
        """What is stored [b ...] of these images; `view` 1 is the mirrored one."""
        if isinstance(self.stored, Rows):
            return self.stored.read(index.cpu())[torch.arange(len(index)), view.cpu()]
        return self.stored[index.to(self.stored.device), view.to(self.stored.device)]


def cache_name(expected: Mapping[str, object]) -> str:
    """A folder name of its own for each combination of codec, images and crop."""
    digest = hashlib.sha256(json.dumps([FORMAT, expected], sort_keys=True, default=str).encode()).hexdigest()
    source = Path(str(expected.get("source", "images"))).stem
    return f"{source}-{digest[:12]}"


def num_bytes(folder: Path) -> int:
    """Of a cache's shards, as far as they are there."""
    paths = [folder / name for name in _read_manifest(folder)["shards"]]
    return sum(path.stat().st_size for path in paths if path.is_file())


def _read_manifest(folder: Path) -> dict:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}, not {FORMAT}")
        kinds = {"classes": str, "image_size": int, "shards": str}
        if not all(isinstance(item, kind) for name, kind in kinds.items() for item in [*manifest[name]]):
            raise ValueError(f"{', '.join(kinds)} are no lists of names and numbers")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"latent cache {folder}: manifest.json is missing, damaged or of another version ({error}); "
            "delete the folder"
        ) from error
    return manifest


def short(value: object) -> str:
    """For messages: of long ones the beginning and a hash."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:40]}... ({hashlib.sha256(text.encode()).hexdigest()[:8]})"
