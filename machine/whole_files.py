"""Files that are whole or absent, whatever kills the process."""

import errno
import glob
import hashlib
import itertools
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of disks


def inside(folder: Path, name: str, flag: str) -> Path:
    """The path of this name below a folder; one that leads out of it is refused in the words of the flag."""
    path = Path(os.path.normpath(folder / name))
    if "\0" in name or Path(os.path.normpath(folder)) not in path.parents:
        raise ValueError(f"{flag}: the name {name!r} leads out of {folder}; it may have no '..' and no leading '/'")
    return path


def check_empty(folder: Path, flag: str) -> None:
    """That nothing lies where a folder is to be written; else a FileExistsError in the words of the flag."""
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{flag} {folder} is not empty; give another folder or delete it")


def write_whole(path: Path, text: str) -> None:
    """Write beside the file, then rename."""
    with whole(path) as partial:
        partial.write_text(text)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path of the same name, to write a file or a folder to, which takes its place at the end. It lies in a folder of
    each writer's own; what a killed one left behind is removed."""
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
        (aside / path.name).replace(path)
    except OSError as error:
        if error.errno in FULL:  # of a write, which knows no name, or of the folder, whose name says little
            raise OSError(error.errno, f"{path} could not be written ({error.strerror}); make room") from error
        raise
    finally:
        _remove(aside)


def beside(path: Path) -> Path:
    """A name of this moment for what lies there and is to be kept; free, whatever the clock says."""
    name = f"{path.name}.before-{time.strftime('%Y%m%d-%H%M%S')}"
    free = (path.with_name(f"{name}{f'-{number}' if number else ''}") for number in itertools.count())
    return next(kept for kept in free if not kept.exists() and not kept.is_symlink())


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(path: Path) -> None:
    is_folder = path.is_dir() and not path.is_symlink()
    shutil.rmtree(path, ignore_errors=True) if is_folder else path.unlink(missing_ok=True)
