"""Access to the files of a data set in a folder, a zip or tar files, by their paths relative to its root."""

import hashlib
import os
import re
import stat
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.layout import DataError
from data.pixels import SUFFIXES
from machine.atomic_files import write_atomic

MAX_BYTES = 2**30  # per file
NAMES = "classnames.txt"  # next to tar shards: the names of the classes, one per line, starting with class 0
HASH_CACHE = "latent-diffusion-backbones/hashes"  # below the user's cache folder
SLOW_SECONDS = 2.0  # hashes and counts that take longer are kept there
SETTLED = 10 * 10**9  # nanoseconds after which a file's times tell changes apart on any file system


class Folder:
    """The files of a folder, through links; images, shards and folders reached before are listed in `repeated`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[str] = []
        self.repeated: list[str] = []
        seen: set[tuple[int, int]] = set()
        paths, links = [path], []  # links come last, so that a file is listed under its own name
        while paths or links:
            current = paths.pop() if paths else links.pop(0)
            name = current.relative_to(path).as_posix()
            try:
                status = current.stat()
            except OSError:  # a dangling link, which is reported when it is read
                self.names.append(name)
                continue
            if stat.S_ISDIR(status.st_mode) or current.suffix.lower() in SUFFIXES | {".tar", ".parquet"}:
                if (status.st_dev, status.st_ino) in seen:
                    self.repeated.append(name)
                    continue
                seen.add((status.st_dev, status.st_ino))
            if stat.S_ISDIR(status.st_mode):
                visible = (entry for entry in os.scandir(current) if not entry.name.startswith("."))
                entries = sorted(visible, key=lambda entry: entry.name)
                links += [Path(entry.path) for entry in entries if entry.is_symlink()]
                paths += [Path(entry.path) for entry in reversed(entries) if not entry.is_symlink()]
            else:
                self.names.append(name)

    def read(self, name: str) -> bytes:
        path = self.path / name
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is no regular file")
        check_size(status.st_size)
        return path.read_bytes()

    def stamp(self, names: Sequence[str]) -> str | None:
        """Identify the state of these files; see `fingerprint` below."""
        return fingerprint(self.path, names, of=str(self.path.resolve()))

    def checksum(self, name: str) -> tuple[int, int]:
        """Size and CRC. A file that cannot be read counts as empty; the error is reported when it is used."""
        try:
            content = self.read(name)
        except OSError:
            content = b""
        return len(content), zlib.crc32(content)


class Zip:
    """The files of a zip. Each process opens it for itself, because a shared handle would share its file position."""

    def __init__(self, path: Path) -> None:
        self.path, self.repeated = path, []
        self._handle: tuple[int, zipfile.ZipFile] | None = None
        try:
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
        except Exception as error:  # zipfile raises all kinds of errors at a damaged directory
            raise DataError(f"--data.path {path}: neither a folder nor a whole zip file ({error})") from error
        self.entries: dict[str, zipfile.ZipInfo] = {}
        for entry in entries:
            name = entry.filename.replace("\\", "/")  # which Windows programs write
            if not name.endswith("/") and self.entries.setdefault(_normalise(name), entry) is not entry:
                raise DataError(f"--data.path {path}: it contains {name} twice; write it again")
        self.names = list(self.entries)

    def read(self, name: str) -> bytes:
        if self._handle is None or self._handle[0] != os.getpid():
            self._handle = (os.getpid(), zipfile.ZipFile(self.path))
        check_size(self.entries[name].file_size)
        return self._handle[1].read(self.entries[name])

    def checksum(self, name: str) -> tuple[int, int]:
        return self.entries[name].file_size, self.entries[name].CRC

    def stamp(self, names: Sequence[str]) -> str | None:
        """None, as hashing a zip is fast: its directory holds every file's CRC."""
        return None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_handle": None}


