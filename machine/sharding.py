"""FSDP2 leaves each process a part of every tensor: whole tensors from parts, and back. Plain tensors pass through."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


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


def gather(tensors: Mapping[str, Tensor], memory: dict[str, Tensor], *, keep: bool) -> None:
    """Whole contiguous copies on the CPU, one at a time; a process that does not `keep` them only takes part. `memory`
    has them, where it had those of before, whose pages are used again: pinned ones of a GPU's tensors."""
    for name in memory.keys() - tensors.keys():
        del memory[name]
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if not keep:
            continue
        copy = memory.get(name)
        if copy is None or (copy.shape, copy.dtype) != (full.shape, full.dtype):
            copy = memory[name] = torch.empty(full.shape, dtype=full.dtype, pin_memory=full.is_cuda)
        copy.copy_(full, non_blocking=full.is_cuda)
    if keep and torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()


def is_sharded(model: nn.Module) -> bool:
    """Whether this process has only a part of the parameters."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
