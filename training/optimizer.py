"""The optimizer of a backbone, its rate at each step, and how many steps there are."""

import math
from collections.abc import Callable
from typing import Any

import torch

from experiment.config import OptimConfig, TrainConfig
from models.backbone import Backbone
from training.muon import Muon, split_for_muon


def build_optimizer(model: Backbone, config: OptimConfig) -> torch.optim.Optimizer:
    """Fused AdamW, with Muon for the blocks' matrices where asked for; rates are set each step by `set_learning_rate`.

    Weights decay, where asked for, in the parameters that the backbone says (`param_groups`).

    Raises:
        ValueError: for Muon on a backbone without such matrices.
    """
    of_adamw: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
    matrices, rest = ([], list(model.parameters())) if config.muon_lr is None else split_for_muon(model)
    groups: list[dict[str, Any]] = [{"params": rest}]
    if config.weight_decay > 0:
        left = {id(parameter) for parameter in rest}
        groups = [{**each, "params": [p for p in each["params"] if id(p) in left]} for each in model.param_groups()]
        groups = [group for group in groups if group["params"]]
    if config.muon_lr is None:
        optimizer = torch.optim.AdamW(groups, fused=True, **of_adamw)
    else:
        optimizer = Muon(matrices, groups, lr_scale=config.muon_lr / config.lr, **of_adamw)
    if config.weight_decay > 0:  # files number parameters as without groups
        numbers = {id(parameter): number for number, parameter in enumerate([*matrices, *rest])}
        for group in optimizer.param_groups:
            group["numbers"] = [numbers[id(parameter)] for parameter in group["params"]]
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of the next step, of each group by its share."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def learning_rate(config: OptimConfig, step: int, num_steps: int, epoch_steps: float = 1.0) -> float:
    """A function of the step alone: linear warm-up, then the configured decay until the last step.

    A training in phases has a warm-up and a decay in each: `step` and `num_steps` are the phase's. An epoch has
    `epoch_steps` of them, not always a whole number.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    return config.lr * DECAYS[config.decay](progress, step / epoch_steps, config)


DECAYS: dict[str, Callable[[float, float, OptimConfig], float]] = {  # of the phase's progress and epochs
    "constant": lambda progress, epochs, config: 1.0,
    "cosine": lambda progress, epochs, config: 0.5 * (1 + math.cos(math.pi * progress)),
    "step": lambda progress, epochs, config: config.decay_factor ** (epochs // config.decay_epochs),
}


def num_training_steps(config: TrainConfig, num_images: int) -> int:
    """Optimizer steps of the run: as asked, or enough for the epochs, the last one whole."""
    return config.num_steps or -(-(config.num_epochs or 100) * num_images // config.batch_size)
