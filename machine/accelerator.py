"""What this machine offers to a run, found and said once: device, numbers, threads."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    parse_flag_from_env,
)
from torch.distributed.fsdp import MixedPrecisionPolicy
from tqdm import tqdm

from machine.precision import MIXED, choose_precision, has_bf16, precision_of, set_float32, warning_of
from machine.threads import deal_out_cores, start_waiting

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # while one process encodes its share, or scores for all; NCCL's own is ten minutes


def open_accelerator(
    precision: str, *, flag: str = "--precision", in_parts: bool = False, grad_accumulation: int = 1, **options: Any
) -> Accelerator:
    """Accelerate as launched, in the precision asked for, with all of the machine's cores; a first line says what it
    is. The launcher decides where to compute, and nothing else. `flag` is what the command calls its precision;
    `in_parts` trains parts of the model at a time."""
    device = default_device()
    # Buffers that change are batch norms', which agree by themselves where they are synchronised (`share_batch_norms`).
    ddp = DistributedDataParallelKwargs(
        find_unused_parameters=in_parts, broadcast_buffers=device.type != "cuda", gradient_as_bucket_view=True
    )
    accelerator = Accelerator(
        mixed_precision=MIXED[choose_precision(precision, device)],
        dynamo_backend="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=grad_accumulation),
        kwargs_handlers=[ddp, InitProcessGroupKwargs(timeout=PATIENCE)],
        **options,
    )
    if accelerator.is_fsdp2 and accelerator.state.fsdp_plugin is not None:
        if accelerator.state.fsdp_plugin.activation_checkpointing:  # it draws other random numbers the second time
            raise ValueError(
                "fsdp_activation_checkpointing: stochastic depth and dropout would have wrong gradients; take it out "
                "of the launcher's configuration and train with --train.recompute true"
            )
        # Parts are gathered in float32 and autocast chooses where bf16 serves, as without FSDP: the same numbers.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    if device.type == "cuda":
        set_float32(precision_of(accelerator))
    line = describe(accelerator)
    if device.type == "cpu":
        deal_out_cores(num_processes_here(accelerator))
        say = tqdm.write if accelerator.is_main_process else lambda line: None
        line += f", {start_waiting(say)}"
    accelerator.print(line)
    if warning := warning_of(precision, device, flag):
        accelerator.print(warning)
    return accelerator


def from_main(accelerator: Accelerator, find: Callable[[], T]) -> T:
    """What the main process finds, for all; its errors end the others too, without words. Were each to look for itself,
    one might wait for ever."""
    value, error = None, None
    if accelerator.is_main_process:
        try:
            value = find()
        except Exception as caught:  # of any kind: the others wait
            error = caught
    has_failed = error is not None
    if accelerator.num_processes > 1:
        value, has_failed = broadcast_object_list([value, has_failed])
    if has_failed:
        raise error or SystemExit(2)
    return cast("T", value)


def num_processes_here(accelerator: Accelerator) -> int:
    """The run's, on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or accelerator.num_processes)


def default_device() -> torch.device:
    """What Accelerate will take: a GPU of whatever make, or the CPU."""
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    accelerator = None if on_cpu else torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")


def describe(accelerator: Accelerator) -> str:
    """Device and numbers that a run computes in, and why those; for records."""
    device, name = accelerator.device, precision_of(accelerator)
    native, why = has_bf16(device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{where}: {name} ({why if (name == 'bf16') == native else 'as asked for'})"
