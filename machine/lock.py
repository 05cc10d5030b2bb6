"""One program a folder."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from contextlib import suppress
from pathlib import Path


class InUse(ValueError):
    """Somebody else holds the lock."""


class Lock:
    """A file that one process holds; InUse says which, unless it `waits`. The system lets go of it with its last
    holder: `file` may be handed on to children, so that a training that outlives its runner keeps its folder."""

    def __init__(self, path: Path, *, waits: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.file = path, path.open("a+")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            self.file.seek(0)
            holder = self.file.read().strip() or "another process"
            self.file.close()
            raise InUse(f"{path.parent} is in use by {holder} (or what it started): wait, or stop it") from None
        except OSError as error:  # a file system without locks
            print(f"warning: {path} could not be locked ({error}): start nothing else in this folder", flush=True)
        self.file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self.file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
        self.file.flush()

    def __enter__(self) -> Lock:
        return self

    def leave_no_trace(self) -> None:
        """Delete the folder if it holds nothing but this file."""
        if [*self.path.parent.iterdir()] == [self.path]:
            self.path.unlink()
            with suppress(OSError):  # something was added in the meantime
                self.path.parent.rmdir()

    def __exit__(self, *_: object) -> None:
        self.file.truncate(0)
        self.file.close()
