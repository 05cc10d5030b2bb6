"""Optimizers of an autoencoder: AdamW, or Muon on its matrices with AdamW on the rest."""

from typing import Any

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
    muon = {} if config.muon_lr is None else {"muon": Muon(matrices, lr=config.muon_lr, weight_decay=0.0)}
    rest = [parameter for parameter in trained if not muon or parameter.ndim <= 1 or parameter in ends]
    of_adamw: dict[str, Any] = {"betas": config.betas, "weight_decay": config.weight_decay, "fused": True}
    return {**muon, "adamw": torch.optim.AdamW(rest, config.lr, **of_adamw)}


def discriminator_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW with the moments that adversarial training is used to."""
    return torch.optim.AdamW(model.parameters(), lr, (0.5, 0.9), weight_decay=0.0, fused=True)


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Share of the peak learning rate, at which the optimizer was built."""
    for group in optimizer.param_groups:
        group["lr"] = factor * optimizer.defaults["lr"]
