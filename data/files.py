"""The files of a dataset: a folder's, a zip's or those in tar files, by their paths from its root."""

import hashlib
import os
import stat
import tarfile
import time
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.layout import DataError
from data.pixels import SUFFIXES
from machine.whole_files import write_whole

MOST_BYTES = 2**30  # of one file
READ = SUFFIXES | {".tar"}
NAMES = "classnames.txt"  # beside tar shards: a class a line, from that of number 0
KEPT, LONG = "latent-diffusion-backbones/hashes", 2.0  # of folders, below the user's cache, that took so many seconds
SETTLED = 10 * 10**9  # nanoseconds since the last change, more than any file system's grain


class Folder:
    """Links are followed; an image, a shard or a folder that is there already, by another name, is in `repeated`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[str] = []
        self.repeated: list[str] = []
        seen: set[tuple[int, int]] = set()
        places, links = [path], []  # links come last: what lies there itself keeps its name
        while places or links:
            place = places.pop() if places else links.pop(0)
            name = place.relative_to(path).as_posix()
            try:
                status = place.stat()
            except OSError:  # a link to nothing: told of where it is read
                self.names.append(name)
                continue
            if stat.S_ISDIR(status.st_mode) or place.suffix.lower() in READ:
                if (status.st_dev, status.st_ino) in seen:
                    self.repeated.append(name)
                    continue
                seen.add((status.st_dev, status.st_ino))
            if stat.S_ISDIR(status.st_mode):
                below = sorted((one for one in os.scandir(place) if one.name[0] != "."), key=lambda one: one.name)
                links += [Path(entry.path) for entry in below if entry.is_symlink()]
                places += [Path(entry.path) for entry in reversed(below) if not entry.is_symlink()]
            else:
                self.names.append(name)

    def read(self, name: str) -> bytes:
        path = self.path / name
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is no regular file")
        _check_size(status.st_size)
        return path.read_bytes()

    def stamp(self, names: Sequence[str]) -> str | None:
        """Differs where any of these files does; see `stamp` below."""
        return stamp(self.path, names, of=str(self.path.resolve()))

    def checksum(self, name: str) -> tuple[int, int]:
        """Size and CRC; a file that cannot be read counts as empty, and is told of where it is used."""
        try:
            content = self.read(name)
        except OSError:
            content = b""
        return len(content), zlib.crc32(content)


class Zip:
    """A zip, opened anew in each process that reads it: a shared handle would share its file position."""

    def __init__(self, path: Path) -> None:
        self.path, self.repeated = path, []
        self._handle: tuple[int, zipfile.ZipFile] | None = None
        try:
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
        except Exception as error:  # a damaged directory raises whatever its numbers lead to
            raise DataError(f"--data.path {path}: neither a folder nor a whole zip file ({error})") from error
        self.entries: dict[str, zipfile.ZipInfo] = {}
        for entry in entries:
            name = entry.filename.replace("\\", "/")  # as Windows writes them
            if not name.endswith("/") and self.entries.setdefault(plain(name), entry) is not entry:
                raise DataError(f"--data.path {path}: it holds {name} twice; write it anew")
        self.names = list(self.entries)

    def read(self, name: str) -> bytes:
        if self._handle is None or self._handle[0] != os.getpid():
            self._handle = (os.getpid(), zipfile.ZipFile(self.path))
        _check_size(self.entries[name].file_size)
        return self._handle[1].read(self.entries[name])

    def checksum(self, name: str) -> tuple[int, int]:
        return self.entries[name].file_size, self.entries[name].CRC

    def stamp(self, names: Sequence[str]) -> str | None:
        """None: its directory has every file's CRC."""
        return None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_handle": None}


