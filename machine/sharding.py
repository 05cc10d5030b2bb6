"""Conversion between FSDP2's sharded tensors and full ones. Plain tensors pass through unchanged."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one. This is a collective: all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """This process's shard as a plain tensor that shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a full tensor, sharded like `like`."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def gather(tensors: Mapping[str, Tensor], memory: dict[str, Tensor], *, keep: bool) -> None:
    """Copy full tensors to the CPU, one at a time, into `memory`, whose buffers are reused from the previous call
    (pinned if the tensors are on a GPU). Processes that do not `keep` the copies only take part in the collective."""
    for name in memory.keys() - tensors.keys():
        del memory[name]
    for name, tensor in tensors.items():
        full = full_tensor(tensor.detach())
        if not keep:
            continue
        copy = memory.get(name)
        if copy is None or (copy.shape, copy.dtype) != (full.shape, full.dtype):
            copy = memory[name] = torch.empty(full.shape, dtype=full.dtype, pin_memory=full.is_cuda)
        copy.copy_(full, non_blocking=full.is_cuda)
    if keep and torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
