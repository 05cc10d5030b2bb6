"""A lock that lets one process at a time use a folder."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def taking_turns(folder: Path) -> Iterator[None]:
    """Context that one process at a time is in, for each folder; without locks in the file system, all are."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class InUseError(ValueError):
    """Another process holds the lock."""


class Lock:
    """An exclusive lock on a file. If another process holds it, raises InUseError, or `waits`. The system releases
    it when its last holder ends: children may inherit `file`, so that a training which outlives its parent keeps it."""

    def __init__(self, path: Path, *, waits: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.file = path, path.open("a+")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            self.file.seek(0)
            holder = self.file.read().strip() or "another process"
            self.file.close()
            raise InUseError(f"{path.parent} is in use by {holder} (or what it started): wait, or stop it") from None
        except OSError as error:  # the file system has no locks
            print(f"warning: {path} could not be locked ({error}): start nothing else in this folder", flush=True)
        self.file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self.file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
        self.file.flush()

    def __enter__(self) -> Lock:
        return self

    def remove_if_unused(self) -> None:
        """Delete the folder if it holds nothing but this file."""
        if [*self.path.parent.iterdir()] == [self.path]:
            self.path.unlink()
            with suppress(OSError):  # something was added in the meantime
                self.path.parent.rmdir()

    def __exit__(self, *_: object) -> None:
        self.file.truncate(0)
        self.file.close()
