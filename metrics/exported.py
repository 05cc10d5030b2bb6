"""Programs of torch.export (`.pt2`): networks of images that carry their own code.

What was found in torch 2.9 and 2.14: `torch.export.load` unpickles. Example inputs, tensors of other classes than
torch's own, custom objects and files of older versions are pickles, and it opens them with `weights_only=False`. A
plain network needs none of that: its weights are raw bytes, its graph is JSON, and its example inputs are tensors,
which `weights_only=True` reads. So an archive is looked through before it is loaded, and refused if it holds any other
pickle, or compiled code.

It is a program all the same, as a TorchScript file is: its graph may call any of torch's operations, those that read
files among them, and torch evaluates the formulas of its shapes as Python. Run only what you trust.
"""

from __future__ import annotations

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

HOW = (
    "torch.export.export(module.eval(), (images,), dynamic_shapes=({0: D, 2: D, 3: D},)), D = torch.export.Dim.DYNAMIC"
)

PLAIN = re.compile(
    r"models/model\.json|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)|data/sample_inputs/model\.pt"
    r"|archive_format|archive_version|byteorder|version|\.data/\w+|extra/.*"
)
"""What the archive of a plain network holds; `sample_inputs` is the one pickle."""


class ExportedNetwork(nn.Module):
    """A loaded program of one batch of images: frozen, in the one mode and precision that it was exported in.

    Moving it moves the devices that are written into its graph, which `nn.Module` would leave.
    """

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        self.program = program
        self.network = program.module().requires_grad_(False)
        self.sizes = _sizes(program)
        self.device = torch.device("cpu")

    def forward(self, images: Tensor) -> Any:
        for axis, name in ((2, "height"), (3, "width")):
            fixed, size = self.sizes[axis], images.shape[axis]
            if fixed not in (None, size):
                raise ValueError(f"it was exported for a {name} of {fixed}, and here it is {size}: export it by {HOW}")
        return self.network(images)

    def train(self, mode: bool = True) -> ExportedNetwork:
        """Nothing: an exported program has no modes, and torch refuses to be asked."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExportedNetwork:
        device = fn(torch.zeros(())).device
        if device != self.device:
            for dtype in {tensor.dtype for tensor in (*self.program.state_dict.values(), *self._constants())}:
                fn(torch.zeros((), dtype=dtype))  # what the device lacks is told before half of it has moved
            self.program = move_to_device_pass(self.program, device)
            self.network = self.program.module().requires_grad_(False)
            self.device = device
        return self

    def _constants(self) -> Iterator[Tensor]:
        return (value for value in self.program.constants.values() if isinstance(value, Tensor))


def load_exported(path: str | Path) -> ExportedNetwork:
    """The network in a file, on the CPU; nothing in the file is unpickled but tensors.

    Raises:
        ValueError: if the file is none, holds more than a plain network, or a network that cannot be used, in one line.
    """
    try:
        _refuse_pickles(str(path))
        with _quiet():
            program = torch.export.load(str(path))
        network = ExportedNetwork(move_to_device_pass(program, "cpu"))
    except _Unfit as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # torch's readers raise whatever the damage makes them stumble over
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{path}: torch {torch.__version__} cannot read this program ({' '.join(lines[0].split())[:160]}); export "
            "it anew on the CPU, with this version"
        ) from error
    return network


def save_exported(module: nn.Module, example: Tensor, path: str | Path) -> Path:
    """Export a module of images [n c h w], for any n, h and w, and write it; where it was written is not in it."""
    dynamic = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    return save_program(torch.export.export(module, (example,), dynamic_shapes=(dynamic,)), path)


def save_program(program: ExportedProgram, path: str | Path) -> Path:
    """Write a program; where its code lies on this machine is not in it."""
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    torch.export.save(program, str(path))
    return Path(path)


class _Unfit(Exception):
    """A sentence about a file."""


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
    """Without torch's talk: on failure, ours is the one line that the user reads."""
    logger = logging.getLogger("torch.export")
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="The given buffer is not writable"
            )  # torch 2.9, of its own reader
            yield
    finally:
        logger.disabled = before
