"""Forward-mode differentiation of a model, for MeanFlow's Jacobian-vector product."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm

from diffusion.calls import eval_mode


@contextmanager
def differentiable_forward(model: object) -> Iterator[None]:
    """A context in which the model's forward pass supports forward-mode differentiation.

    The model is in eval mode, as in sampling: stochastic depth is off, and batch norms do not mix samples. It runs
    uncompiled, because generated kernels have no forward-mode derivatives. Norms run in float32, because the tangents
    of bfloat16 norms are float32, which matrix products with bfloat16 reject.
    """
    load_forward_rules()
    parts = model.modules() if isinstance(model, nn.Module) else ()
    norms = [part for part in parts if isinstance(part, nn.LayerNorm | nn.GroupNorm | _BatchNorm)]
    to_float32 = lambda norm, inputs: inputs[0].to(torch.promote_types(inputs[0].dtype, torch.float32))  # noqa: E731
    hooks = [norm.register_forward_pre_hook(to_float32) for norm in norms]
    try:
        with eval_mode(model), torch.compiler.set_stance("force_eager"), forward_ad.dual_level():
            yield
    finally:
        for hook in hooks:
            hook.remove()


@cache
def load_forward_rules() -> None:
    """Have torch load its rules of forward-mode differentiation, and ignore the warning that this raises in torch."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.filterwarnings("ignore", message=r"`?torch\.jit\.", category=FutureWarning)
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))
