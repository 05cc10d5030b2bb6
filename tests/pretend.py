"""A device that is none: its tensors lie in main memory, but say that they are elsewhere, and what a GPU refuses is
refused: operations on tensors of two devices, generators of the other one.

python tests/pretend.py train.py --model XSwin
python tests/pretend.py train.py --model XSwin + sample.py --checkpoint runs/XSwin

runs programs there, one after the other. It ends with a line of JSON: how often each of the project's files waited for
the device (read a number off it, brought a tensor back, or sent one that has axes or is made of numbers, which CUDA
waits with too unless it is `non_blocking`). PRETEND says which device:

- `gpu`, by default;
- `mps`, Apple's: it also refuses float64 and complex128, and operations for which torch has no kernel there, as far as
  `native_functions.yaml` tells: what torch composes of others is taken for had;
- `cpu`: nothing is pretended, to compare with.
"""

import json
import os
import runpy
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import torch
import torchgen
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

ROOT = Path(__file__).resolve().parent.parent
_setup_privateuseone_for_python_backend("pretend")
DEVICE = torch.device("pretend:0")
aten = torch.ops.aten
FIRST_DECIDES = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default, aten.copy_.default}
READS, CONVERTS, CHOOSES = aten._local_scalar_dense.default, aten._to_copy.default, aten._fused_sdp_choice.default
NO_MEMORY = aten._efficientzerotensor.default
WIDE = {torch.float64, torch.complex128}
BINARY = {f"aten::{name}{tail}.Tensor" for name in ("add", "sub", "mul", "div") for tail in ("", "_")}
KIND = os.environ.get("PRETEND", "gpu")
seeds: set[int] = set()  # of the generators that live there
waits: Counter[str] = Counter()
SENT = ", sending"


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
    leaves = [*leaves_of(args), *leaves_of(kwargs.values())]
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    there = any(isinstance(tensor, Elsewhere) for tensor in tensors)
    asked = kwargs.get("device")
    result_there = there if asked is None else torch.device(asked).type == DEVICE.type
    if operation in FIRST_DECIDES:
        result_there = isinstance(args[0], Elsewhere)
    elif asked is None and there and any(tensor.dim() and not isinstance(tensor, Elsewhere) for tensor in tensors):
        raise RuntimeError(f"{operation}: tensors of two devices")
    if KIND == "mps" and (there or result_there):
        refuse_as_apple(operation, args, kwargs, tensors)
    for generator in leaves:
        if isinstance(generator, torch.Generator) and (generator.initial_seed() in seeds) != result_there:
            raise RuntimeError(f"{operation}: a generator of the other device")
    is_sent = result_there and tensors and not kwargs.get("non_blocking") and operation in (CONVERTS, *FIRST_DECIDES)
    is_sent = is_sent and any(tensor.dim() and not isinstance(tensor, Elsewhere) for tensor in tensors)
    goes_back = not result_there and (asked is None or torch.device(asked).type != "meta")  # which holds no numbers
    if (there and (operation is READS or goes_back)) or is_sent:
        waits[asker() + SENT * bool(is_sent)] += 1
    if operation is CHOOSES:
        return 0  # plain operations, not one of a backend
    if operation is NO_MEMORY and result_there:
        operation = aten.zeros.default  # kernels below this one read it, which without memory ends the program
    if asked is not None and result_there:
        kwargs = {**kwargs, "device": torch.device("cpu"), "pin_memory": False}
    result = operation(*held(args), **{name: held(value) for name, value in kwargs.items()})
    if not result_there:
        return result
    result = put_there(result)
    is_new = asked is not None or operation is CONVERTS or not aliases(operation)
    return result if is_new else return_and_correct_aliasing(operation, args, kwargs, result)


