"""Exponential moving average of a model: parameters and buffers, in float32."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn


class EMA:
    """`average <- decay * average + (1 - decay) * value`, with `decay = min(max_decay, (1 + step) / (10 + step))`.

    The rising decay lets short runs forget their initialisation. Buffers (batch-norm statistics) are averaged like
    parameters; integer ones are copied. `ema.model` is in eval mode and ready to use.
    """

    def __init__(self, model: nn.Module, max_decay: float) -> None:
        if not 0 <= max_decay < 1:
            raise ValueError(f"--train.ema_decay {max_decay} must lie in [0, 1)")
        self.max_decay = max_decay
        self.model = deepcopy(model).float().eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after optimizer step `step` (from 0)."""
        decay = min(self.max_decay, (1 + step) / (10 + step))
        averages, values = [], []
        current = model.state_dict()
        for name, average in self.model.state_dict().items():
            if average.is_floating_point():
                averages.append(average)
                values.append(current[name].to(average.dtype))
            else:
                average.copy_(current[name])
        torch._foreach_lerp_(averages, values, 1 - decay)

    @torch.no_grad()
    def drift(self, model: nn.Module) -> float:
        """How far the average lags behind the weights: norm of the difference over norm of the weights."""
        pairs = list(zip(self.model.parameters(), model.parameters(), strict=True))
        gap = torch.stack(torch._foreach_norm([average - value for average, value in pairs])).norm()
        return (gap / torch.stack(torch._foreach_norm([value.detach() for _, value in pairs])).norm()).item()
