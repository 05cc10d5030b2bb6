"""What keeps a download from hanging where there is no network."""

import contextlib
import socket
from collections.abc import Iterator
from urllib.request import Request, urlopen


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
