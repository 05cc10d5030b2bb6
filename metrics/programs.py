"""Networks that carry their own code, in either of torch's formats, told apart by the file's suffix.

`.pt2` is a program of torch.export, any other name a TorchScript file. Both are programs: run only what you trust.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor, nn

from metrics.exported import load_exported, save_exported
from metrics.torchscript import load_torchscript, save_torchscript


def load_program(path: str | Path) -> nn.Module:
    """The network in a file, on the CPU, as it is used rather than trained.

    Raises:
        ValueError: if the file is not what its suffix says, in one line.
    """
    return load_exported(path) if _is_exported(path) else load_torchscript(path)


def save_program(module: nn.Module, example: Tensor, path: str | Path) -> Path:
    """Write a module of images [n c h w], of any n, h and w; a reader sees the whole file or none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save = save_exported if _is_exported(path) else save_torchscript
    with TemporaryDirectory(dir=path.parent, prefix=".") as folder:  # both formats write the file's name into the file
        save(module, example, Path(folder) / path.name).replace(path)
    return path


def _is_exported(path: str | Path) -> bool:
    return Path(path).suffix == ".pt2"
