"""Prepare a model for training: synchronised batch norms, recomputed blocks, casts, and a forecast of the time."""

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
from models.layers.kernel_launches import FUSED_DEVICES, FusedWeightCasts, KeepFloat32
from models.layers.style import DropPath

SLOW_SECONDS, LARGE = 3600, 10e6  # trainings longer than this, of more parameters, get a hint at smaller configurations


def share_batch_norms(model: Backbone, accelerator: Accelerator) -> Backbone:
    """Synchronise batch norms over several GPUs. Print a note about everything that still depends on the number of
    processes or micro-batches, such as batch norms on CPUs."""
    note_random_masks(model, accelerator)
    has_batch_norm = any(isinstance(module, _BatchNorm) for module in model.modules())
    if accelerator.gradient_accumulation_steps > 1 and has_batch_norm:
        accelerator.print(
            "Batch norm statistics are per micro-batch: results depend on --train.grad_accumulation, but not with "
            "XSwin's --model_args.conv_norm group."
        )
    if accelerator.num_processes == 1 or not has_batch_norm:
        return model
    if accelerator.device.type == "cuda":
        return cast(Backbone, nn.SyncBatchNorm.convert_sync_batchnorm(model))
    accelerator.print(
        "On CPUs, batch norm statistics are per process: results depend on the number of processes, but not with "
        "XSwin's --model_args.conv_norm group."
    )
    return model


def note_random_masks(model: Backbone, accelerator: Accelerator) -> None:
    """If a batch is divided, print that each part samples its own masks of stochastic depth and dropout."""
    modules = list(model.modules())
    rates = [module.drop_prob for module in modules if isinstance(module, DropPath)]
    rates += [module.p for module in modules if isinstance(module, _DropoutNd)]
    if accelerator.num_processes * accelerator.gradient_accumulation_steps > 1 and any(rates):
        accelerator.print(
            "The random masks of stochastic depth and dropout depend on the number of processes and micro-batches; "
            "--model_args.drop_path 0 avoids this."
        )


def recompute_blocks(model: Backbone, device: torch.device) -> None:
    """Recompute the backbone's blocks in the backward pass (Chen et al. 2016), with the same random numbers. This takes
    less memory and a third more arithmetic. Raises ValueError if it would change the training."""
    blocks = model.repeated_blocks()
    if any(isinstance(module, _BatchNorm) for block in blocks for module in block.modules()):
        raise ValueError("--train.recompute true: batch norms in this --model's blocks would count each batch twice")
    if device.type == "mps":
        raise ValueError("--train.recompute true: torch does not draw the same random numbers again on mps")
    for block in blocks:  # only `forward`, inside the hooks of FSDP and others
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def fuse_casts_where_useful(model: Backbone, config: TrainConfig, accelerator: Accelerator) -> None:
    """Cast the weights of a block to bf16 together, which takes fewer kernel launches than autocast does (see
    `models.layers.kernel_launches`). Compiled blocks fuse their casts anyway; recomputed blocks, FSDP and adapters
    leave casting to autocast."""
    is_useful = accelerator.device.type in FUSED_DEVICES and precision_of(accelerator) == "bf16"
    has_own_casts = config.compile or config.recompute or config.adapter
    if is_useful and not has_own_casts and accelerator.distributed_type is not DistributedType.FSDP:
        fuse_weight_casts(model)


def fuse_weight_casts(model: Backbone) -> None:
    """Add a `FusedWeightCasts` to each repeated block, and one for the layers outside of them."""
    done: set[nn.Module] = set()
    for module in (*model.repeated_blocks(), model):
        uncast = {layer for part in module.modules() if isinstance(part, KeepFloat32) for layer in part.modules()}
        layers = [layer for layer in module.modules() if isinstance(layer, MULTIPLYING) and layer not in done | uncast]
        done.update(layers)
        if layers:
            FusedWeightCasts(module, layers)


def forecast(
    model: nn.Module,
    spec: ModelSpec,
    diffusion: Diffusion,
    accelerator: Accelerator,
    num_images: int,
    num_steps: int,
    images_per_step: int,
) -> str:
    """Estimate the time of a training on a CPU from the loss of a batch, in words; nothing is changed."""
    batch_size, per_image = 8, 0.0
    x_0, y = torch.zeros(batch_size, spec.in_channels, *spec.input_size), torch.zeros(batch_size, dtype=torch.int64)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), accelerator.autocast():
        model.eval()
        for _ in range(2):  # the first is a warm-up
            start = time.perf_counter()
            diffusion.training_loss(model, x_0, y)
            per_pass = (time.perf_counter() - start) / (diffusion.num_forward_passes - 2)  # no backward pass here
            per_image = diffusion.num_forward_passes * per_pass / batch_size / accelerator.num_processes
        model.train()
    seconds, epoch = per_image * num_steps * images_per_step, per_image * num_images
    message = f"{num_steps} steps take about {duration(seconds)} on this CPU, an epoch {duration(epoch)}"
    if seconds > SLOW_SECONDS and sum(weight.numel() for weight in model.parameters()) > LARGE:
        message += "; made for CPUs are --config configs/own_images.yaml and, for shapes, configs/quickstart.yaml"
    return message


def duration(seconds: float) -> str:
    """Format a duration as seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} hours"
