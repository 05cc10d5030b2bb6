"""Choice of precision: bf16 on devices with native bf16 instructions, float32 elsewhere."""

import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from settings import check_name

if TYPE_CHECKING:
    from accelerate import Accelerator  # whose import takes seconds

MIXED = {"fp32": "no", "bf16": "bf16"}  # our names -> Accelerate's
# Values of ONEDNN_MAX_CPU_ISA that disable bf16 instructions in matrix products.
WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")


def choose_precision(asked: str, device: torch.device) -> str:
    """Resolve 'auto' to 'bf16' if the device has instructions for it, else to 'fp32'; others stay."""
    check_name("precision", asked, ("auto", *MIXED))
    if asked == "auto":
        return "bf16" if has_bf16(device)[0] else "fp32"
    return asked


def precision_of(accelerator: "Accelerator") -> str:
    return "bf16" if accelerator.mixed_precision == "bf16" else "fp32"


def set_float32(precision: str) -> None:
    """Set how CUDA computes float32 operations. With 'bf16', convolutions (of the autoencoder and Inception) may use
    TF32; matrix products, on which scores, Muon and likelihoods depend, never do. With 'fp32' nothing uses TF32. cuDNN
    picks the fastest convolution kernel for each shape."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = precision == "bf16"
    torch.backends.cuda.matmul.allow_tf32 = False


def to_float64(values: Tensor) -> Tensor:
    """Convert to float64, on the CPU if the device (such as Apple's) does not support it."""
    try:
        return values.double()
    except TypeError:
        return values.cpu().double()


@contextmanager
def inference_autocast(device: torch.device, precision: str, *models: nn.Module | None) -> Iterator[None]:
    """Context of inference in 'bf16' or 'fp32', without gradients. Autocast only caches the bf16 copies of weights that
    require gradients, so frozen weights are marked as such inside, or each call would cast them again."""
    if precision != "bf16":  # devices without bf16 may not have autocast either
        with torch.no_grad():
            yield
        return
    frozen = [weight for model in filter(None, models) for weight in model.parameters() if not weight.requires_grad]
    with torch.autocast(device.type, torch.bfloat16), torch.no_grad():
        for weight in frozen:
            weight.requires_grad_()
        try:
            yield
        finally:
            for weight in frozen:
                weight.requires_grad_(False)


def has_bf16(device: torch.device) -> tuple[bool, str]:
    """Whether the device has native bf16 instructions, and a phrase that says why."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return native, "this GPU has bf16" if native else "this GPU has no bf16 of its own"
    if device.type != "cpu":
        return False, f"bf16 on {device.type} has not been tried"
    if platform.machine().lower() in ("arm64", "aarch64"):
        native = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
        if native and (limit in WITHOUT_BF16 or "AVX512" not in torch.backends.cpu.get_cpu_capability()):
            return False, "this CPU's bf16 instructions are switched off by the environment"
    return native, "this CPU has bf16 instructions" if native else "this CPU has no bf16 instructions"


def bf16_warning(precision: str, device: torch.device, flag: str) -> str | None:
    """A warning if bf16 was requested where it is emulated, with the measured slowdown."""
    if precision != "bf16" or has_bf16(device)[0]:
        return None
    return (
        f"warning: {flag} bf16: it is emulated here, and a matrix product takes {slowdown_of_bf16(device):.0f} times "
        f"as long as in float32; {flag} auto takes what this machine has instructions for"
    )


def slowdown_of_bf16(device: torch.device) -> float:
    """Measured ratio of the times of a matrix product in bf16 and in float32; hundreds if bf16 is emulated."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns where nvcc has no GPU
    from torch.utils.benchmark import Timer

    def time_of(dtype: torch.dtype) -> float:
        a = torch.ones(192, 192, device=device, dtype=dtype)
        timer = Timer("(a @ a)[0, 0].item()", globals={"a": a}, num_threads=1)
        return min(timer.blocked_autorange(min_run_time=0.025).times)

    return time_of(torch.bfloat16) / time_of(torch.float32)
