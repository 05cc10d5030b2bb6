"""TorchScript files: networks that carry their own code, without Python's pickles.

torch deprecates the format in favour of torch.export's (`metrics.exported`); it stays the field's format for
feature extractors (StyleGAN's, CLIP's), and torch still reads and writes it. Its deprecation warnings are
silenced here, around these calls alone.
"""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn


def load_torchscript(path: str | Path) -> nn.Module:
    """The module in a file, on the CPU and in eval mode.

    Raises:
        ValueError: if the file is not TorchScript.
    """
    try:
        with _without_deprecation():
            return torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path}: not a TorchScript file, or cut short (torch.export's files end in .pt2)") from error


def save_torchscript(module: nn.Module, example: Tensor, path: str | Path) -> Path:
    """Trace a module on an example input and write it."""
    with _without_deprecation():
        torch.jit.save(torch.jit.trace(module, example), str(path))
    return Path(path)


@contextlib.contextmanager
def _without_deprecation() -> Iterator[None]:
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):  # which of them depends on torch's version
            warnings.filterwarnings("ignore", message=r"`?torch\.jit\.", category=category)
        yield
