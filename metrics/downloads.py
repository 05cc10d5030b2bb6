"""Downloads that time out without a network, and are written atomically."""

import contextlib
import socket
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

from machine.atomic_files import atomic_path


@contextlib.contextmanager
def network_timeout(seconds: float) -> Iterator[None]:
    """A context with a timeout for sockets. torch.hub sets none, and would wait for minutes without a network."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def hub_answers() -> bool:
    """Whether the Hugging Face hub is reachable. Ask this first, because its client retries each file for 24 s."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=3.0):
            return True
    except OSError:
        return False


def download(url: str, name: str, flag: str) -> Path:
    """Download a public file to torch hub's cache, unless it is there; an error's sentence begins with `flag`."""
    import torch  # not at the top: `doctor.py --help` imports this module

    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.is_file():
        return path
    try:
        with network_timeout(seconds=10.0):
            with urlopen(Request(url, method="HEAD")) as reply:
                length = reply.headers.get("Content-Length")
            with atomic_path(path) as partial:
                torch.hub.download_url_to_file(url, str(partial))
                if length is not None and partial.stat().st_size != int(length):
                    raise OSError("it was cut short")
    except (OSError, HTTPException) as error:
        raise ValueError(f"{flag}: {url} cannot be downloaded ({error}); put the file into {path.parent}") from error
    return path
