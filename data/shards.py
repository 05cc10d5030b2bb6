"""The shards of a latent cache: safetensors files with the encodings of up to 2048 images each.

A shard holds `stored` [n v ...], `labels` [n] and `source_indices` [n], and a checksum of all three. Each image has
v = 1 view or, with mirrored images, v = 2.
"""

import hashlib
import json
import os
import resource
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from jaxtyping import Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor
from tqdm import tqdm

from data.files import fingerprint
from data.layout import DataError
from machine.atomic_files import atomic_path

TENSORS = ("stored", "labels", "source_indices")
CHECKED = "checked"  # file next to the shards: their stamp when their checksums were last verified


class Rows:
    """The encodings [n v ...] of all shards, read from their files on demand; several threads may read at once.

    Files are not memory-mapped. A map would be slower (docs/performance.md), count every touched page as memory of the
    process, and turn a disk error into a signal that kills it.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        headers = [_header(path) for path in paths]
        self.dtype, (_, *row_shape), _ = headers[0]
        for path, (dtype, shape, _) in zip(paths, headers, strict=True):
            if (dtype, shape[1:]) != (self.dtype, row_shape):
                raise _damaged(path, f"it stores {dtype} {shape[1:]}, the first one {self.dtype} {row_shape}")
        self.paths, self._offsets = paths, [offset for _, _, offset in headers]
        self._ends = torch.tensor([shape[0] for _, shape, _ in headers]).cumsum(0)
        self._starts = self._ends.roll(1).index_fill(0, torch.tensor(0), 0)
        self.shape = torch.Size([int(self._ends[-1]), *row_shape])
        self._files = _open_all(paths)
        weakref.finalize(self, _close, self._files)

    def read(self, index: Int64[Tensor, " b"], *, pinned: bool = False) -> Tensor:
        """Read all views [b v ...] of images, into pinned memory if `pinned`."""
        rows = torch.empty((len(index), *self.shape[1:]), dtype=self.dtype, pin_memory=pinned)
        buffer, row_size = rows.view(torch.uint8).flatten().numpy().data, rows[:1].nbytes
        shards = torch.bucketize(index, self._ends, right=True)
        locations = zip(shards.tolist(), (index - self._starts[shards]).tolist(), strict=True)
        for i, (shard, row) in enumerate(locations):
            target = buffer[i * row_size : (i + 1) * row_size]
            try:
                num_read = os.preadv(self._files[shard], [target], self._offsets[shard] + row * row_size)
            except OSError as error:
                raise _damaged(self.paths[shard], error) from error
            if num_read < row_size:
                raise _damaged(self.paths[shard], "it has become shorter")
        return rows


def read_shard(path: Path) -> dict[str, Tensor]:
    """Load all tensors of a shard and verify its checksum."""
    shard, checksum = _read(path, *TENSORS)
    if checksum != _checksum(shard):
        raise _damaged(path, "its checksum is another")
    return shard


def read_labels(path: Path) -> dict[str, Tensor]:
    """Load `labels` and `source_indices` of a shard without verification."""
    return _read(path, "labels", "source_indices")[0]


def write_shard(path: Path, shard: Mapping[str, Tensor]) -> None:
    write_atomically(path, lambda partial: save_file(dict(shard), partial, metadata={"sha256": _checksum(shard)}))


def verify_once(paths: Sequence[Path]) -> None:
    """Verify the checksums of shards, which means reading them at 1 to 2 GB/s. Sizes and times are then recorded in a
    file next to them; as long as these stay the same, the shards are not read again."""
    folder = paths[0].parent
    current = fingerprint(folder, [path.name for path in paths])
    with suppress(OSError):
        if current and (folder / CHECKED).read_text() == current:
            return
    for path in tqdm(paths, desc="checking encoded images", unit="shard"):
        read_shard(path)
    if current:
        with suppress(DataError):  # a read-only cache is verified at every start
            write_atomically(folder / CHECKED, lambda partial: partial.write_text(current))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name and rename it; an error is ignored if another process has written it."""
    try:
        with atomic_path(path) as partial:
            write(partial)
    except (OSError, SafetensorError) as error:
        if not path.exists():
            raise DataError(
                f"--data.cache {path} cannot be written ({error}); check the disk, or give another --data.cache"
            ) from error


def _read(path: Path, *names: str) -> tuple[dict[str, Tensor], str | None]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in names}, (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error


def _header(path: Path) -> tuple[torch.dtype, list[int], int]:
    """Dtype and shape of `stored`, and its offset in the file."""
    stored = _read(path, "stored")[0]["stored"]  # memory-mapped, so only the header is read; checks the file's length
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        offset = json.loads(file.read(length))["stored"]["data_offsets"][0]
    return stored.dtype, list(stored.shape), 8 + length + offset


def _open_all(paths: Sequence[Path]) -> list[int]:
    """Open files and return their descriptors; raise the process's limit, which is often 1024, as far as needed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        needed = soft + len(paths)
        with suppress(OSError, ValueError):
            limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    files: list[int] = []
    try:
        for path in paths:
            files.append(os.open(path, os.O_RDONLY))
    except OSError as error:
        _close(files)
        raise DataError(
            f"latent cache {paths[0].parent}: of {len(paths)} shards {len(files)} could be opened ({error}); let this "
            "process open more files (`ulimit -n`)"
        ) from error
    return files


def _close(files: Sequence[int]) -> None:
    for file in files:
        os.close(file)


def _checksum(shard: Mapping[str, Tensor]) -> str:
    """Hash names, dtypes, shapes and values."""
    return hashlib.sha256(save(dict(shard))).hexdigest()


def _damaged(path: Path, why: object) -> DataError:
    return DataError(f"latent cache shard {path} is damaged ({why}); delete it and {path.parent}/manifest.json")
