"""The files of a latent cache: safetensors of some thousand images each, `stored` [n v ...], `labels` [n] and
`source_indices` [n], with a checksum of all three. `v` counts the views: 1, or 2 with mirrored images."""

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

from data.files import stamp
from data.layout import DataError
from machine.whole_files import whole

TENSORS = ("stored", "labels", "source_indices")
CHECKED = "checked"  # beside the shards: their stamp when they were found whole


class Rows:
    """What shards store of each image, [n v ...], left in their files and read by position.

    A memory map would be slower (docs/performance.md), count every page that was ever touched as the process's memory,
    and turn an error of the disk into a signal that ends the process. Threads may read at once.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        heads = [_head(path) for path in paths]
        self.dtype, (_, *each), _ = heads[0]
        for path, (dtype, shape, _) in zip(paths, heads, strict=True):
            if (dtype, shape[1:]) != (self.dtype, each):
                raise _damaged(path, f"it stores {dtype} {shape[1:]}, the first one {self.dtype} {each}")
        self.paths, self._offsets = paths, [offset for _, _, offset in heads]
        self._ends = torch.tensor([shape[0] for _, shape, _ in heads]).cumsum(0)
        self._starts = self._ends.roll(1).index_fill(0, torch.tensor(0), 0)
        self.shape = torch.Size([int(self._ends[-1]), *each])
        self._files = _open_all(paths)
        weakref.finalize(self, _close, self._files)

    def read(self, index: Int64[Tensor, " b"], *, pinned: bool = False) -> Tensor:
        """All views [b v ...] of these images, in memory that a GPU copies from by itself where it is `pinned`."""
        rows = torch.empty((len(index), *self.shape[1:]), dtype=self.dtype, pin_memory=pinned)
        content, size = rows.view(torch.uint8).flatten().numpy().data, rows[:1].nbytes
        shards = torch.bucketize(index, self._ends, right=True)
        places = zip(shards.tolist(), (index - self._starts[shards]).tolist(), strict=True)
        for number, (shard, row) in enumerate(places):
            part = content[number * size : (number + 1) * size]
            try:
                num_read = os.preadv(self._files[shard], [part], self._offsets[shard] + row * size)
            except OSError as error:
                raise _damaged(self.paths[shard], error) from error
            if num_read < size:
                raise _damaged(self.paths[shard], "it has become shorter")
        return rows


def read_shard(path: Path) -> dict[str, Tensor]:
    """Its tensors, held against its checksum."""
    shard, checksum = _read(path, *TENSORS)
    if checksum != _checksum(shard):
        raise _damaged(path, "its checksum is another")
    return shard


def read_about(path: Path) -> dict[str, Tensor]:
    """All that is not `stored`, unchecked."""
    return _read(path, "labels", "source_indices")[0]


def write_shard(path: Path, shard: Mapping[str, Tensor]) -> None:
    write_aside(path, lambda partial: save_file(dict(shard), partial, metadata={"sha256": _checksum(shard)}))


def check_once(paths: Sequence[Path]) -> None:
    """That shards are as they were written. They are read whole, at 1 to 2 GB/s, and not again as long as sizes and
    times are those that a file beside them says."""
    folder = paths[0].parent
    found = stamp(folder, [path.name for path in paths])
    with suppress(OSError):
        if found and (folder / CHECKED).read_text() == found:
            return
    for path in tqdm(paths, desc="checking encoded images", unit="shard"):
        read_shard(path)
    if found:
        with suppress(DataError):  # where nothing can be written they are checked at every start
            write_aside(folder / CHECKED, lambda partial: partial.write_text(found))


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Aside, then renamed; whatever another process has brought there meanwhile is the same."""
    try:
        with whole(path) as partial:
            write(partial)
    except (OSError, SafetensorError) as error:
        if not path.exists():
            raise DataError(
                f"--data.cache {path} cannot be written ({error}); see to the disk, or give another --data.cache"
            ) from error


def _read(path: Path, *names: str) -> tuple[dict[str, Tensor], str | None]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in names}, (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error


def _head(path: Path) -> tuple[torch.dtype, list[int], int]:
    """Of `stored`: dtype, shape, and where in the file it begins."""
    stored = _read(path, "stored")[0]["stored"]  # a map, of which nothing is read; safetensors compares its length
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        begins = json.loads(file.read(length))["stored"]["data_offsets"][0]
    return stored.dtype, list(stored.shape), 8 + length + begins


def _open_all(paths: Sequence[Path]) -> list[int]:
    """Descriptors; a process may have 1024 files open by default, and more if it asks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        more = soft + len(paths)
        with suppress(OSError, ValueError):
            limit = more if hard == resource.RLIM_INFINITY else min(more, hard)
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
    """Of names, kinds, shapes and values."""
    return hashlib.sha256(save(dict(shard))).hexdigest()


def _damaged(path: Path, why: object) -> DataError:
    return DataError(f"latent cache shard {path} is damaged ({why}); delete it and {path.parent}/manifest.json")
