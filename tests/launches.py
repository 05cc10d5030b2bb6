"""Count the kernels that a model launches on a GPU, without a GPU.

The model runs on fake CUDA tensors, which have shapes but no values. Every operation that is not a view counts as one
launch. Torch chooses the attention kernel by the GPU's abilities; here it is the fastest that shapes and types allow.

PYTHONPATH=. python tests/launches.py XSwin 8 training      (or sampling; 8 is the side of the latents)
"""

import sys
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from models import create_model
from models.layers import window
from training.preparation import fuse_weight_casts

ROOT = Path(__file__).resolve().parent.parent
aten = torch.ops.aten
NO_KERNEL = {"aten::_unsafe_view", "aten::empty", "aten::empty_like", "aten::new_empty", "aten::promote_types"}


class Launches(TorchDispatchMode):
    """Counts operations that launch a kernel: by name, and by name and the calling line of this project."""

    def __init__(self):
        super().__init__()
        self.names, self.lines, self.attention = Counter(), Counter(), Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name, returns = operation.name().rpartition(".")[0] or operation.name(), operation._schema.returns
        is_view = any(value.alias_info is not None and not value.alias_info.is_write for value in returns)
        if not is_view and name not in NO_KERNEL and not name.startswith("prim::"):
            name = name.removeprefix("aten::")
            self.names[name] += 1
            self.lines[f"{name} {caller()}"] += 1
        return operation(*args, **(kwargs or {}))

    def attend(self, q, k, v, attn_mask=None, scale=None):
        """Replace torch's attention by the kernel that it would choose on a GPU.

        Fused kernels need four axes, 16-bit types and a head size that 8 divides. Flash attention takes no bias; the
        memory-efficient kernel takes one whose rows are a multiple of 16 bytes apart.
        """
        if torch.is_autocast_enabled("cuda"):
            q, k, v, attn_mask = (None if x is None else x.to(torch.bfloat16) for x in (q, k, v, attn_mask))
        can_fuse = q.ndim == 4 and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0
        kernel = "math" if not can_fuse else "flash" if attn_mask is None else "efficient"
        self.attention[f"{kernel} {q.shape[1]} x {q.shape[2]}"] += 1
        if kernel == "flash":
            return aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]
        if kernel == "efficient":
            if padding := -attn_mask.shape[-1] % 8:
                attn_mask = F.pad(attn_mask, (0, padding))[..., : attn_mask.shape[-1]]
            attn_mask = attn_mask.expand(*q.shape[:-1], k.shape[-2])
            return aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, True, scale=scale)[0]
        return aten._scaled_dot_product_attention_math(q, k, v, attn_mask, scale=scale)[0]


def caller() -> str:
    """File and line of the innermost frame of this project."""
    frame = sys._getframe()
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(f"{ROOT}/") and ".venv" not in path and path != __file__:
            return f"{path.removeprefix(f'{ROOT}/')}:{frame.f_lineno}"
        frame = frame.f_back
    return "torch"


def count_launches(model, batch_size=128) -> Launches:
    """Count the launches of a forward pass in bf16, in training or eval mode.

    The second pass is counted: by then masks are cached, and in sampling autocast has cached the cast weights, while in
    training they have changed and are cast again.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        state = {
            name: torch.empty_like(tensor, device="cuda").requires_grad_(tensor.requires_grad)
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        }
        x_t = torch.empty(batch_size, model.in_channels, *model.input_size, device="cuda")
        t, y = (torch.empty(batch_size, dtype=torch.int64, device="cuda") for _ in range(2))
        keeps_casts = nullcontext() if model.training else autocast()
        with keeps_casts, torch.set_grad_enabled(model.training):
            for _ in range(2):
                launches = Launches()
                with mock.patch.object(F, "scaled_dot_product_attention", launches.attend), autocast(), launches:
                    torch.func.functional_call(model, state, (x_t, t, y))
    window._mask.__wrapped__.cache_clear()  # the caches hold fake tensors
    window._offsets.__wrapped__.cache_clear()
    return launches


@contextmanager
def autocast():
    """Turn autocast to bf16 on, as `torch.autocast("cuda", torch.bfloat16)` does, which without a GPU only warns."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


if __name__ == "__main__":
    name, side, mode = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    model = create_model(name, input_size=side, in_channels=4, out_channels=8, num_classes=101)
    if mode == "training":
        fuse_weight_casts(model.train())
    else:
        model.eval()
    launches = count_launches(model)
    print(sum(launches.names.values()), dict(launches.names.most_common()), dict(launches.attention), sep="\n")
    print(*(f"{number:4d}  {line}" for line, number in launches.lines.most_common()), sep="\n")
