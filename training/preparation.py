"""A model made ready for the devices: norms over all processes, compiled blocks."""

from typing import cast

import torch
from accelerate import Accelerator
from torch import nn

from models.backbone import Backbone


def share_batch_norms(model: Backbone, accelerator: Accelerator) -> Backbone:
    """With several processes, batch norms see the whole batch where torch can do that (GPUs); on CPUs it says once that
    each sees its own share."""
    has_batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    if accelerator.num_processes == 1 or not has_batch_norm:
        return model
    if accelerator.device.type == "cuda":
        return cast(Backbone, nn.SyncBatchNorm.convert_sync_batchnorm(model))
    accelerator.print(
        "Batch norms see each process's own share of a batch on CPUs: results depend on the number of processes. "
        "XSwin with --model_args.conv_norm group does not."
    )
    return model


def compile_blocks(model: Backbone) -> None:
    """Compile the backbone's repeated blocks in place, one by one: those of one width, grid and shift share their code.

    It takes seconds where compiling the whole takes minutes. A backbone that names no such blocks stays as it is.
    """
    torch._dynamo.config.recompile_limit = 64
    for block in model.repeated_blocks():
        block.compile(dynamic=False)  # symbolic widths and grids take minutes to reason about
