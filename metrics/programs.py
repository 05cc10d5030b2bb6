"""Networks of images that carry their own code: torch.export's programs (`.pt2`), else TorchScript.

Both may call any of torch's operations, those that read files among them, so run only what you trust.
`torch.export.load` (2.9 to 2.14) also opens pickles with `weights_only=False`. A plain network needs none but example
inputs of tensors, so an archive with any other pickle, or compiled code, is refused before it is loaded.
"""

import contextlib
import io
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.passes import move_to_device_pass
from torch.export.pt2_archive import PT2ArchiveReader

from machine.whole_files import whole

SIZES = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}  # of images [n c h w]
HOW = "torch.export.export(module.eval(), (images,), dynamic_shapes=({0: D, 2: D, 3: D},)), D = Dim.DYNAMIC"
PLAIN = re.compile(  # what the archive of a plain network holds; `sample_inputs` is the one pickle
    r"models/model\.json|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)|data/sample_inputs/model\.pt"
    r"|archive_format|archive_version|byteorder|version|\.data/\w+|extra/.*"
)


def load_program(path: str | Path) -> nn.Module:
    """The network in a file, on the CPU, in eval mode. Raises ValueError if the file is not what its suffix says."""
    if Path(path).suffix == ".pt2":
        return load_exported(path)
    try:
        with _quiet():
            return torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path}: not a TorchScript file, or cut short (torch.export's files end in .pt2)") from error


def save_program(module: nn.Module, example: Tensor, path: str | Path) -> Path:
    """Write a module of images [n c h w], of any n, h and w, in the format that the suffix names."""
    with whole(Path(path)) as partial:
        if partial.suffix == ".pt2":
            save_exported(torch.export.export(module, (example,), dynamic_shapes=(SIZES,)), partial)
        else:
            with _quiet():
                torch.jit.save(torch.jit.trace(module, example), str(partial))
    return Path(path)


def save_exported(program: ExportedProgram, path: Path) -> None:
    """Write a program; where its code lies on this machine is not in it."""
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    torch.export.save(program, str(path))


class ExportedNetwork(nn.Module):
    """A loaded program of a batch of images, in its mode; moving it moves the devices written into its graph."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        self.program, self.device = program, torch.device("cpu")
        self.network = program.module().requires_grad_(False)
        self.sizes = _sizes(program)

    def forward(self, images: Tensor) -> Any:
        for axis, name in ((2, "height"), (3, "width")):
            fixed, size = self.sizes[axis], images.shape[axis]
            if fixed not in (None, size):
                raise ValueError(f"it was exported for a {name} of {fixed}, and here it is {size}: export it by {HOW}")
        return self.network(images)

    def train(self, mode: bool = True) -> "ExportedNetwork":
        """Nothing: an exported program has no modes, and torch refuses to be asked."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ExportedNetwork":
        device = fn(torch.zeros(())).device
        if device != self.device:
            tensors = [*self.program.state_dict.values(), *self.program.constants.values()]
            for dtype in {tensor.dtype for tensor in tensors if isinstance(tensor, Tensor)}:
                fn(torch.zeros((), dtype=dtype))  # what the device lacks is told before half of it has moved
            self.program = move_to_device_pass(self.program, device)
            self.network = self.program.module().requires_grad_(False)
            self.device = device
        return self


class _Unfit(Exception):
    """A sentence about a file."""


def load_exported(path: str | Path) -> ExportedNetwork:
    """The network in a `.pt2` file; nothing in it is unpickled but tensors. See `load_program`."""
    try:
        _refuse_pickles(str(path))
        with _quiet():
            program = torch.export.load(str(path))
        return ExportedNetwork(move_to_device_pass(program, "cpu"))
    except _Unfit as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # torch's readers raise whatever the damage makes them stumble over
        raise ValueError(
            f"{path}: torch {torch.__version__} cannot read this program ({one_line(error)}); export it anew on the CPU"
        ) from error


def one_line(error: Exception) -> str:
    """An error's first line, cut to a length that leaves room for a remedy."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(lines[0].split())[:160]


def _refuse_pickles(path: str) -> None:
    try:
        archive = PT2ArchiveReader(path)
        names = archive.get_file_names()
    except (RuntimeError, AssertionError) as error:
        raise _Unfit(_what_else(path)) from error
    for name in names:
        if not PLAIN.fullmatch(name):
            raise _Unfit(f"it holds {name}, which a plain network does not need and which is not opened")
        if name.endswith("_config.json"):
            for entry in json.loads(archive.read_string(name))["config"].values():
                if entry["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", entry["path_name"]):
                    raise _Unfit(f"{entry['path_name']} in it is a pickle, which is not opened; export plain tensors")
        if name.startswith("data/sample_inputs/") and (inputs := archive.read_bytes(name)):
            try:
                torch.load(io.BytesIO(inputs), weights_only=True, map_location="cpu")
            except Exception as error:
                raise _Unfit("its example inputs are not tensors alone, and are not opened") from error


def _what_else(path: str) -> str:
    try:
        names = torch._C.PyTorchFileReader(path).get_all_records()
    except RuntimeError:
        return "not a program of torch.export, or cut short"
    if "serialized_exported_program.json" in names:
        return "written by a torch before 2.8; export it anew"
    if any(name.startswith("code/") for name in names):
        return "this is a TorchScript file; let its name end in .pt"
    return "not a program of torch.export"


def _sizes(program: ExportedProgram) -> list[int | None]:
    """Of each axis of the images, None where it is free."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    inputs = [values[name] for name in program.graph_signature.user_inputs if isinstance(name, str)]
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or inputs[0].ndim != 4:
        raise _Unfit(f"it takes other inputs than one batch of images [n 3 h w]: export it by {HOW}")
    sizes = [size if isinstance(size, int) else None for size in inputs[0].shape]
    if sizes[0] is not None:
        raise _Unfit(f"it was exported for batches of exactly {sizes[0]}: export it by {HOW}")
    for node in program.graph.nodes:
        declared = getattr(getattr(node.target, "_schema", None), "arguments", ())
        for argument, value in zip(declared, node.args, strict=False):  # those at the end may be left out
            if argument.name in ("train", "training") and value is True:
                raise _Unfit(f"it was exported in training mode ({node.target}): export it by {HOW}")
    return sizes


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's talk of deprecation and of failures, of which ours is the one line that the user reads."""
    logger = logging.getLogger("torch.export")
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"`?torch\.jit\.")
            warnings.filterwarnings("ignore", message="The given buffer is not writable")  # torch 2.9's own reader
            yield
    finally:
        logger.disabled = before
