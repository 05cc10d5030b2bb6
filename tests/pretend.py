"""Run programs on a simulated GPU: its tensors lie in main memory, but it refuses what a GPU refuses.

These are operations on tensors of two devices, and generators of the other device. Programs run one after the other:

python tests/pretend.py train.py --model XSwin
python tests/pretend.py train.py --model XSwin + sample.py --checkpoint runs/XSwin

The last line of output is JSON: how often each file of the project waited for the device. It waits when it reads a
number from the device, copies a tensor back, or sends a tensor that has axes, or is made of Python numbers, without
`non_blocking`. The environment variable PRETEND selects the device:

- `gpu`, the default;
- `mps`, Apple's: it also refuses float64 and complex128, and operations without a kernel for MPS according to torch's
  `native_functions.yaml`; operations that torch composes of others are assumed to work;
- `cpu`: nothing is simulated, for comparison.
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
seeds: set[int] = set()  # seeds of the generators that count as the device's
waits: Counter[str] = Counter()
SENT = ", sending"  # appended to the file's name in `waits`


class DeviceTensor(torch.Tensor):
    """A tensor on the simulated device; `held` has its values in main memory."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    held: torch.Tensor

    @staticmethod
    def __new__(cls, held):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, held.shape, **layout, device=DEVICE)
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
    """Mode in which tensors can be created on the simulated device."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return run(operation, args, kwargs or {})


def run(operation, args, kwargs):
    """Run an operation on the device of its tensors, or on the one that its arguments name."""
    leaves = [*leaves_of(args), *leaves_of(kwargs.values())]
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    uses_device = any(isinstance(tensor, DeviceTensor) for tensor in tensors)
    uses_host = any(tensor.dim() and not isinstance(tensor, DeviceTensor) for tensor in tensors)
    target = kwargs.get("device")
    to_device = uses_device if target is None else torch.device(target).type == DEVICE.type
    if operation in FIRST_DECIDES:
        to_device = isinstance(args[0], DeviceTensor)
    elif target is None and uses_device and uses_host:
        raise RuntimeError(f"{operation}: tensors of two devices")
    if KIND == "mps" and (uses_device or to_device):
        refuse_as_apple(operation, args, kwargs, tensors)
    for generator in leaves:
        if isinstance(generator, torch.Generator) and (generator.initial_seed() in seeds) != to_device:
            raise RuntimeError(f"{operation}: a generator of the other device")
    copies = operation in (CONVERTS, *FIRST_DECIDES) and not kwargs.get("non_blocking")
    is_sent = to_device and uses_host and copies
    to_host = not to_device and (target is None or torch.device(target).type != "meta")  # meta tensors have no values
    if (uses_device and (operation is READS or to_host)) or is_sent:
        waits[caller() + SENT * is_sent] += 1
    if operation is CHOOSES:
        return 0  # attention of plain operations, not a fused kernel
    if operation is NO_MEMORY and to_device:
        operation = aten.zeros.default  # kernels that read a tensor without memory would crash the program
    if target is not None and to_device:
        kwargs = {**kwargs, "device": torch.device("cpu"), "pin_memory": False}
    result = operation(*held(args), **{name: held(value) for name, value in kwargs.items()})
    if not to_device:
        return result
    result = put_on_device(result)
    is_new = target is not None or operation is CONVERTS or not aliases(operation)
    return result if is_new else return_and_correct_aliasing(operation, args, kwargs, result)


def leaves_of(values):
    """Yield arguments, and the elements of lists; operations have no lists of lists."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from value
        else:
            yield value


def held(value):
    """Replace tensors of the device, in nested lists too, by their values in main memory."""
    if isinstance(value, list | tuple):
        return type(value)(map(held, value))
    return value.held if isinstance(value, DeviceTensor) else value


def put_on_device(result):
    """Wrap the tensors of a result as tensors of the device."""
    if isinstance(result, list | tuple):
        return type(result)(map(put_on_device, result))
    if not isinstance(result, torch.Tensor):
        return result
    if KIND == "mps" and result.dtype in WIDE:
        raise TypeError(NO_FLOAT64)
    return DeviceTensor(result)


