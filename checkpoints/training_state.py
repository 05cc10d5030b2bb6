"""Saving and resuming the state of a training, in one format for all trainings.

Beside `ema.safetensors` (see `checkpoints.checkpoint`) a checkpoint has a folder `state/`: each network and optimizer
as `<name>.safetensors`, power-function averages as `profiles.safetensors`, and everything else in `progress.json`.
Nothing is pickled.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from checkpoints.averages import EMA
from checkpoints.checkpoint import WEIGHTS, iterate_tensors, load_weights, save_tensors
from machine.atomic_files import atomic_path
from machine.checkpoint_folder import checkpoint_path, paths_by_step, write_checkpoint
from machine.sharding import gather, shard_like

PROFILES = "state/profiles.safetensors"
SNAPSHOTS = "snapshots"  # next to checkpoints/: power-function averages, never deleted


@dataclass(frozen=True)
class TrainingState:
    """All objects whose state changes in training, by their names in a checkpoint. Objects in `others` have `state()`,
    which returns JSON values, and `restore(state)`."""

    networks: Mapping[str, nn.Module]
    optimizers: Mapping[str, torch.optim.Optimizer]
    ema: EMA
    others: dict[str, Any] = field(default_factory=dict)
    copies: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # CPU tensors of the last save, by file

    def __post_init__(self) -> None:
        self.others["ema"] = self.ema

    def progress(self) -> dict[str, Any]:
        """Return the state that is not in tensors, as JSON values."""
        return {name: part.state() for name, part in self.others.items()}

    def modules(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of networks and averages by file; resuming copies into them in place."""
        files = {WEIGHTS: self.ema.tensors}
        states = {name: network.state_dict() for name, network in self.networks.items()}
        files |= {_state_file(name): state for name, state in states.items() if state}  # heads may be empty
        if self.ema.profiles:
            averages = [(sigma, average.tensors.items()) for sigma, average in self.ema.profiles.items()]
            files[PROFILES] = {f"{sigma}/{name}": tensor for sigma, tensors in averages for name, tensor in tensors}
        return files


def _state_file(name: str) -> str:
    return f"state/{name}.safetensors"


def copy_checkpoint(
    folder: Path,
    step: int,
    training: TrainingState,
    metadata: Mapping[str, str],
    progress: Mapping[str, Any],
    *,
    keep: bool = True,
) -> Callable[[], None]:
    """Copy the state of a training to main memory, and return a function that writes it to `folder/<step>`.

    Training may go on while that function runs, but it must end before the next copy. It writes the checkpoint
    atomically, or raises `OSError`. As tensors may be sharded, all processes must call `copy_checkpoint`; only the one
    with `keep` gets copies and may write.
    """
    progress_text = json.dumps({"step": step, **progress})
    profile_metadata = {**metadata, "began": json.dumps(training.ema.began or {})}
    optimizers = {_state_file(name): optimizer_tensors(optimizer) for name, optimizer in training.optimizers.items()}
    for file, tensors in {**training.modules(), **optimizers}.items():
        gather(tensors, training.copies.setdefault(file, {}), keep=keep)
    target = checkpoint_path(folder, step)

    def fill(checkpoint: Path) -> None:
        (checkpoint / "state").mkdir()
        for file, tensors in training.copies.items():
            if file == WEIGHTS:
                save_tensors(tensors, checkpoint / file, metadata)
            elif file == PROFILES:
                save_tensors(tensors, checkpoint / file, profile_metadata)
                _keep_snapshot(checkpoint / file, folder.parent / SNAPSHOTS / f"{target.name}.safetensors")
            else:
                save_file(tensors, checkpoint / file)
        (checkpoint / "state" / "progress.json").write_text(progress_text)

    return lambda: write_checkpoint(target, fill)


def resume(checkpoint: Path, training: TrainingState) -> dict[str, Any]:
    """Load a checkpoint into a training, and return its progress."""
    training.ema.free_whole_model()
    for file, tensors in training.modules().items():
        load_weights(tensors, checkpoint / file)
    for name, optimizer in training.optimizers.items():
        load_optimizer(optimizer, iterate_tensors(checkpoint / _state_file(name)))
    progress = json.loads((checkpoint / "state" / "progress.json").read_text())
    # Older checkpoints have the states of guards under other keys, and lack some keys.
    guards = progress.pop("guards", {"model": progress.pop("guard")} if "guard" in progress else {})
    progress = {"inspected": True, "ema": {}, **{f"guard.{name}": state for name, state in guards.items()}, **progress}
    for name, part in training.others.items():
        if name in progress:
            part.restore(progress[name])
    return progress


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimizer's state as tensors named `<number of the parameter>.<name>`."""
    state, numbers = optimizer.state_dict()["state"], _parameter_numbers(optimizer)
    return {f"{numbers[index]}.{key}": value for index, entry in state.items() for key, value in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Load the items of what `optimizer_tensors` returned, sharded as the parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index_of = {number: index for index, number in enumerate(_parameter_numbers(optimizer))}
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors:
        number, key = name.split(".", 1)
        index = index_of[int(number)]
        like = parameters[index]
        state.setdefault(index, {})[key] = shard_like(tensor, like) if tensor.shape == like.shape else tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _parameter_numbers(optimizer: torch.optim.Optimizer) -> list[int]:
    """Return the numbers that identify parameters in files, in the order of the groups: `numbers`, or 0, 1, ..."""
    groups = optimizer.param_groups
    numbers = [number for group in groups for number in group.get("numbers", ())]
    return numbers or list(range(sum(len(group["params"]) for group in groups)))


def list_snapshots(run: Path) -> dict[int, Path]:
    """Return the snapshots of a run's power-function averages by step, in ascending order."""
    return paths_by_step(run / SNAPSHOTS, ".safetensors")


def _keep_snapshot(profiles: Path, snapshot: Path) -> None:
    """Hard-link the file of profiles under a second name, which survives the deletion of old checkpoints."""
    with atomic_path(snapshot) as partial:
        try:
            partial.hardlink_to(profiles)
        except OSError:  # the file system has no hard links
            shutil.copy(profiles, partial)
