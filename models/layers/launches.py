"""Where operations are put together: a GPU is told of each by a launch, which takes as long as the arithmetic of many
small ones; a CPU calls a function, and what counts there is arithmetic.

On devices of the types below windows share tiles (`window.Windows`), queries and keys get their length by one kernel
(`window.cosine`), and all that layers are told of the conditioning comes from one product (`modulation.Injection`).
Both ways compute the same. `Casting` puts together what autocast does to the weights of a block.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

AT_ONCE = {"cuda"}


def at_once(x: Tensor) -> bool:
    return x.device.type in AT_ONCE


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """In which autocast, where it is on, leaves types as they are; else none: exported programs would keep it."""
    kind = x.device.type
    is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # meta tensors know of none
    return torch.autocast(kind, enabled=False) if is_on else nullcontext()


class Uncast:
    """Modules whose weights are used in their own type, or together with others': `Casting` leaves them alone."""


class Casting:
    """While a module runs under autocast, the weights of these layers inside it are of autocast's type, all cast by one
    launch; autocast itself casts one after the other. Between calls they are as they were."""

    def __init__(self, module: nn.Module, layers: Sequence[nn.Module]) -> None:
        self.layers = layers
        self.taken: list[tuple[dict[str, Any], str, Tensor]] = []  # a layer's parameters, the name of one, and it
        module.register_forward_pre_hook(self.take)
        module.register_forward_hook(self.give_back, always_call=True)

    def take(self, *_: Any) -> None:
        found: list[tuple[dict[str, Any], str, Tensor]] = [
            (layer._parameters, name, weight)
            for layer in self.layers
            for name, weight in layer._parameters.items()
            if weight is not None and weight.dtype == torch.float32
        ]
        device = found[0][2].device.type if found else "cpu"
        if found and torch.is_autocast_enabled(device):
            casts = Cast.apply(torch.get_autocast_dtype(device), *(weight for _, _, weight in found))
            for (parameters, name, _weight), cast in zip(found, casts, strict=True):
                parameters[name] = cast
            self.taken = found

    def give_back(self, *_: Any) -> None:
        for parameters, name, weight in self.taken:
            parameters[name] = weight
        self.taken = []


class Cast(torch.autograd.Function):
    """Tensors of float32 in another type, and their gradients back in float32."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return copies(tensors, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        there = iter(copies([each for each in gradients if each is not None], torch.float32))
        return None, *(None if each is None else next(there) for each in gradients)


def copies(tensors: list[Tensor] | tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    made = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(made, tensors)
    return tuple(made)
