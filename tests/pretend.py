"""A device that is none: its tensors lie in main memory, but say that they are elsewhere, and what a GPU refuses is
refused: operations on tensors of two devices, generators of the other one.

python tests/pretend.py train.py --model XSwin

runs a program there. It ends with a line of JSON: how often each of the project's files waited for the device (read a
number off it, or brought a tensor back).
"""

import json
import runpy
import sys
import traceback
from collections import Counter
from pathlib import Path

import torch
from accelerate.state import PartialState
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

ROOT = Path(__file__).resolve().parent.parent
_setup_privateuseone_for_python_backend("pretend")
DEVICE = torch.device("pretend:0")
aten = torch.ops.aten
FIRST_DECIDES = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default, aten.copy_.default}
seeds: set[int] = set()  # of the generators that live there
waits: Counter[str] = Counter()


class Elsewhere(torch.Tensor):
    """A tensor on the device; `held` are its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    held: torch.Tensor

    @staticmethod
    def __new__(cls, held):
        like = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, held.shape, **like, device=DEVICE)
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return run(operation, args, kwargs or {})

    def tolist(self):
        return self.cpu().tolist()

    def untyped_storage(self):
        return self.held.untyped_storage()


class Pretending(TorchDispatchMode):
    """Within, tensors can be made on the device."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return run(operation, args, kwargs or {})


def run(operation, args, kwargs):
    """One operation, where its tensors are, or where it is asked for."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = any(isinstance(tensor, Elsewhere) for tensor in tensors)
    asked = kwargs.get("device")
    result_there = there if asked is None else torch.device(asked).type == DEVICE.type
    if operation in FIRST_DECIDES:
        result_there = isinstance(args[0], Elsewhere)
    elif asked is None and there and any(tensor.dim() and not isinstance(tensor, Elsewhere) for tensor in tensors):
        raise RuntimeError(f"{operation}: tensors of two devices")
    for generator in tree_leaves((args, kwargs)):
        if isinstance(generator, torch.Generator) and (generator.initial_seed() in seeds) != result_there:
            raise RuntimeError(f"{operation}: a generator of the other device")
    if there and (operation is aten._local_scalar_dense.default or not result_there):
        own = [Path(frame.filename) for frame in traceback.extract_stack() if ".venv" not in frame.filename]
        own = [path.relative_to(ROOT) for path in own if path.is_relative_to(ROOT) and path != Path(__file__)]
        waits[str(own[-1])] += 1
    if operation is aten._fused_sdp_choice.default:
        return 0  # plain operations, not one of a backend
    if asked is not None and result_there:
        kwargs = {**kwargs, "device": torch.device("cpu"), "pin_memory": False}
    held_args, held_kwargs = tree_map_only(Elsewhere, lambda tensor: tensor.held, (args, kwargs))
    result = operation(*held_args, **held_kwargs)
    if not result_there:
        return result
    result = tree_map_only(torch.Tensor, Elsewhere, result)
    is_new = asked is not None or operation is aten._to_copy.default
    return result if is_new else return_and_correct_aliasing(operation, args, kwargs, result)


def _make(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return Elsewhere(torch.empty_strided(size, stride, dtype=dtype))


def _fill(source, target, non_blocking=False):
    target.held.copy_(source)
    return target


LIBRARY = torch.library.Library("aten", "IMPL")  # for torch.tensor(..., device=...), which no mode sees
LIBRARY.impl("empty_strided", _make, "PrivateUse1")
LIBRARY.impl("_copy_from", _fill, "PrivateUse1")


def pretend() -> None:
    """Make the project's programs of this process take the device."""
    import experiment.batches
    import experiment.machine

    torch.__future__.set_swap_module_params_on_conversion(True)
    torch.inference_mode = lambda mode=True: torch.no_grad()  # subclasses of tensors have none
    open_accelerator, generator_for = experiment.machine.open_accelerator, experiment.batches.generator_for

    def open_there(*args, **kwargs):
        accelerator = open_accelerator(*args, **kwargs)
        PartialState._shared_state["device"] = accelerator.state.device = DEVICE
        return accelerator

    def generate_there(*key, device="cpu"):
        generator = generator_for(*key)
        if torch.device(device).type == DEVICE.type:
            seeds.add(generator.initial_seed())
        return generator

    experiment.machine.open_accelerator, experiment.batches.generator_for = open_there, generate_there


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    pretend()
    del sys.argv[0]
    with Pretending():
        runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
    print(json.dumps(waits))
