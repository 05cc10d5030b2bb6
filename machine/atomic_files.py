"""Atomic writes: a file is complete or absent, even if the process is killed."""

import errno
import filecmp
import glob
import hashlib
import itertools
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def join_inside(folder: Path, name: str, flag: str) -> Path:
    """Join a name to a folder. Raises ValueError, naming the flag, if the path leads out of the folder."""
    path = Path(os.path.normpath(folder / name))
    if "\0" in name or Path(os.path.normpath(folder)) not in path.parents:
        raise ValueError(f"{flag}: the name {name!r} leads out of {folder}; it may have no '..' and no leading '/'")
    return path


def check_empty(folder: Path, flag: str) -> None:
    """Raise FileExistsError, naming the flag, if the folder exists and is not empty."""
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{flag} {folder} is not empty; give another folder or delete it")


def write_atomic(path: Path, text: str, *, keep: bool = False) -> None:
    with atomic_path(path, keep=keep) as partial:
        partial.write_text(text)


@contextmanager
def atomic_path(path: Path, *, keep: bool = False) -> Iterator[Path]:
    """Context that yields a temporary path to write a file or folder to, and moves it into place at the end. The path
    lies in a temporary folder of this writer; leftovers of killed writers are removed.

    With `keep`, another file that is there is kept, see `keeping`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside, host = f".{path.name}.", re.sub(r"[^\w-]", "-", socket.gethostname())
    for left_over in path.parent.glob(f"{glob.escape(beside)}*.partial"):
        writer = re.fullmatch(rf"{host}\.(\d+)\.\w+\.partial", left_over.name.removeprefix(beside))
        if writer and not psutil.pid_exists(int(writer[1])):
            _remove(left_over)
    aside = path.with_name(f"{beside}{host}.{os.getpid()}.{uuid.uuid4().hex[:8]}.partial")
    try:
        aside.mkdir()
        yield aside / path.name
        with keeping([path] if keep else []):
            (aside / path.name).replace(path)
    except OSError as error:
        if error.errno in DISK_FULL:  # the error names no file, or only our temporary one
            raise OSError(error.errno, f"{path} could not be written ({error.strerror}); make room") from error
        raise
    finally:
        _remove(aside)


@contextmanager
def keeping(paths: Iterable[Path]) -> Iterator[None]:
    """Context that writes to these paths, or not. Files and folders that were there are kept as `NAME.before-TIME`,
    which is printed, unless they are empty or the same file is written again. After an error, those not yet written
    have their names back."""
    kept = {path: path.rename(unused_path(path)) for path in paths if _holds_anything(path)}
    failed = True
    try:
        yield
        failed = False
    finally:
        for path, before in kept.items():
            if failed and not path.exists():
                before.rename(path)
            elif path.is_file() and filecmp.cmp(path, before, shallow=False):
                before.unlink()
            else:
                print(f"{path}: what was there is now {before}", flush=True)


def _holds_anything(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.is_file() and path.stat().st_size > 0


def unused_path(path: Path) -> Path:
    """An unused path, named by the time, to which an existing file can be moved to keep it."""
    name = f"{path.name}.before-{time.strftime('%Y%m%d-%H%M%S')}"
    free = (path.with_name(f"{name}{f'-{number}' if number else ''}") for number in itertools.count())
    return next(kept for kept in free if not kept.exists() and not kept.is_symlink())


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(path: Path) -> None:
    is_folder = path.is_dir() and not path.is_symlink()
    shutil.rmtree(path, ignore_errors=True) if is_folder else path.unlink(missing_ok=True)
