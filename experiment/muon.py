"""Muon (Jordan et al. 2024): momentum whose matrices are made orthogonal, so that all directions are learned alike.

`torch.optim.Muon` and timm's compute in bf16 whatever the machine, which takes tens of times as long where that is
emulated; this one computes in it where the machine has instructions for it. It also takes weights of more than two
axes, as matrices of a row an output channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from experiment.precision import has_bf16

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration: steep at 0, so that five steps do


class Muon(torch.optim.Optimizer):
    """Steps of one root mean square whatever a matrix's sides, that of AdamW (Liu et al. 2025, "Muon is Scalable for
    LLM Training", eq. 4), so that learning rates made for AdamW fit.

    Raises:
        ValueError: for a parameter with less than two axes.
    """

    def __init__(self, weights: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(weights, {"lr": lr, "momentum": momentum})
        if any(weight.ndim < 2 for group in self.param_groups for weight in group["params"]):
            raise ValueError("Muon takes matrices and convolutions; give the rest to AdamW")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step by the weights' gradients."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, weight.grad.flatten(1), group["lr"], group["momentum"])
        return loss

    def _move(self, weight: nn.Parameter, gradient: Tensor, lr: float, momentum: float) -> None:
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        ahead = gradient.lerp(average, momentum)  # Nesterov's
        direction = orthogonalise(ahead, torch.bfloat16 if has_bf16(weight.device)[0] else torch.float32)
        weight.add_(direction.view_as(weight), alpha=-lr * 0.2 * max(ahead.shape) ** 0.5)


def orthogonalise(matrix: Float[Tensor, "m n"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "m n"]:
    """U V^T of a matrix U S V^T, near enough: five Newton-Schulz steps leave singular values between 0.7 and 1.2."""
    a, b, c = COEFFICIENTS
    x = matrix.to(dtype) if matrix.shape[0] <= matrix.shape[1] else matrix.to(dtype).T
    x = x / x.norm().clamp(min=1e-7)  # singular values up to 1
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if matrix.shape[0] <= matrix.shape[1] else x.T).to(matrix.dtype)
