"""float64, and where it is to be had: Apple's devices have none, so what needs it is computed on the CPU there."""

from functools import cache

import torch
from torch import Tensor


@cache
def has_float64(device: torch.device) -> bool:
    """Whether tensors of float64 can lie there."""
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except TypeError:
        return False
    return True


def exact(values: Tensor) -> Tensor:
    """The values in float64: where they are, if that can be, else on the CPU."""
    return (values if has_float64(values.device) else values.cpu()).double()
