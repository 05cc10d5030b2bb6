"""A model made ready for training: norms over all processes, compiled blocks, how long an epoch will take."""

import time
from functools import partial
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

from diffusion import Diffusion
from experiment.config import TrainConfig
from machine.precision import precision_of
from models import ModelSpec
from models.backbone import MULTIPLYING, Backbone
from models.layers.launches import AT_ONCE, Casting, Uncast
from models.layers.style import DropPath

LONG = 600  # seconds of an epoch


def share_batch_norms(model: Backbone, accelerator: Accelerator) -> Backbone:
    """With several processes, batch norms see the whole batch on GPUs; on CPUs it says that each sees its own share.
    Says also what else depends on how many there are."""
    tell_of_draws(model, accelerator)
    has_batch_norm = any(isinstance(module, _BatchNorm) for module in model.modules())
    if accelerator.gradient_accumulation_steps > 1 and has_batch_norm:
        accelerator.print(
            "Batch norms see each micro-batch by itself: results depend on --train.grad_accumulation. XSwin with "
            "--model_args.conv_norm group does not."
        )
    if accelerator.num_processes == 1 or not has_batch_norm:
        return model
    if accelerator.device.type == "cuda":
        return cast(Backbone, nn.SyncBatchNorm.convert_sync_batchnorm(model))
    accelerator.print(
        "Batch norms see each process's own share of a batch on CPUs: results depend on the number of processes. "
        "XSwin with --model_args.conv_norm group does not."
    )
    return model


def tell_of_draws(model: Backbone, accelerator: Accelerator) -> None:
    """Where a batch comes in several parts, that each draws its masks of stochastic depth and dropout by itself."""
    parts = list(model.modules())
    shares = [part.drop_prob for part in parts if isinstance(part, DropPath)]
    shares += [part.p for part in parts if isinstance(part, _DropoutNd)]
    if accelerator.num_processes * accelerator.gradient_accumulation_steps > 1 and any(shares):
        accelerator.print(
            "Stochastic depth and dropout draw other masks in another number of processes or micro-batches: results "
            "depend on it, by chance. Without them (--model_args.drop_path 0) they do not."
        )


def recompute_blocks(model: Backbone, device: torch.device) -> None:
    """Have the backward pass compute the backbone's blocks again, with the same random numbers (Chen et al. 2016): less
    memory, a third more arithmetic. A ValueError where that would be another training."""
    blocks = model.repeated_blocks()
    if any(isinstance(module, _BatchNorm) for block in blocks for module in block.modules()):
        raise ValueError("--train.recompute true: batch norms in this --model's blocks would count each batch twice")
    if device.type == "mps":
        raise ValueError("--train.recompute true: torch does not draw the same random numbers again on mps")
    for block in blocks:  # of the call, within what FSDP and hooks do before and after it
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(model: Backbone) -> None:
    """Compile the backbone's repeated blocks in place: seconds, where compiling the whole takes minutes."""
    torch._dynamo.config.recompile_limit = 64
    for block in model.repeated_blocks():
        block.compile(dynamic=False)  # symbolic widths and grids take minutes to reason about


def join_casts(model: Backbone, config: TrainConfig, accelerator: Accelerator) -> None:
    """Cast weights for autocast by the block, where each cast is a launch (`models.layers.launches`). Compiled blocks
    join theirs themselves; blocks that are computed again, parts of weights and adapters keep autocast's own."""
    joined = accelerator.device.type in AT_ONCE and precision_of(accelerator) == "bf16"
    apart = config.compile or config.recompute or config.adapter
    if joined and not apart and accelerator.distributed_type is not DistributedType.FSDP:
        cast_at_once(model)


def cast_at_once(model: Backbone) -> None:
    """`Casting` of the layers of each block, and of those that lie in none."""
    placed: set[nn.Module] = set()
    for module in (*model.repeated_blocks(), model):
        uncast = {part for each in module.modules() if isinstance(each, Uncast) for part in each.modules()}
        layers = [part for part in module.modules() if isinstance(part, MULTIPLYING) and part not in placed | uncast]
        placed.update(layers)
        if layers:
            Casting(module, layers)


def forecast(model: nn.Module, spec: ModelSpec, diffusion: Diffusion, accelerator: Accelerator, num_images: int) -> str:
    """An epoch's time on a CPU, in words, by that of a batch's loss. Model and random state stay as they are."""
    batch_size, seconds = 8, 0.0
    x_0, y = torch.zeros(batch_size, spec.in_channels, *spec.input_size), torch.zeros(batch_size, dtype=torch.int64)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), accelerator.autocast():
        model.eval()
        for _ in range(2):  # the first one warms up
            began = time.perf_counter()
            diffusion.training_loss(model, x_0, y)
            seconds = 3 * (time.perf_counter() - began) / batch_size * num_images / accelerator.num_processes
        model.train()
    duration = f"{seconds / 60:.0f} minutes" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} hours"
    words = f"an epoch takes about {duration if seconds > 90 else f'{seconds:.0f} s'} on this CPU"
    if seconds > LONG:
        words += "; made for CPUs are --config configs/quickstart.yaml and --model XSwin-S"
    return words
