"""Adapters: train a few weights of a backbone and leave the others bitwise unchanged."""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from checkpoints.checkpoint import LABELS
from experiment.config import TrainConfig
from machine.randomness import seed_for
from models.backbone import Backbone
from training.objective import Objective

NAME = "default"  # peft's name for the adapter


def adapt(model: Backbone, config: TrainConfig, objective: type[Objective], accelerator: Accelerator) -> str:
    """Freeze a backbone except for its label embeddings and the weights of `config.adapter`; return a message with
    their number.

    `biases` trains all parameters without weight decay: biases, norms and scales, as in BitFit (Ben Zaken et al. 2022).
    In backbones with adaLN the biases of the modulators also shift, scale and gate each layer, as in DiffFit (Xie et
    al. 2023). `lora` (Hu et al. 2021) trains these and, for each linear layer of the repeated blocks, two matrices
    whose product of rank `adapter_rank` is added to its weight. The second matrix starts at zero, so the output does
    not change at first.
    """
    flag = f"--train.adapter {config.adapter}"
    if objective.trains_in_parts:
        raise ValueError(f"{flag}: this --diffusion.kind trains its backbone in parts; leave it out")
    if accelerator.distributed_type is DistributedType.FSDP:
        raise ValueError(f"{flag}: FSDP's parts are not merged with it; launch without FSDP, or leave it out")
    num_weights = numel(model.parameters())
    model.requires_grad_(False)
    if config.adapter == "lora":
        add_lora(model, config.adapter_rank, seed_for(config.seed, "adapter"))
    for group in model.param_groups():
        for weight in group["params"] if group.get("weight_decay") == 0 else ():
            weight.requires_grad_(True)
    embeddings = [weight for name, weight in model.named_parameters() if name.endswith(LABELS)]
    for weight in embeddings:
        weight.requires_grad_(True)
    num_trained = numel(weight for weight in model.parameters() if weight.requires_grad) - numel(embeddings)
    share, labels = num_trained / num_weights, f" and {numel(embeddings) / 1e6:.2f}M of labels" if embeddings else ""
    return f"{flag}: trains {num_trained / 1e6:.2f}M weights, {share:.1%} of {num_weights / 1e6:.1f}M{labels}"


def add_lora(model: Backbone, rank: int, seed: int) -> None:
    """Add LoRA to each linear layer of the repeated blocks that has more weights than the two matrices of the adapter,
    whose initial values depend on the seed."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("--train.adapter lora: peft is not installed; pip install -e '.[finetune]'") from error
    modules = {module for block in model.repeated_blocks() for module in block.modules()}
    linears = {module for module in modules if isinstance(module, nn.Linear)}
    targets = {layer for layer in linears if rank * (layer.in_features + layer.out_features) < layer.weight.numel()}
    if not targets:
        raise ValueError(
            f"--train.adapter lora: the blocks of {type(model).__name__} have no linear of rank above {rank}; take a "
            "smaller --train.adapter_rank, or --train.adapter biases"
        )
    names = [name for name, module in model.named_modules() if module in targets]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), model, NAME)


class Merged(nn.Module):
    """A view of a backbone with its adapter merged, under a plain backbone's names, for averages and checkpoints."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @torch.no_grad()
    def state_dict(self, *, keep_vars: bool = False) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        state = {
            name.replace(".base_layer.", "."): value
            for name, value in self.model.state_dict(keep_vars=keep_vars).items()
            if ".lora_" not in name
        }
        layers: Any = self.model.named_modules()
        for name, layer in layers:
            if hasattr(layer, "get_delta_weight"):  # one with peft's adapter
                state[f"{name}.weight"] = layer.base_layer.weight + layer.get_delta_weight(NAME)
        return state


def numel(weights: Iterable[Tensor]) -> int:
    return sum(weight.numel() for weight in weights)