@cache
def aliases(operation) -> bool:
    """Whether a result of the operation shares memory with an argument, or is one."""
    return any(value.alias_info is not None for value in operation._schema.returns)


def caller() -> str:
    """File of the innermost frame of this project."""
    frame = sys._getframe()
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(f"{ROOT}/") and ".venv" not in path and path != __file__:
            return path.removeprefix(f"{ROOT}/")
        frame = frame.f_back
    return "none of them"


NO_FLOAT64 = "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."


def refuse_as_apple(operation, args, kwargs, tensors):
    """Raise what torch raises on MPS, before the operation runs, so that no generator advances.

    A scalar in float64 is accepted by binary arithmetic only. Converting or copying a float64 tensor to MPS is allowed
    where that narrows it; copying a tensor back must not widen it.
    """
    name = operation.name()
    if name not in apple_kernels():
        raise NotImplementedError(f"The operator '{name}' is not currently implemented for the MPS device.")
    wide = [tensor for tensor in tensors if tensor.dtype in WIDE]
    narrows = name == "aten::_to_copy" or (name == "aten::copy_" and args[0].dtype not in WIDE)
    if kwargs.get("dtype") in WIDE or (wide and not narrows and name not in BINARY):
        raise TypeError(NO_FLOAT64)


@cache
def apple_kernels() -> set[str]:
    """Names of the operations that torch implements for MPS, or composes of others."""
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    entries = {entry["func"].split("(")[0]: entry for entry in yaml.load(path.read_text(), yaml.CSafeLoader)}

    def dispatch_keys(entry) -> set[str]:
        own = {key.strip() for line in entry.get("dispatch", {}) for key in line.split(",")}
        return own | (dispatch_keys(entries[entry["structured_delegate"]]) if "structured_delegate" in entry else set())

    def is_available(entry) -> bool:
        keys = dispatch_keys(entry)
        return not keys or "MPS" in keys or any(key.startswith("Composite") for key in keys)

    return {f"aten::{name}" for name, entry in entries.items() if is_available(entry)}


def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    if KIND == "mps" and dtype in WIDE:
        raise TypeError(NO_FLOAT64)
    return DeviceTensor(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source, target, non_blocking=False):
    if not non_blocking:
        waits[caller() + SENT] += 1
    target.held.copy_(source)
    return target


LIBRARY = torch.library.Library("aten", "IMPL")  # for torch.tensor(..., device=...), which dispatch modes do not see
LIBRARY.impl("empty_strided", _empty_strided, "PrivateUse1")
LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")


def pretend() -> None:
    """Make the project's programs in this process use the simulated device."""
    import machine.accelerator
    import machine.randomness

    torch.__future__.set_swap_module_params_on_conversion(True)
    torch.inference_mode.__enter__ = without_gradients
    open_accelerator, generator_for = machine.accelerator.open_accelerator, machine.randomness.generator_for

    def open_on_device(*args, **kwargs):
        accelerator = open_accelerator(*args, **kwargs)
        PartialState._shared_state["device"] = accelerator.state.device = DEVICE
        return accelerator

    def generator_on_device(*key, device="cpu"):
        generator = generator_for(*key)
        if torch.device(device).type == DEVICE.type:
            seeds.add(generator.initial_seed())
        return generator

    for module in list(sys.modules.values()):  # modules that have already imported these functions by name
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is open_accelerator or value is generator_for:
                setattr(module, name, open_on_device if value is open_accelerator else generator_on_device)


def without_gradients(inference: torch.inference_mode) -> None:
    """Replace inference mode, which tensor subclasses do not support, by no_grad."""
    inference._inference_mode_context = torch.no_grad()
    inference._inference_mode_context.__enter__()


def run_programs(words: list[str]) -> None:
    """Run programs, separated by `+`, each as if it were the only one of the process."""
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
