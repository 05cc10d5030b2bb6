"""Downloads that do not hang where there is no network, and are whole or absent."""

import contextlib
import socket
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

from machine.whole_files import whole


@contextlib.contextmanager
def network_timeout(seconds: float) -> Iterator[None]:
    """torch.hub opens its URLs without a timeout: where packets vanish it would wait for minutes."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def hub_answers(seconds: float = 3.0) -> bool:
    """Whether the Hugging Face hub is within reach; asked first, because its client tries each file for 24 s."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=seconds):
            return True
    except OSError:
        return False


def download(url: str, name: str, flag: str) -> Path:
    """A public file, kept by this name in torch hub's folder; a ValueError of one line where it cannot be had."""
    import torch  # here, as `doctor.py --help` reads this module

    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.is_file():
        return path
    try:
        with network_timeout(seconds=10.0):
            with urlopen(Request(url, method="HEAD")) as reply:
                length = reply.headers.get("Content-Length")
            with whole(path) as arriving:
                torch.hub.download_url_to_file(url, str(arriving))
                if length is not None and arriving.stat().st_size != int(length):
                    raise OSError("it was cut short")
    except (OSError, HTTPException) as error:
        raise ValueError(f"{flag}: {url} cannot be downloaded ({error}); put the file into {path.parent}") from error
    return path
