"""The optimizer of a backbone, the learning-rate schedule and the number of steps."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from experiment.config import DEFAULT_EPOCHS, OptimConfig, TrainConfig
from models.backbone import Backbone
from training.muon import Muon, split_for_muon


def build_optimizer(model: Backbone, config: OptimConfig) -> torch.optim.Optimizer:
    """Create fused AdamW or, with `muon_lr`, Muon for the matrices in blocks and AdamW for the rest. The backbone
    decides which parameters have weight decay."""
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
    parts = ([], model.parameters()) if config.muon_lr is None else split_for_muon(model)
    matrices, rest = ([weight for weight in part if weight.requires_grad] for part in parts)
    for_adamw = set(rest)
    groups = [{**group, "params": [p for p in group["params"] if p in for_adamw]} for group in model.param_groups()]
    groups = [group for group in groups if group["params"]]
    if config.muon_lr is None:
        optimizer = torch.optim.AdamW(groups, fused=True, **options)
    else:
        optimizer = Muon(matrices, groups, muon_lr=config.muon_lr, **options)
    numbers = {parameter: number for number, parameter in enumerate([*matrices, *rest])}
    for group in optimizer.param_groups:  # checkpoints number parameters as if there were no groups
        group["numbers"] = [numbers[parameter] for parameter in group["params"]]
    return optimizer


class Optimizers(dict[str, torch.optim.Optimizer]):
    """Several optimizers that step together, by their names in checkpoints."""

    def scale_learning_rates(self, factor: float) -> None:
        """Set the learning rate of each group to a multiple of the one that it was created with."""
        for group in [group for optimizer in self.values() for group in optimizer.param_groups]:
            group["lr"] = factor * group.setdefault("initial_lr", group["lr"])

    def step(self) -> None:
        for optimizer in self.values():
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.values():
            optimizer.zero_grad()


def build_optimizers(model: Backbone, heads: nn.Module, config: OptimConfig) -> Optimizers:
    """Create the optimizer of the backbone and, if the objective has heads, AdamW for these."""
    optimizers = Optimizers(optimizer=build_optimizer(model, config))
    if weights := [weight for weight in heads.parameters() if weight.requires_grad]:
        options: dict[str, Any] = {"betas": config.betas, "weight_decay": config.weight_decay, "fused": True}
        optimizers["heads_optimizer"] = torch.optim.AdamW(split_weight_decay(weights), config.lr, **options)
    return optimizers


def split_weight_decay(weights: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """Divide parameters into a group with weight decay and one without: norms, biases and scalars."""
    groups: list[dict[str, Any]] = [{"params": [], "numbers": []}, {"params": [], "numbers": [], "weight_decay": 0.0}]
    for number, weight in enumerate(weights):  # checkpoints number parameters as if there were no groups
        group = groups[weight.ndim < 2]
        group["params"].append(weight)
        group["numbers"].append(number)
    return [group for group in groups if group["params"]]


def learning_rate(config: OptimConfig, step: int, num_steps: int, epoch_steps: float = 1.0) -> float:
    """Learning rate of a step: linear warm-up, then decay over a phase's steps; `epoch_steps` make an epoch."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.decay == "cosine":
        progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
        return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
    if config.decay == "linear":
        return config.lr * min(1.0, (num_steps - step) / (config.decay_share * num_steps))
    if config.decay == "step":
        return config.lr * config.decay_factor ** (step / epoch_steps // config.decay_epochs)
    return config.lr


def num_training_steps(config: TrainConfig, num_images: int) -> int:
    """Number of optimizer steps: `num_steps` if set, else enough for `num_epochs`, rounded up."""
    return config.num_steps or -(-(config.num_epochs or DEFAULT_EPOCHS) * num_images // config.batch_size)