def leaves_of(values):
    """Arguments, and what lists of them hold: the schemas of operations go no deeper."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from value
        else:
            yield value


def held(value):
    """The numbers of what is there."""
    if isinstance(value, list | tuple):
        return type(value)(map(held, value))
    return value.held if isinstance(value, Elsewhere) else value


def put_there(result):
    """A result, on the device."""
    if isinstance(result, list | tuple):
        return type(result)(map(put_there, result))
    if not isinstance(result, torch.Tensor):
        return result
    if KIND == "mps" and result.dtype in WIDE:
        raise TypeError(NO_FLOAT64)
    return Elsewhere(result)


@cache
def aliases(operation) -> bool:
    """Whether a result shares memory with an argument, or is one."""
    return any(each.alias_info is not None for each in operation._schema.returns)


def asker() -> str:
    """The innermost of the project's files on the way here."""
    frame = sys._getframe()
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(f"{ROOT}/") and ".venv" not in path and path != __file__:
            return path.removeprefix(f"{ROOT}/")
        frame = frame.f_back
    return "none of them"


NO_FLOAT64 = "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."


def refuse_as_apple(operation, args, kwargs, tensors):
    """Before anything is done, so that no generator moves on. A number in float64 is only taken by kernels of two
    arguments, and a tensor that comes back is not widened on the way."""
    name = operation.name()
    if name not in apple_kernels():
        raise NotImplementedError(f"The operator '{name}' is not currently implemented for the MPS device.")
    wide = [tensor for tensor in tensors if tensor.dtype in WIDE]
    narrows = name == "aten::_to_copy" or (name == "aten::copy_" and args[0].dtype not in WIDE)
    if kwargs.get("dtype") in WIDE or (wide and not narrows and name not in BINARY):
        raise TypeError(NO_FLOAT64)


@cache
def apple_kernels() -> set[str]:
    """Names of the operations that torch has for MPS, or composes of others."""
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    entries = {each["func"].split("(")[0]: each for each in yaml.load(path.read_text(), yaml.CSafeLoader)}

    def keys(each) -> set[str]:
        own = {key.strip() for line in each.get("dispatch", {}) for key in line.split(",")}
        return own | (keys(entries[each["structured_delegate"]]) if "structured_delegate" in each else set())

    def has(each) -> bool:
        found = keys(each)
        return not found or "MPS" in found or any(key.startswith("Composite") for key in found)

    return {f"aten::{name}" for name, each in entries.items() if has(each)}


def _make(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    if KIND == "mps" and dtype in WIDE:
        raise TypeError(NO_FLOAT64)
    return Elsewhere(torch.empty_strided(size, stride, dtype=dtype))


def _fill(source, target, non_blocking=False):
    if not non_blocking:
        waits[asker() + SENT] += 1
    target.held.copy_(source)
    return target


LIBRARY = torch.library.Library("aten", "IMPL")  # for torch.tensor(..., device=...), which no mode sees
LIBRARY.impl("empty_strided", _make, "PrivateUse1")
LIBRARY.impl("_copy_from", _fill, "PrivateUse1")


def pretend() -> None:
    """Make the project's programs of this process take the device."""
    import machine.accelerator
    import machine.randomness

    torch.__future__.set_swap_module_params_on_conversion(True)
    torch.inference_mode.__enter__ = without_gradients
    open_accelerator, generator_for = machine.accelerator.open_accelerator, machine.randomness.generator_for

    def open_there(*args, **kwargs):
        accelerator = open_accelerator(*args, **kwargs)
        PartialState._shared_state["device"] = accelerator.state.device = DEVICE
        return accelerator

    def generate_there(*key, device="cpu"):
        generator = generator_for(*key)
        if torch.device(device).type == DEVICE.type:
            seeds.add(generator.initial_seed())
        return generator

    for module in list(sys.modules.values()):  # which may have been imported before
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is open_accelerator or value is generator_for:
                setattr(module, name, open_there if value is open_accelerator else generate_there)


def without_gradients(inference: torch.inference_mode) -> None:
    """In the place of inference, which subclasses of tensors have not."""
    inference._inference_mode_context = torch.no_grad()
    inference._inference_mode_context.__enter__()


def run_programs(words: list[str]) -> None:
    """Each as if it were alone, `+` in between."""
    while words:
        end = words.index("+") if "+" in words else len(words)
        sys.argv, words = words[:end], words[end + 1 :]
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()
        runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if KIND == "cpu":
        run_programs(sys.argv[1:])
    else:
        pretend()
        with Pretending():
            run_programs(sys.argv[1:])
    print(json.dumps(waits))
