"""Batching of small operations, to save kernel launches on GPUs.

Where operations are small, a GPU spends its time on kernel launches and a CPU on arithmetic. On the device types in
`FUSED_DEVICES`, several windows share a tile (`window.Windows`), one kernel normalises queries and keys
(`window.cosine`), one matrix product computes the modulation of all layers (`modulation.ConditioningLayers`), and the
position biases and temperatures of all attentions are computed together (`window.Precomputation`). Results are the same
on all devices, to rounding. `FusedWeightCasts` batches the casts that autocast makes of a block's weights.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

FUSED_DEVICES = {"cuda"}


def fuses_launches(x: Tensor) -> bool:
    """Whether the device of `x` is one where launches are batched."""
    return x.device.type in FUSED_DEVICES


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype to which autocast casts on the device of `x`; None where autocast is off."""
    device_type = x.device.type
    is_on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)  # not on meta
    return torch.get_autocast_dtype(device_type) if is_on else None


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context that disables autocast on the device of `x`; a null context where autocast is off, because
    exported programs would record the other one."""
    return nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)


class KeepFloat32:
    """Mixin of modules whose weights `FusedWeightCasts` must not cast."""


class FusedWeightCasts:
    """Casts the weights of some layers inside a module by one launch, while the module runs under autocast. Autocast
    itself casts weights one by one. The layers keep their float32 parameters between calls."""

    def __init__(self, module: nn.Module, layers: Sequence[nn.Module]) -> None:
        self.layers = layers
        self.replaced: list[tuple[dict[str, Any], str, Tensor]] = []  # a layer's `_parameters`, a key, its parameter
        module.register_forward_pre_hook(self._replace_weights)
        module.register_forward_hook(self._restore_weights, always_call=True)

    def _replace_weights(self, *_: Any) -> None:
        weights: list[tuple[dict[str, Any], str, Tensor]] = [
            (layer._parameters, name, weight)
            for layer in self.layers
            for name, weight in layer._parameters.items()
            if weight is not None and weight.dtype == torch.float32
        ]
        device_type = weights[0][2].device.type if weights else "cpu"
        if weights and torch.is_autocast_enabled(device_type):
            casts = FusedCast.apply(torch.get_autocast_dtype(device_type), *(weight for _, _, weight in weights))
            for (parameters, name, _weight), cast in zip(weights, casts, strict=True):
                parameters[name] = cast
            self.replaced = weights

    def _restore_weights(self, *_: Any) -> None:
        for parameters, name, weight in self.replaced:
            parameters[name] = weight
        self.replaced = []


class FusedCast(torch.autograd.Function):
    """Casts float32 tensors to another dtype in one launch, and their gradients back to float32."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return cast_all(tensors, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        casts = iter(cast_all([gradient for gradient in gradients if gradient is not None], torch.float32))
        return None, *(None if gradient is None else next(casts) for gradient in gradients)


def cast_all(tensors: list[Tensor] | tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    casts = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(casts, tensors)
    return tuple(casts)
