"""Build a model so that each process holds only its shards, with the same initial weights as a model built whole."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

M = TypeVar("M", bound=nn.Module)
WHOLE_VIEWS = {"alias", "detach", "view"}
FILLS = {"bernoulli_", "copy_", "exponential_", "fill_", "log_normal_", "normal_", "random_", "uniform_", "zero_"}


class FreedWeightError(RuntimeError):
    """A constructor, or a tensor beside the weights, reads a weight whose memory has been freed."""


class Waiting(nn.Parameter):
    """A parameter on the meta device, whose shard waits until FSDP has wrapped the module."""

    shard: DTensor

    def data_ptr(self) -> int:
        """Accelerate finds an optimizer's parameters again by their addresses, which meta tensors lack."""
        return id(self)


def build_in_shards(build: Callable[[], M], mesh: DeviceMesh) -> M:
    """Call `build`, and return its model with parameters that are `Waiting` and unchanged buffers. Raises
    FreedWeightError if the model can only be built whole."""
    with _OneParameterAtATime(mesh) as building:
        model = build()
    waiting: dict[int, Waiting] = {}  # a parameter may be part of several modules
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in waiting:
                meta = torch.empty_like(parameter, device="meta")
                waiting[id(parameter)] = Waiting(meta, requires_grad=parameter.requires_grad)
                waiting[id(parameter)].shard = building.shard_of(parameter)
            module._parameters[name] = waiting[id(parameter)]
        building.check([*module._buffers.values(), *vars(module).values()])
    return model


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A model's state dict, with the shards of parameters that wait."""
    state = model.state_dict(keep_vars=True)
    return {name: tensor.shard if isinstance(tensor, Waiting) else tensor.detach() for name, tensor in state.items()}


def place_shards(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """After FSDP has wrapped a model, make the shards in `weights` its parameters."""
    waiting = {id(parameter): weights[name] for name, parameter in model.named_parameters() if parameter.is_meta}
    model._apply(lambda tensor: waiting.get(id(tensor), tensor))


class _OneParameterAtATime(TorchDispatchMode):
    """While modules are created in this context, only the parameter that was created or filled last is whole in main
    memory; of all others, the shards are kept. A constructor that fills a parameter again, because it replaces its
    layers' own initialisation, has the memory back for that time. So it draws the random numbers that it always draws.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self._mesh = mesh
        self._whole: nn.Parameter | None = None
        self._freed: dict[int, tuple[nn.Parameter, DTensor]] = {}  # and their shards, by storage

    def __enter__(self) -> "_OneParameterAtATime":
        self._hook = register_module_parameter_registration_hook(self._register)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._hook.remove()
        super().__exit__(*error)

    def check(self, values: Iterable[object]) -> None:
        """Raise FreedWeightError if one of the values is a tensor in the memory of a weight, which would be read."""
        for value in values:
            if isinstance(value, Tensor) and _storage(value) in self._freed:
                raise FreedWeightError(f"a tensor of shape {tuple(value.shape)} shares its memory with a weight")

    def shard_of(self, parameter: nn.Parameter) -> DTensor:
        """This process's shard, without its storage."""
        owner, shard = self._freed.get(_storage(parameter), (None, None))
        if owner is parameter and shard is not None:
            return shard
        self.check([parameter])
        return distribute_tensor(parameter.detach(), self._mesh, [Shard(0)], src_data_rank=None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        freed = [tensor for tensor in tensors if _storage(tensor) in self._freed]
        if freed and func.overloadpacket.__name__ not in WHOLE_VIEWS:
            storage = _storage(freed[0])
            parameter, _ = self._freed[storage]
            is_filled = func.overloadpacket.__name__ in FILLS and len(freed) == 1 and freed[0] is args[0]
            if not is_filled or freed[0].numel() != parameter.numel():
                raise FreedWeightError(f"{func} on a weight of shape {tuple(parameter.shape)}")
            self._free()
            del self._freed[storage]
            parameter.untyped_storage().resize_(parameter.nbytes)
            self._whole = parameter
        return func(*args, **kwargs or {})

    def _register(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type == "cpu" and _storage(parameter) not in self._freed:
            if parameter is not self._whole:
                self._free()
            self._whole = parameter

    def _free(self) -> None:
        """Keep the shard of the parameter that is whole, and free its memory."""
        if self._whole is not None:
            self._freed[_storage(self._whole)] = self._whole, self.shard_of(self._whole)
            self._whole.untyped_storage().resize_(0)
            self._whole = None


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
