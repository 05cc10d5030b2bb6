"""What weights begin as."""

from collections.abc import Callable, Collection
from typing import TypeVar

from torch import Tensor, nn

Layer = TypeVar("Layer", bound=nn.Linear | nn.Conv2d)


def zero_(layer: Layer) -> Layer:
    """Zero weights and bias: what follows starts as if the layer were not there."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def initialise_linears_(network: nn.Module, initialise_: Callable[[Tensor], Tensor], but: Collection = ()) -> None:
    """Weights of a network's linears as `initialise_` fills them, and biases of zero; those in `but` stay."""
    for module in network.modules():
        if isinstance(module, nn.Linear) and module not in but:
            initialise_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
