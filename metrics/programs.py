"""Networks stored with their code: torch.export programs (`.pt2`) and TorchScript.

Both may call any operation of torch, including those that read files, so run only what you trust. Moreover,
`torch.export.load` (2.9 to 2.14) opens pickles with `weights_only=False`. A plain network has no pickle except example
inputs, which are tensors; an archive with another pickle, or with compiled code, is refused before it is loaded.
"""

import contextlib
import io
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.passes import move_to_device_pass
from torch.export.pt2_archive import PT2ArchiveReader

from machine.atomic_files import atomic_path

SIZES = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}  # dynamic axes of images [n c h w]
CLASSES = "classes.json"  # file of a classifier's archive: the names of its classes
HOW = "torch.export.export(module.eval(), (images,), dynamic_shapes=({0: D, 2: D, 3: D},)), D = Dim.DYNAMIC"
PLAIN = re.compile(  # names in the archive of a plain network; `sample_inputs` is the only pickle
    r"models/model\.json|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)|data/sample_inputs/model\.pt"
    r"|archive_format|archive_version|byteorder|version|\.data/\w+|extra/.*"
)


def load_program(path: str | Path) -> nn.Module:
    """Load a network on the CPU in eval mode; raise `ValueError` if the file is not what its suffix says."""
    if Path(path).suffix == ".pt2":
        return load_exported(path)
    try:
        with _quiet():
            return torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path}: not a TorchScript file, or cut short (torch.export's files end in .pt2)") from error


def class_names(path: str | Path) -> list[str]:
    """Names of the classes that a saved classifier distinguishes, in its order; empty if the file has none."""
    with zipfile.ZipFile(path) as archive:
        found = [name for name in archive.namelist() if name.endswith(f"/extra/{CLASSES}")]
        return json.loads(archive.read(found[0])) if found else []


def save_program(module: nn.Module, example: Tensor, path: str | Path, classes: Sequence[str] = ()) -> Path:
    """Save a module that takes images [n c h w] of any n, h and w, in the format of the path's suffix; of a classifier
    also the names of its `classes`. Another file of that name is kept, as scores may name its hash."""
    extra = {CLASSES: json.dumps(list(classes))} if classes else {}
    with atomic_path(Path(path), keep=True) as partial:
        if partial.suffix == ".pt2":
            save_exported(torch.export.export(module, (example,), dynamic_shapes=(SIZES,)), partial, extra)
        else:
            with _quiet():
                torch.jit.save(torch.jit.trace(module, example), str(partial), _extra_files=extra)
    return Path(path)


def save_exported(program: ExportedProgram, path: Path, extra: dict[str, str] | None = None) -> None:
    """Save a program and `extra` files, without stack traces, which contain paths of this machine."""
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    torch.export.save(program, str(path), extra_files=extra)


class ExportedNetwork(nn.Module):
    """A loaded program that takes a batch of images. Moving it also changes the devices in the program's graph."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        self.program, self.device = program, torch.device("cpu")
        self.network = program.module().requires_grad_(False)
        self.sizes = _input_sizes(program)

    def forward(self, images: Tensor) -> Any:
        for axis, name in ((2, "height"), (3, "width")):
            fixed, size = self.sizes[axis], images.shape[axis]
            if fixed not in (None, size):
                raise ValueError(f"it was exported for a {name} of {fixed}, and here it is {size}: export it by {HOW}")
        return self.network(images)

    def train(self, mode: bool = True) -> "ExportedNetwork":
        """Do nothing: an exported program has no modes, and its `train` raises."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ExportedNetwork":
        device = fn(torch.zeros(())).device
        if device != self.device:
            tensors = [*self.program.state_dict.values(), *self.program.constants.values()]
            for dtype in {tensor.dtype for tensor in tensors if isinstance(tensor, Tensor)}:
                fn(torch.zeros((), dtype=dtype))  # fail before anything is moved, if the device lacks a dtype
            self.program = move_to_device_pass(self.program, device)
            self.network = self.program.module().requires_grad_(False)
            self.device = device
        return self


class _Unsupported(Exception):
    """A file is not a program that can be used here; the message completes a sentence about the file."""


def load_exported(path: str | Path) -> ExportedNetwork:
    """Load a network from a `.pt2` file; only tensors are unpickled. See `load_program`."""
    try:
        _refuse_pickles(str(path))
        with _quiet():
            program = torch.export.load(str(path))
        return ExportedNetwork(move_to_device_pass(program, "cpu"))
    except _Unsupported as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # on damaged files, torch's readers raise errors of any type
        raise ValueError(
            f"{path}: torch {torch.__version__} cannot read it ({first_line(error)}); export it again on the CPU"
        ) from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, at most 160 characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(lines[0].split())[:160]


def _refuse_pickles(path: str) -> None:
    """Raise an error for an archive with a pickle of anything but example inputs, or with unexpected files."""
    try:
        archive = PT2ArchiveReader(path)
        names = archive.get_file_names()
    except (RuntimeError, AssertionError) as error:
        raise _Unsupported(_describe_file(path)) from error
    for name in names:
        if not PLAIN.fullmatch(name):
            raise _Unsupported(f"it holds {name}, which a plain network does not need and which is not opened")
        if name.endswith("_config.json"):
            for entry in json.loads(archive.read_string(name))["config"].values():
                if entry["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", entry["path_name"]):
                    raise _Unsupported(
                        f"{entry['path_name']} in it is a pickle, which is not opened; export plain tensors"
                    )
        if name.startswith("data/sample_inputs/") and (inputs := archive.read_bytes(name)):
            try:
                torch.load(io.BytesIO(inputs), weights_only=True, map_location="cpu")
            except Exception as error:
                raise _Unsupported("its example inputs are not only tensors, and are not opened") from error


def _describe_file(path: str) -> str:
    """Describe a file that is not an archive of torch.export."""
    try:
        names = torch._C.PyTorchFileReader(path).get_all_records()
    except RuntimeError:
        return "not a program of torch.export, or cut short"
    if "serialized_exported_program.json" in names:
        return "written by a torch before 2.8; export it again"
    if any(name.startswith("code/") for name in names):
        return "this is a TorchScript file; let its name end in .pt"
    return "not a program of torch.export"


def _input_sizes(program: ExportedProgram) -> list[int | None]:
    """Return the size of each axis of a program's images, None for dynamic axes, and check that it can be used."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    inputs = [values[name] for name in program.graph_signature.user_inputs if isinstance(name, str)]
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or inputs[0].ndim != 4:
        raise _Unsupported(f"it takes other inputs than one batch of images [n 3 h w]: export it by {HOW}")
    sizes = [size if isinstance(size, int) else None for size in inputs[0].shape]
    if sizes[0] is not None:
        raise _Unsupported(f"it was exported for batches of exactly {sizes[0]}: export it by {HOW}")
    for node in program.graph.nodes:
        declared = getattr(getattr(node.target, "_schema", None), "arguments", ())
        for argument, value in zip(declared, node.args, strict=False):  # trailing arguments may be left out
            if argument.name in ("train", "training") and value is True:
                raise _Unsupported(f"it was exported in training mode ({node.target}): export it by {HOW}")
    return sizes


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A context without torch's deprecation warnings, and without its log of failures, which are reported here."""
    logger = logging.getLogger("torch.export")
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"`?torch\.jit\.")
            warnings.filterwarnings("ignore", message="The given buffer is not writable")  # torch 2.9's own reader
            yield
    finally:
        logger.disabled = before
