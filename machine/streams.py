"""Standard streams that end no program: hours of work are worth more than the words about them."""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

GONE = (errno.EPIPE, errno.EIO)  # the reader of a pipe, or a terminal


class Tolerant:
    """A text stream that escapes what its encoding lacks, and ignores errors, such as those of a closed pipe, a closed
    terminal or a full disk. Everything else is the stream's."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, output: Any, *text: str) -> None:
        try:
            output(*text)
        except OSError as error:
            if error.errno in GONE:
                with suppress(OSError), Path(os.devnull).open("wb") as nowhere:  # for what is buffered, and the end
                    os.dup2(nowhere.fileno(), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def tolerant_streams() -> Iterator[None]:
    """Context in which standard output and error are `Tolerant`."""
    with ExitStack() as stack:
        streams = (redirect_stdout, sys.stdout), (redirect_stderr, sys.stderr)
        for redirect, stream in ((redirect, stream) for redirect, stream in streams if stream is not None):
            tolerant: Any = Tolerant(stream)
            stack.enter_context(redirect(tolerant))
            stack.callback(tolerant.flush)
        yield