class Tars:
    """The files in tar shards, which are listed as `shard.tar/cat.jpg`. All headers are read once, from front to back;
    contents are read in place.

    Args:
        path: the folder of the shards, or a single tar file
        beside: other files in the folder
        repeated: links to shards that are listed already
    """

    def __init__(
        self, path: Path, shards: Sequence[str], beside: Sequence[str] = (), repeated: Sequence[str] = ()
    ) -> None:
        self.path, self.shards, self.beside = path, list(shards), list(beside)
        paths = [self._shard(index) for index in range(len(self.shards))]
        self.locations, links = _index(tuple(zip(paths, self.shards, map(version, paths), strict=True)))
        self.repeated = [*repeated, *links]
        self.names = list(self.locations)

    def _shard(self, index: int) -> Path:
        return self.path / self.shards[index] if self.path.is_dir() else self.path

    def read(self, name: str) -> bytes:
        shard, offset, size = self.locations[name]
        check_size(size)
        with self._shard(shard).open("rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise OSError("its shard ends before it")
        return content

    def stamp(self, names: Sequence[str]) -> str | None:
        """Identify the state of all shards, whichever files are asked for."""
        shards, folder = (self.shards, self.path) if self.path.is_dir() else ([self.path.name], self.path.parent)
        return fingerprint(folder, shards, of="\n".join([str(self.path.resolve()), *names]))

    def checksum(self, name: str) -> tuple[int, int]:
        content = self.read(name)
        return len(content), zlib.crc32(content)


@lru_cache(maxsize=1)  # as both splits read the same shards
def _index(shards: tuple[tuple[Path, str, tuple[int, ...]], ...]) -> tuple[dict[str, tuple[int, int, int]], list[str]]:
    """Locate files in shards (path, name, version): shard, offset and size by name; also list images that are links."""
    locations: dict[str, tuple[int, int, int]] = {}
    links: list[str] = []
    for index, (path, shard, _) in enumerate(tqdm(shards, desc="reading shards", leave=False)):
        try:
            with tarfile.open(path, "r:") as archive:
                for entry in archive:
                    name = f"{shard}/{_normalise(entry.name)}"
                    if name in locations:
                        raise DataError(f"--data.path {path}: it contains {entry.name} twice; write it again")
                    if entry.issparse():
                        raise tarfile.ReadError(f"{entry.name} is stored in parts, as a sparse file")
                    if entry.isreg():
                        locations[name] = (index, entry.offset_data, entry.size)
                    elif entry.islnk() or entry.issym():
                        links += [name] * (Path(name).suffix.lower() in SUFFIXES)
                _check_end(archive)
        except (tarfile.TarError, OSError) as error:
            raise DataError(
                f"--data.path {path}: not a whole, uncompressed tar file ({error}); fetch it again, or unpack it"
            ) from error
    return locations, links


def _check_end(archive: tarfile.TarFile) -> None:
    """Raise ReadError unless the archive was read to its end, as tarfile stops silently at a damaged header."""
    file: Any = archive.fileobj
    file.seek(archive.offset)
    rest = iter(partial(file.read, 2**20), b"")
    first = next(rest, b"")
    if len(first) < tarfile.BLOCKSIZE or any(map(any, chain([first], rest))):
        raise tarfile.ReadError(f"at byte {archive.offset} there is neither a file's header nor the end")


def version(path: Path) -> tuple[int, ...]:
    """Size and times of a file, which change with its content."""
    with suppress(OSError):  # of a dangling link, which is reported when it is opened
        status = path.stat()
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns
    return ()


def _normalise(name: str) -> str:
    """Drop empty parts and `.` from a path: some archivers write `./cat//0.png`, which would count as hidden."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def fingerprint(folder: Path, names: Sequence[str], of: str = "") -> str | None:
    """Hash sizes and times of files, and `of`; None if a file is missing, or too new for its times to tell."""
    digest, newest = hashlib.sha256(of.encode()), 0
    for name in names:
        try:
            status = (folder / name).stat()
        except OSError:
            return None
        digest.update(f"{name}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}\n".encode())
        newest = max(newest, status.st_mtime_ns, status.st_ctime_ns)
    return digest.hexdigest() if newest < time.time_ns() - SETTLED else None


def content_hash(files: Any, names: Sequence[str]) -> str:
    """Hash the content of files; the result is the same for a folder and a zip of it. If all can be read, it is kept
    (`remember`) as long as no file or shard changes its size or times."""

    def compute() -> tuple[str, bool]:
        digest, all_readable = hashlib.sha256(), True
        for name in names:
            num_bytes, checksum = files.checksum(name)
            digest.update(f"{name}:{num_bytes}:{checksum:08x}\n".encode())
            all_readable &= num_bytes > 0
        return digest.hexdigest(), all_readable

    return remember(files.stamp(names), compute, pattern="[0-9a-f]{64}")


def remember(key: str | None, compute: Callable[[], tuple[str, bool]], *, pattern: str) -> str:
    """Return the text that `compute` gives, with whether it may be kept. If it took long, it is kept under the key in
    the user's cache folder and not computed again, unless the file no longer matches the pattern."""
    path, start = None, time.monotonic()
    if key:
        with suppress(RuntimeError):  # if the user has no home
            path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", HASH_CACHE, key)
    if path:
        with suppress(OSError, ValueError):
            if re.fullmatch(pattern, text := path.read_text()):
                return text
    text, may_keep = compute()
    if path and may_keep and time.monotonic() - start > SLOW_SECONDS:
        with suppress(OSError):  # the cache is optional
            write_atomic(path, text)
    return text


def check_size(num_bytes: int) -> None:
    if num_bytes > MAX_BYTES:
        raise OSError(f"it has {num_bytes / 2**30:.1f} GiB, more than any image")
