"""Optimizers of an autoencoder: AdamW, or Muon on its matrices with AdamW on the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from experiment.autoencoding.config import AutoencoderOptimConfig
from experiment.autoencoding.model import Autoencoding


class ConvolutionMuon(torch.optim.Muon):
    """Muon (Jordan et al. 2024) on weights of any number of axes, as matrices of a row an output channel.

    At small batches several times faster than AdamW alone (docs/log.md).
    """

    def __init__(self, weights: list[nn.Parameter], lr: float) -> None:
        self.weights = weights
        self.matrices = [nn.Parameter(weight.detach().flatten(1)) for weight in weights]  # the same memory
        super().__init__(self.matrices, lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step by the weights' gradients."""
        for matrix, weight in zip(self.matrices, self.weights, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        return super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of weights and matrices."""
        super().zero_grad(set_to_none)
        for weight in self.weights:
            weight.grad = None


def autoencoder_optimizers(model: Autoencoding, config: AutoencoderOptimConfig) -> dict[str, torch.optim.Optimizer]:
    """By name, for what is trained. The first and last layers, whose rows are colours, are AdamW's."""
    autoencoder = model.autoencoder
    ends = {autoencoder.encoder.conv_in.weight, autoencoder.decoder.conv_out.weight}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1 and parameter not in ends]
    if config.muon_lr is None:
        return {"adamw": _adamw(trained, config.lr, config.betas, config.weight_decay)}
    rest = [parameter for parameter in trained if parameter.ndim <= 1 or parameter in ends]
    return {
        "muon": ConvolutionMuon(matrices, config.muon_lr),
        "adamw": _adamw(rest, config.lr, config.betas, config.weight_decay),
    }


def discriminator_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW with the moments that adversarial training is used to."""
    return _adamw(list(model.parameters()), lr, (0.5, 0.9), 0.0)


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Share of the peak learning rate, at which the optimizer was built."""
    for group in optimizer.param_groups:
        group["lr"] = factor * optimizer.defaults["lr"]


def _adamw(
    parameters: list[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr, betas, weight_decay=weight_decay, fused=True)