class Tars:
    """Tar files below a folder, or one, in the order of their names: `shard.tar/cat.jpg` is a file in the first. Their
    headers are read once, front to back; what they hold is read where it lies."""

    def __init__(
        self, path: Path, shards: Sequence[str], beside: Sequence[str] = (), repeated: Sequence[str] = ()
    ) -> None:
        self.path, self.shards, self.beside = path, list(shards), list(beside)
        paths = [self._of(number) for number in range(len(self.shards))]
        # By name: number of the shard, offset and size in it. Both splits ask for them.
        self.places, links = _places(tuple(zip(paths, self.shards, map(_changed, paths), strict=True)))
        self.repeated = [*repeated, *links]
        self.names = list(self.places)

    def _of(self, number: int) -> Path:
        return self.path / self.shards[number] if self.path.is_dir() else self.path

    def read(self, name: str) -> bytes:
        number, offset, size = self.places[name]
        _check_size(size)
        with self._of(number).open("rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise OSError("its shard ends before it")
        return content

    def stamp(self, names: Sequence[str]) -> str | None:
        """As a folder's, of all shards: it stands for whatever they hold."""
        shards, named = (self.shards, self.path) if self.path.is_dir() else ([self.path.name], self.path.parent)
        return stamp(named, shards, of="\n".join([str(self.path.resolve()), *names]))

    def checksum(self, name: str) -> tuple[int, int]:
        content = self.read(name)
        return len(content), zlib.crc32(content)


@lru_cache(maxsize=1)
def _places(
    shards: tuple[tuple[Path, str, tuple[int, ...]], ...],
) -> tuple[dict[str, tuple[int, int, int]], list[str]]:
    """Of files, and the names of images that are links to others."""
    places: dict[str, tuple[int, int, int]] = {}
    links: list[str] = []
    for number, (path, shard, _) in enumerate(tqdm(shards, desc="reading shards", leave=False)):
        try:
            with tarfile.open(path, "r:") as archive:
                for entry in archive:
                    name = f"{shard}/{plain(entry.name)}"
                    if name in places:
                        raise DataError(f"--data.path {path}: it holds {entry.name} twice; write it anew")
                    if entry.issparse():
                        raise tarfile.ReadError(f"{entry.name} is stored in parts, as a sparse file")
                    if entry.isreg():
                        places[name] = (number, entry.offset_data, entry.size)
                    elif entry.islnk() or entry.issym():
                        links += [name] * (Path(name).suffix.lower() in SUFFIXES)
                _check_end(archive)
        except (tarfile.TarError, OSError) as error:
            raise DataError(
                f"--data.path {path}: not a whole, uncompressed tar file ({error}); fetch it again, or unpack it"
            ) from error
    return places, links


def _check_end(archive: tarfile.TarFile) -> None:
    """Behind a header that is damaged or cut short tarfile reads on no further, and says nothing."""
    file: Any = archive.fileobj
    file.seek(archive.offset)
    rest = iter(partial(file.read, 2**20), b"")
    first = next(rest, b"")
    if len(first) < tarfile.BLOCKSIZE or any(map(any, chain([first], rest))):
        raise tarfile.ReadError(f"at byte {archive.offset} there is neither a file's header nor the end")


def _changed(path: Path) -> tuple[int, ...]:
    with suppress(OSError):  # a link to nothing, which is told of where it is opened
        status = path.stat()
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns
    return ()


def open_files(path: Path) -> Folder | Zip | Tars:
    if path.is_dir():
        folder = Folder(path)
        shards = sorted(name for name in folder.names if name.lower().endswith(".tar"))
        holds_images = any(Path(name).suffix.lower() in SUFFIXES for name in folder.names)
        if not shards or holds_images:
            return folder
        return Tars(path, shards, sorted({*folder.names} - {*shards, NAMES}), folder.repeated)
    if path.is_file():
        kinds = [suffix.lower() for suffix in path.suffixes]
        if kinds[-1:] == [".tgz"] or ".tar" in kinds[:-1]:
            raise DataError(f"--data.path {path}: a compressed tar file is read from its front alone; decompress it")
        return Tars(path, [path.name]) if kinds[-1:] == [".tar"] else Zip(path)
    raise DataError(
        f"--data.path {path}: is neither a folder nor a file; give a folder, a zip or tar shards of images, or 'shapes'"
    )


def plain(name: str) -> str:
    """Without what says nothing: `./cat//0.png`, as some archivers write it, is no hidden file."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def stamp(folder: Path, names: Sequence[str], of: str = "") -> str | None:
    """Differs where any of these files does, as sizes and times tell; None where one is missing, or so new that it may
    change again at the same time."""
    digest, newest = hashlib.sha256(of.encode()), 0
    for name in names:
        try:
            status = (folder / name).stat()
        except OSError:
            return None
        digest.update(f"{name}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}\n".encode())
        newest = max(newest, status.st_mtime_ns, status.st_ctime_ns)
    return digest.hexdigest() if newest < time.time_ns() - SETTLED else None


def content_hash(files: Folder | Zip | Tars, names: Sequence[str]) -> str:
    """Of these files: the same for a folder and for a zip of it. What took long is kept, and taken again as long as no
    file of the folder, or shard, has another size or time."""
    began, digest, kept = time.monotonic(), hashlib.sha256(), None
    if found := files.stamp(names):
        with suppress(RuntimeError):  # of a user without a home
            kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", KEPT, found)
    if kept:
        with suppress(OSError, ValueError):
            if len(bytes.fromhex(text := kept.read_text())) == digest.digest_size:  # else it was cut short
                return text
    is_read = True
    for name in names:
        num_bytes, checksum = files.checksum(name)
        digest.update(f"{name}:{num_bytes}:{checksum:08x}\n".encode())
        is_read &= num_bytes > 0
    if kept and is_read and time.monotonic() - began > LONG:
        with suppress(OSError):  # where nothing can be kept it takes long again
            write_whole(kept, digest.hexdigest())
    return digest.hexdigest()


def _check_size(num_bytes: int) -> None:
    if num_bytes > MOST_BYTES:
        raise OSError(f"it has {num_bytes / 2**30:.1f} GiB, more than any image")
