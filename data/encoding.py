"""Encode a data set into a latent cache: threads decode the next images while the device encodes the current ones."""

import json
import shutil
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor
from tqdm import tqdm

from data.image_set import ImageSet
from data.latents import FORMAT
from data.layout import DataError
from data.prefetch import Prefetcher
from data.shards import write_atomically, write_shard

IMAGES_PER_SHARD = 2048
ALONE = SimpleNamespace(process_index=0, num_processes=1, wait_for_everyone=lambda: None)


def build_cache(
    folder: Path,
    dataset: ImageSet,
    prepare: Callable[[UInt8[Tensor, "b 3 h w"]], Tensor],
    provenance: Mapping[str, object],
    *,
    flips: bool,
    device: torch.device | str = "cpu",
    batch_size: int = 128,
    num_threads: int = 1,
    accelerator: Any = ALONE,
) -> None:
    """Encode a data set into `folder`. Existing shards are kept; missing ones are distributed over an
    Accelerator's processes, and the first writes the manifest, with the entries of `provenance`, when all are done.

    The composition of batches does not depend on the number of threads and processes, so the result does not either. Of
    at most `batch_size` images, mirrored ones count.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts, rank = range(0, len(dataset), IMAGES_PER_SHARD), accelerator.process_index
    names = [f"shard-{number:05d}.safetensors" for number in range(len(starts))]
    shards = [range(len(dataset))[start : start + IMAGES_PER_SHARD] for start in starts]
    assigned = list(zip(shards, names, strict=True))[rank :: accelerator.num_processes]
    missing = [(shard, folder / name) for shard, name in assigned if not (folder / name).exists()]
    num_images = max(1, batch_size // (1 + flips))  # per batch
    batches = [shard[start : start + num_images] for shard, _ in missing for start in range(0, len(shard), num_images)]

    def decode(batch: int) -> Tensor:
        images = torch.stack([dataset[index][0] for index in batches[batch]])
        return images.pin_memory() if torch.device(device).type == "cuda" else images

    decode_ahead = Prefetcher(decode, num_threads, end=len(batches))

    def encode(batch: int) -> Tensor:
        images = decode_ahead(batch).to(device, non_blocking=True)
        views = torch.stack([images, images.flip(-1)], dim=1) if flips else images[:, None]
        bar.update(len(images))
        return _compact(prepare(views.flatten(0, 1)).unflatten(0, views.shape[:2]))

    _check_disk_space(folder, dataset, lambda images: prepare(images.to(device)), flips)
    num_missing = sum(len(shard) for shard, _ in missing)
    with tqdm(total=num_missing, desc="encoding images", unit="img", disable=rank > 0 or not missing) as bar:
        encoded = map(encode, range(len(batches)))
        for shard, path in missing:
            stored = torch.cat([*islice(encoded, -(-len(shard) // num_images))]).cpu()  # the only wait for a GPU
            _check_finite(stored)
            part = slice(shard.start, shard.stop)
            labels, source_indices = dataset.labels[part].clone(), dataset.source_indices[part].clone()
            write_shard(path, {"stored": stored.contiguous(), "labels": labels, "source_indices": source_indices})
    accelerator.wait_for_everyone()
    if rank == 0:
        write_manifest(folder, {**provenance, **dataset.describe(), "flips": flips, "shards": names})


def write_manifest(folder: Path, entries: Mapping[str, Any]) -> None:
    """Write the manifest of a cache, whose shards must all be there."""
    if absent := [name for name in entries["shards"] if not (folder / name).exists()]:
        raise DataError(
            f"--data.cache {folder}: {absent[0]}, which another process wrote, is not here; give a folder that all "
            "processes share, or encode with one process on each machine first"
        )
    text = json.dumps({"format": FORMAT, **entries}, indent=2) + "\n"
    write_atomically(folder / "manifest.json", lambda partial: partial.write_text(text))


def _compact(stored: Tensor) -> Tensor:
    """Convert posterior moments to half precision, whose rounding is far below the posterior's standard deviation."""
    return stored.half() if stored.is_floating_point() else stored


def _check_finite(stored: Tensor) -> None:
    if not stored.isfinite().all():
        raise DataError("--autoencoder: what it makes of images is not finite in half precision; take another one")


def _check_disk_space(folder: Path, dataset: ImageSet, prepare: Callable, flips: bool) -> None:
    sample = _compact(prepare(dataset[0][0][None]))
    _check_finite(sample)
    present = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    needed = sample.numel() * sample.element_size() * len(dataset) * (1 + flips) - present
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"--data.cache {folder}: encoding needs {needed / 1e6:.0f} MB, the disk has {free / 1e6:.0f} MB free; "
            "make room or give another --data.cache"
        )
