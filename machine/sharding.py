"""FSDP2 leaves each process a part of every tensor: whole tensors from parts, and back. Plain tensors pass through."""

from collections.abc import Mapping

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


def gather(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Whole contiguous copies on the CPU, one at a time; a process that does not `keep` them only takes part."""
    full = ((name, whole(tensor.detach())) for name, tensor in tensors.items())
    return {name: tensor.cpu().contiguous() for name, tensor in full if keep}


def is_sharded(model: nn.Module) -> bool:
    """Whether this process has only a part of the parameters."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
