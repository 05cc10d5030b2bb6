"""torch.compile of a backbone's repeated blocks, in training and in sampling."""

import torch
from torch import nn

from models.backbone import Backbone
from settings import check_name


def has_compiler() -> bool:
    """Whether torch.compile finds the C++ compiler that it needs."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # here, as the import takes seconds
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


def compile_blocks(
    model: nn.Module, kind: str = "blocks", *, flag: str = "--compile", backend: str = "inductor"
) -> None:
    """Compile the repeated blocks of a backbone, which may be wrapped, in place; blocks that are compiled already stay
    as they are. That takes seconds where compiling the whole model takes minutes.

    Args:
        kind: 'blocks', or 'graphs' to launch each block as a CUDA graph too. Graphs are for inference, and
            `torch.compiler.cudagraph_mark_step_begin` has to be called before each step of a sampler
        flag: the setting that asks for it, for messages
        backend: torch.compile's

    Raises:
        ValueError: for another kind, without a C++ compiler, and for graphs without a CUDA device
    """
    check_name(flag, kind, ("blocks", "graphs"))
    blocks = [block for part in model.modules() if isinstance(part, Backbone) for block in part.repeated_blocks()]
    device = next((weight.device.type for block in blocks for weight in block.parameters()), "cpu")
    if kind == "graphs" and device != "cuda":
        raise ValueError(f"{flag} graphs: CUDA graphs need a CUDA device, and this one is {device}; give blocks")
    if backend == "inductor" and not has_compiler():
        raise ValueError(f"{flag}: torch finds no C++ compiler; install g++, name one in CXX, or leave {flag} out")
    torch._dynamo.config.recompile_limit = 256  # each width, grid, shift and batch size counts, over all blocks
    for block in blocks:
        if block._compiled_call_impl is None:
            # With symbolic shapes, compiling takes minutes.
            block.compile(backend=backend, dynamic=False, mode="reduce-overhead" if kind == "graphs" else None)
