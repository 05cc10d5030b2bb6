"""Optimizers of an autoencoder: AdamW, or Muon on its matrices with AdamW on the rest."""

from __future__ import annotations

import torch
from torch import nn

from autoencoding.autoencoder_config import AutoencoderOptimConfig
from autoencoding.model import Autoencoding
from training.muon import Muon


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
        "muon": Muon(matrices, lr=config.muon_lr, weight_decay=0.0),
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
