"""Muon (Jordan et al. 2024): momentum whose matrices are orthogonalised, so that all directions are learned equally.

`torch.optim.Muon` and timm's compute in bf16 even on devices that emulate it. This one computes in float32 there. It
also accepts weights of more than two axes, as matrices with a row per output channel, and includes AdamW for all other
parameters.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from machine.precision import has_bf16
from machine.sharding import full_tensor, shard_like
from models.backbone import Backbone

STEPS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)  # of the quintic iteration, so steep at 0 that five steps suffice


class Muon(torch.optim.AdamW):
    """Muon for `matrices` and AdamW for the `rest`, parameters or groups of them. Muon's steps are scaled to the root
    mean square of AdamW's (Liu et al. 2025, "Muon is Scalable for LLM Training", eq. 4), and `muon_lr` is `lr` by
    default. Weight decay applies to both."""

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        rest: Sequence[nn.Parameter] | Sequence[dict[str, Any]] = (),
        *,
        lr: float,
        muon_lr: float | None = None,
        momentum: float = 0.95,
        **of_adamw: Any,
    ) -> None:
        if not matrices or any(matrix.ndim < 2 for matrix in matrices):
            raise ValueError("--optim.muon_lr: Muon takes matrices, and this model has none for it; leave it out")
        groups: list[Any] = [{"params": matrices, "momentum": momentum, "lr": lr if muon_lr is None else muon_lr}]
        groups += rest if all(isinstance(group, dict) for group in rest) else [{"params": rest}]
        super().__init__(groups, lr=lr, fused=True, **of_adamw)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        groups = self.param_groups
        dtype = torch.bfloat16 if has_bf16(groups[0]["params"][0].device)[0] else torch.float32
        for group in groups:
            for weight in group["params"] if "momentum" in group else ():
                if weight.grad is not None:
                    self._update(weight, group, dtype)
        try:
            self.param_groups = [group for group in groups if "momentum" not in group]
            super().step()
        finally:
            self.param_groups = groups
        return loss

    def _update(self, weight: nn.Parameter, group: dict[str, Any], dtype: torch.dtype) -> None:
        state, gradient, momentum = self.state[weight], weight.grad, group["momentum"]
        assert gradient is not None
        if not state:
            state["step"] = torch.zeros(())  # required to load the state into an AdamW
            state["momentum_buffer"] = torch.zeros_like(weight)
        state["step"] += 1
        average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        nesterov = full_tensor(gradient.lerp(average, momentum))  # gathered if the weight is sharded
        matrix = nesterov.flatten(1)
        direction = shard_like(orthogonalise(matrix, dtype).view_as(nesterov), weight)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(direction, alpha=-group["lr"] * 0.2 * max(matrix.shape) ** 0.5)


def orthogonalise(matrix: Float[Tensor, "m n"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "m n"]:
    """Approximate U V^T for a matrix U S V^T: five Newton-Schulz steps give singular values between 0.7 and 1.2."""
    is_wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix.to(dtype) if is_wide else matrix.to(dtype).T
    x = x / x.norm().clamp(min=1e-7)  # so that singular values do not exceed 1
    x = _newton_schulz_gram(x) if 2 * x.shape[0] <= x.shape[1] and dtype == torch.float32 else _newton_schulz(x)
    return (x if is_wide else x.T).to(matrix.dtype)


def _newton_schulz(x: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _newton_schulz_gram(x: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """The same iteration on the smaller Gram matrix: `X_k = Q_k X`, where the `Q_k` are polynomials of `X X^T` and so
    commute. It is 1.3 to 1.8 times as fast for n = 3m and 4m, but squares the condition number, too much for bf16."""
    a, b, c = COEFFICIENTS
    gram, q, polynomial = x @ x.T, torch.eye(len(x), device=x.device), None
    for _ in range(STEPS):
        if polynomial is not None:
            gram = polynomial @ gram @ polynomial
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal().add_(a)
        q = polynomial @ q
    return q @ x


def split_for_muon(model: Backbone) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split parameters into the linear weights of repeated blocks, for Muon, and all others."""
    layers = [layer for block in model.repeated_blocks() for layer in block.modules() if isinstance(layer, nn.Linear)]
    weights = {layer.weight for layer in layers}
    matrices = [parameter for parameter in model.parameters() if parameter in weights]
    return matrices, [parameter for parameter in model.parameters() if parameter not in weights]
