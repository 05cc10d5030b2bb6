"""Initialisation of weights."""

from collections.abc import Callable, Collection
from typing import TypeVar

from torch import Tensor, nn

Layer = TypeVar("Layer", bound=nn.Linear | nn.Conv2d)


def zero_(layer: Layer) -> Layer:
    """Set a layer's weight and bias to zero in place, and return the layer."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def initialise_linears_(network: nn.Module, initialise_: Callable[[Tensor], Tensor], exclude: Collection = ()) -> None:
    """Fill the weights of all linear layers by `initialise_` and their biases with zeros, except in `exclude`."""
    for module in network.modules():
        if isinstance(module, nn.Linear) and module not in exclude:
            initialise_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
