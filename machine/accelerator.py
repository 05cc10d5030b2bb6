"""Open Accelerate: choose device, precision and threads, and report them in one line."""

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
from jaxtyping import Int64
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from tqdm import tqdm

from machine.allocator import reuse_freed_memory
from machine.precision import MIXED, bf16_warning, choose_precision, has_bf16, precision_of, set_float32
from machine.threads import adapt_waiting, divide_cores

T = TypeVar("T")
TIMEOUT = timedelta(hours=2)  # the others wait while one process encodes or scores; NCCL's default is ten minutes


def open_accelerator(
    precision: str, *, flag: str = "--precision", in_parts: bool = False, grad_accumulation: int = 1, **options: Any
) -> Accelerator:
    """Create the Accelerator in the given precision and print a line that describes it. The launcher only decides on
    devices and processes; its other settings are overridden.

    Args:
        precision: 'auto', 'fp32' or 'bf16'
        flag: the command's name for this setting, for messages
        in_parts: some parameters get no gradient in some steps
        options: passed on to `Accelerator`
    """
    device = default_device()
    # The only buffers that change are batch norms', which `share_batch_norms` synchronises on GPUs.
    ddp = DistributedDataParallelKwargs(
        find_unused_parameters=in_parts, broadcast_buffers=device.type != "cuda", gradient_as_bucket_view=True
    )
    accelerator = Accelerator(
        mixed_precision=MIXED[choose_precision(precision, device)],
        dynamo_backend="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=grad_accumulation),
        kwargs_handlers=[ddp, InitProcessGroupKwargs(timeout=TIMEOUT)],
        **options,
    )
    if accelerator.is_fsdp2 and accelerator.state.fsdp_plugin is not None:
        if accelerator.state.fsdp_plugin.activation_checkpointing:  # recomputes with other random numbers
            raise ValueError(
                "fsdp_activation_checkpointing: stochastic depth and dropout would have wrong gradients; take it out "
                "of the launcher's configuration and train with --train.recompute true"
            )
        # Gather parameters in float32 and leave bf16 to autocast, so that results are the same as without FSDP.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    if device.type == "cuda":
        set_float32(precision_of(accelerator))
    line = describe_device(accelerator)
    if device.type == "cpu":
        reuse_freed_memory()
        divide_cores(num_processes_here(accelerator))
        say = tqdm.write if accelerator.is_main_process else lambda line: None
        line += f", {adapt_waiting(say)}"
    accelerator.print(line)
    if warning := bf16_warning(precision, device, flag):
        accelerator.print(warning)
    return accelerator


def from_main(accelerator: Accelerator, find: Callable[[], T]) -> T:
    """Call `find` on the main process and return its result on all. If it fails, the other processes exit silently.
    Use it for whatever depends on the file system: processes that see different files would deadlock."""
    value, error = None, None
    if accelerator.is_main_process:
        try:
            value = find()
        except Exception as caught:  # of any kind, as the others wait for the broadcast
            error = caught
    has_failed = error is not None
    if accelerator.num_processes > 1:
        value, has_failed = broadcast_object_list([value, has_failed])
    if has_failed:
        raise error or SystemExit(2)
    return cast("T", value)


def indices_of_process(num: int, accelerator: Accelerator) -> Int64[Tensor, " m"]:
    """Of so many indices those that fall to this process, dealt out in turn."""
    return torch.arange(num)[accelerator.process_index :: accelerator.num_processes]


def num_processes_here(accelerator: Accelerator) -> int:
    """Number of the run's processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or accelerator.num_processes)


def default_device() -> torch.device:
    """The type of device that Accelerate will choose: any accelerator, or the CPU."""
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    accelerator = None if on_cpu else torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")


def describe_device(accelerator: Accelerator) -> str:
    """Device and precision, with the reason for the precision; also written to records."""
    device, name = accelerator.device, precision_of(accelerator)
    native, why = has_bf16(device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{where}: {name} ({why if (name == 'bf16') == native else 'as asked for'})"
