"""The latent cache: what a codec stores of each image, encoded once and read by every epoch after.

A folder of safetensors shards (`stored` [n v ...], `labels` [n], `source_indices` [n]) with checksums, and a
`manifest.json` that says what it was made of. `v` counts the views: 1, or 2 with mirrored images. Shards are written
aside and renamed; the manifest comes last, so a folder with one is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from jaxtyping import Int64, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from data.image_set import ImageSet
from data.layout import DataError

FORMAT = 2
IMAGES_PER_SHARD = 2048
TENSORS = ("stored", "labels", "source_indices")


class LatentCache:
    """An encoded split, in memory; `expected`, codec and images of the run, must stand in its manifest."""

    def __init__(self, folder: Path, expected: Mapping[str, object]) -> None:
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
        shards = [_read_shard(folder / name) for name in manifest["shards"]]
        self.stored, self.labels, self.source_indices = (
            torch.cat([shard[name] for shard in shards]) for name in TENSORS
        )
        self.num_views = self.stored.shape[1]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: Int64[Tensor, " b"], view: Int64[Tensor, " b"]) -> Tensor:
        """What is stored [b ...] of these images; `view` 1 is the mirrored one."""
        return self.stored[index.to(self.stored.device), view.to(self.stored.device)]

    def to(self, device: torch.device | str) -> LatentCache:
        """Keep the cache on a device, so that no step waits for a transfer."""
        self.stored, self.labels = self.stored.to(device), self.labels.to(device)
        return self


def build_cache(
    folder: Path,
    dataset: ImageSet,
    prepare: Callable[[UInt8[Tensor, "b 3 h w"]], Tensor],
    provenance: Mapping[str, object],
    *,
    flips: bool,
    batch_size: int = 128,
    rank: int = 0,
    num_ranks: int = 1,
    wait: Callable[[], object] = lambda: None,
) -> None:
    """Encode a dataset into `folder`; shards that are there already are kept. They are dealt out over `num_ranks`
    processes, which `wait` for each other; then the first one writes the manifest, which `provenance` joins."""
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(dataset), IMAGES_PER_SHARD)
    names = [f"shard-{number:05d}.safetensors" for number in range(len(starts))]
    mine = [(start, folder / name) for start, name in list(zip(starts, names, strict=True))[rank::num_ranks]]
    missing = [(start, path) for start, path in mine if not path.exists()]
    _check_room(folder, dataset, prepare, flips)
    with tqdm(
        total=sum(min(IMAGES_PER_SHARD, len(dataset) - start) for start, _ in missing),
        desc="encoding images",
        unit="img",
        disable=rank > 0 or not missing,
    ) as bar:
        for start, path in missing:
            part = slice(start, min(start + IMAGES_PER_SHARD, len(dataset)))
            subset = Subset(dataset, range(part.start, part.stop))
            encoded = []
            for images, _ in DataLoader(subset, batch_size=batch_size):
                views = [images, images.flip(-1)] if flips else [images]
                encoded.append(torch.stack([_compact(prepare(view)) for view in views], dim=1))
                bar.update(len(images))
            shard = {
                "stored": torch.cat(encoded).contiguous(),
                "labels": dataset.labels[part].clone(),
                "source_indices": dataset.source_indices[part].clone(),
            }
            _write(path, lambda partial, shard=shard: save_file(shard, partial, metadata={"sha256": _checksum(shard)}))
    wait()
    if rank == 0:
        if absent := [name for name in names if not (folder / name).exists()]:
            raise DataError(
                f"--data.cache {folder}: {absent[0]}, which another process wrote, is not here; give a folder that all "
                "processes share, or encode with one process on each machine first"
            )
        manifest = {"format": FORMAT, **provenance, **dataset.describe(), "flips": flips, "shards": names}
        text = json.dumps(manifest, indent=2) + "\n"
        _write(folder / "manifest.json", lambda partial: partial.write_text(text))
        for left in folder.glob("*.partial"):  # of a process that was killed; or at work, on what is there now
            left.unlink(missing_ok=True)


def cache_name(expected: Mapping[str, object]) -> str:
    """A folder name of its own for each combination of codec, images and crop."""
    digest = hashlib.sha256(json.dumps([FORMAT, expected], sort_keys=True, default=str).encode()).hexdigest()
    source = Path(str(expected.get("source", "images"))).stem
    return f"{source}-{digest[:12]}"


def _compact(stored: Tensor) -> Tensor:
    """Posterior moments in half precision: their rounding is far below the posterior's own spread."""
    compact = stored.half() if stored.is_floating_point() else stored
    if not compact.isfinite().all():
        raise DataError("--autoencoder: what it makes of images is not finite in half precision; take another one")
    return compact


def _check_room(folder: Path, dataset: ImageSet, prepare: Callable, flips: bool) -> None:
    sample = _compact(prepare(dataset[0][0][None]))
    present = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    needed = sample.numel() * sample.element_size() * len(dataset) * (1 + flips) - present
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"--data.cache {folder}: encoding needs {needed / 1e6:.0f} MB, the disk has {free / 1e6:.0f} MB free; "
            "make room or give another --data.cache"
        )


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Aside, then renamed; whatever another process has brought there meanwhile is the same."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        write(partial)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        if not path.exists():
            raise DataError(
                f"--data.cache {path} cannot be written ({error}); see to the disk, or give another --data.cache"
            ) from error
    finally:
        partial.unlink(missing_ok=True)


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


def _read_shard(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            shard = {name: file.get_tensor(name) for name in TENSORS}
            checksum = (file.metadata() or {}).get("sha256")
        if checksum != _checksum(shard):
            raise OSError("its checksum is another")
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"latent cache shard {path} is damaged ({error}); delete it and {path.parent}/manifest.json"
        ) from error
    return shard


def _checksum(shard: Mapping[str, Tensor]) -> str:
    """Of names, kinds, shapes and values."""
    return hashlib.sha256(save(dict(shard))).hexdigest()


def short(value: object) -> str:
    """For messages: of long ones the beginning and a hash."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:40]}... ({hashlib.sha256(text.encode()).hexdigest()[:8]})"
