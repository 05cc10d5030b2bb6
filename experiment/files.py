"""Files that are whole or absent, whatever kills the process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def inside(folder: Path, name: str, flag: str) -> Path:
    """The path of this name, which the flag gave or leads to, below a folder.

    Raises:
        ValueError: for a name that leads out of it, or to the folder itself.
    """
    path = Path(os.path.normpath(folder / name))
    if "\0" in name or Path(os.path.normpath(folder)) not in path.parents:
        raise ValueError(f"{flag}: the name {name!r} leads out of {folder}; it may have no '..' and no leading '/'")
    return path


def write_whole(path: Path, text: str) -> None:
    """Write beside the file, then rename."""
    with whole(path) as partial:
        partial.write_text(text)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside, to write a file or a folder to, which takes its place at the end and is gone where that is not
    reached."""
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True) if partial.is_dir() else partial.unlink(missing_ok=True)
