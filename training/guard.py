"""Protect the weights from non-finite gradients: skip such steps and, after several in a row, roll back."""

import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from machine.sharding import full_tensor, local_shard


class TrainingDivergedError(ValueError):
    """Training cannot recover from non-finite gradients; the message is for the user."""


@dataclass
class Guard:
    """Counts steps that are skipped because of a non-finite gradient. After `patience` in a row the run goes back to
    its last checkpoint with another order of the data; after `max_rollbacks` of these it stops."""

    settings: str = "optim"  # group of flags that error messages advise to change
    patience: int = 10
    max_rollbacks: int = 3
    skipped: int = 0
    in_a_row: int = 0
    rollbacks: int = 0

    def passes(self, *norms: float) -> bool:
        """Count a step with these norms of its gradients, and return whether to take it."""
        if all(map(math.isfinite, norms)):
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        return False

    def may_save(self, accelerator: Accelerator, model: nn.Module, *, last: bool = False) -> bool:
        """Whether to save the weights; all processes agree. They are not saved while steps are skipped, except at the
        end, nor if they are not finite, which at the end raises TrainingDivergedError."""
        if self.in_a_row and not last:
            return False
        values = [local_shard(value) for value in model.state_dict().values() if value.is_floating_point()]
        is_broken = ~torch.stack([value.isfinite().all() for value in values]).all()
        if accelerator.reduce(is_broken.float(), "sum").item() == 0:  # pyright: ignore
            return True
        if last:
            raise TrainingDivergedError(
                f"after the last step weights are not finite: they were not saved, older checkpoints are there; lower "
                f"--{self.settings}.lr or set --{self.settings}.grad_clip 1, and --resume"
            )
        self.in_a_row = self.patience
        return False

    def must_roll_back(self, *, has_checkpoint: bool) -> bool:
        """Whether too many steps were skipped; TrainingDivergedError if so, with no checkpoint or rollback left."""
        if self.in_a_row < self.patience:
            return False
        if not has_checkpoint or self.rollbacks == self.max_rollbacks:
            raise TrainingDivergedError(
                f"{self.patience} steps in a row had a gradient that is not finite, after {self.rollbacks} returns to "
                f"the last checkpoint with another order of the data; lower --{self.settings}.lr, set "
                f"--{self.settings}.grad_clip 1, or look at the images whose source_indices log.jsonl lists"
            )
        self.rollbacks += 1
        self.in_a_row = 0
        return True

    def state(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "rollbacks": self.rollbacks}

    def restore(self, state: dict[str, int]) -> None:
        """Restore the state of a checkpoint, but keep counting later rollbacks."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        self.rollbacks = max(self.rollbacks, state["rollbacks"])


def clip_gradients(
    accelerator: Accelerator, model: nn.Module, max_norm: float, heads: nn.Module | None = None
) -> Float[Tensor, " parts"]:
    """Compute the norms of the gradients of the model and, if these have any, of `heads`, and clip each of the two to
    `max_norm` unless that is 0. The gradients of heads are first averaged over processes."""
    if heads is not None and (weights := [weight for weight in heads.parameters() if weight.grad is not None]):
        for weight in weights:
            weight.grad = accelerator.reduce(weight.grad, "mean")  # pyright: ignore[reportAttributeAccessIssue]
        return torch.cat([clip_gradients(accelerator, part, max_norm) for part in (model, heads)])
    if max_norm:
        norm = accelerator.clip_grad_norm_(model.parameters(), max_norm)
    else:
        norm = nn.utils.get_total_norm([weight.grad for weight in model.parameters() if weight.grad is not None])
    assert norm is not None  # Accelerate returns None only with DeepSpeed
    return full_tensor(norm)[None]
