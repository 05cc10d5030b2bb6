"""Few weights that are trained in place of all of a backbone's; the others stay as they are, bit for bit."""

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

NAME = "default"  # peft's, of the one adapter that there is


def adapt(model: Backbone, config: TrainConfig, objective: type[Objective], accelerator: Accelerator) -> str:
    """Freeze a backbone but for its tables of labels and what `config.adapter` names; says in words how much that is.

    `biases` trains what weight decay is not for: BitFit (Ben Zaken et al. 2022) and, where biases of modulators shift,
    scale and gate every layer, what DiffFit (Xie et al. 2023) adds to it. `lora` (Hu et al. 2021) trains these and, for
    each linear of the repeated blocks, two matrices whose product of rank `adapter_rank` is added to it; the last of
    them starts at zero, so that the backbone begins as it is.
    """
    asked = f"--train.adapter {config.adapter}"
    if objective.trains_in_parts:
        raise ValueError(f"{asked}: this --diffusion.kind trains its backbone in parts; leave it out")
    if accelerator.distributed_type is DistributedType.FSDP:
        raise ValueError(f"{asked}: FSDP's parts are not merged with it; launch without FSDP, or leave it out")
    num_frozen = count(model.parameters())
    model.requires_grad_(False)
    if config.adapter == "lora":
        add_lora(model, config.adapter_rank, seed_for(config.seed, "adapter"))
    for group in model.param_groups():
        for weight in group["params"] if group.get("weight_decay") == 0 else ():
            weight.requires_grad_(True)
    labels = [weight for name, weight in model.named_parameters() if name.endswith(LABELS)]
    for weight in labels:
        weight.requires_grad_(True)
    num_trained = count(weight for weight in model.parameters() if weight.requires_grad) - count(labels)
    share, of_labels = num_trained / num_frozen, f" and {count(labels) / 1e6:.2f}M of labels" if labels else ""
    return f"{asked}: trains {num_trained / 1e6:.2f}M weights, {share:.1%} of {num_frozen / 1e6:.1f}M{of_labels}"


def add_lora(model: Backbone, rank: int, seed: int) -> None:
    """To each linear of the repeated blocks that has more weights than its two matrices would have. Their first values
    are drawn by the seed."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("--train.adapter lora: peft is not installed; pip install -e '.[finetune]'") from error
    inside = {part for block in model.repeated_blocks() for part in block.modules() if isinstance(part, nn.Linear)}
    thick = {part for part in inside if rank * (part.in_features + part.out_features) < part.weight.numel()}
    if not thick:
        raise ValueError(
            f"--train.adapter lora: the blocks of {type(model).__name__} have no linear of rank above {rank}; take a "
            "smaller --train.adapter_rank, or --train.adapter biases"
        )
    names = [name for name, part in model.named_modules() if part in thick]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), model, NAME)


class Merged(nn.Module):
    """A backbone as averages, and so all readers of checkpoints, know it: what an adapter adds to a weight is in it,
    and names are those of a backbone without."""

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
        adapted = {name: part for name, part in self.model.named_modules() if hasattr(part, "get_delta_weight")}
        return state | {f"{name}.weight": merged(part) for name, part in adapted.items()}


def merged(layer: Any) -> Tensor:
    """The weight of a linear with what peft's adapter adds to it."""
    return layer.base_layer.weight + layer.get_delta_weight(NAME)


def count(weights: Iterable[Tensor]) -> int:
    return sum(weight.numel() for weight in weights)
