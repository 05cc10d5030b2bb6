"""FSDP2 leaves each process a part of every tensor: whole tensors from parts, and parts from whole ones.

Plain tensors pass through, so that what saves, loads and averages is written once.
"""

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor


def keep_float32(accelerator: Accelerator) -> None:
    """Gather parts in float32 and let autocast choose where bf16 serves, as it does without FSDP: the same numbers."""
    if accelerator.is_fsdp2 and accelerator.state.fsdp_plugin is not None:
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which this process has a part; every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """This process's part, as a plain tensor that shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Of a tensor that every process has whole, the part that it has of `like`."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def gather(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Whole contiguous copies on the CPU, one at a time; a process that does not `keep` them only takes part."""
    gathered = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            gathered[name] = full.cpu().contiguous()
    return gathered


@torch.no_grad()
def load_whole(tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into those of the same names, or parts of them."""
    for name, tensor in tensors.items():
        tensor.copy_(part_like(weights[name], tensor))


def is_sharded(model: nn.Module) -> bool:
    """Whether this process has only a part of the parameters."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
