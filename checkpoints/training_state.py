"""What a training changes, in the checkpoints that it goes on from: one format, whatever is trained.

Beside `ema.safetensors` (see `checkpoints.checkpoint`) a checkpoint has a folder `state/`: each network and optimizer
as `<name>.safetensors`, power-function averages as `profiles.safetensors`, and all that is no tensor in
`progress.json`. Nothing read back is ever unpickled.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from checkpoints.averages import EMA
from checkpoints.checkpoint import WEIGHTS, load_weights, read_tensors, save_tensors
from machine.checkpoint_folder import by_step, checkpoint_path, write_checkpoint
from machine.sharding import gather, part_like
from machine.whole_files import whole

PROFILES = "state/profiles.safetensors"
SNAPSHOTS = "snapshots"  # beside checkpoints/: power-function averages, never dropped


@dataclass(frozen=True)
class TrainingState:
    """What a training changes, by names in a checkpoint. `others` have `state()`, as JSON, and `restore(state)`."""

    networks: Mapping[str, nn.Module]
    optimizers: Mapping[str, torch.optim.Optimizer]
    ema: EMA
    others: dict[str, Any] = field(default_factory=dict)
    copies: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # by file, in main memory, of the last save

    def __post_init__(self) -> None:
        self.others["ema"] = self.ema

    def progress(self) -> dict[str, Any]:
        """What resuming needs beside tensors, as JSON."""
        return {name: part.state() for name, part in self.others.items()}

    def modules(self) -> dict[str, dict[str, Tensor]]:
        """By file, the tensors that are copied into when a training goes on."""
        files = {WEIGHTS: self.ema.tensors}
        states = {name: network.state_dict() for name, network in self.networks.items()}
        files |= {_state_file(name): state for name, state in states.items() if state}  # there may be no heads
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
    """Copy all that `folder/<step>` is to hold, so that training may go on, and leave its writing, whole or not at all
    (OSError), to be done before the next copy. All processes have to call, as each may have a part of the tensors; one
    has to `keep` them, and to write."""
    texts = {"progress": json.dumps({"step": step, **progress}), "began": json.dumps(training.ema.began or {})}
    states = {_state_file(name): optimizer_tensors(optimizer) for name, optimizer in training.optimizers.items()}
    for file, tensors in {**training.modules(), **states}.items():
        gather(tensors, training.copies.setdefault(file, {}), keep=keep)
    target = checkpoint_path(folder, step)

    def fill(checkpoint: Path) -> None:
        (checkpoint / "state").mkdir()
        for file, tensors in training.copies.items():
            if file == WEIGHTS:
                save_tensors(tensors, checkpoint / file, metadata)
            elif file == PROFILES:
                save_tensors(tensors, checkpoint / file, {**metadata, "began": texts["began"]})
                _keep_snapshot(checkpoint / file, folder.parent / SNAPSHOTS / f"{target.name}.safetensors")
            else:
                save_file(tensors, checkpoint / file)
        (checkpoint / "state" / "progress.json").write_text(texts["progress"])

    return lambda: write_checkpoint(target, fill)


def resume(checkpoint: Path, training: TrainingState) -> dict[str, Any]:
    """Put a checkpoint back into a training; returns its progress. A CheckpointError says what does not fit."""
    training.ema.let_go()
    for file, tensors in training.modules().items():
        load_weights(tensors, read_tensors(checkpoint / file), checkpoint)
    for name, optimizer in training.optimizers.items():
        load_optimizer(optimizer, read_tensors(checkpoint / _state_file(name)))
    progress = json.loads((checkpoint / "state" / "progress.json").read_text())
    # As older checkpoints have it, in today's terms.
    guards = progress.pop("guards", {"model": progress.pop("guard")} if "guard" in progress else {})
    progress = {"inspected": True, "ema": {}, **{f"guard.{name}": state for name, state in guards.items()}, **progress}
    for name, part in training.others.items():
        if name in progress:
            part.restore(progress[name])
    return progress


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Its state by `<number of the parameter>.<name>`."""
    state, numbers = optimizer.state_dict()["state"], _numbers_of(optimizer)
    return {f"{numbers[index]}.{key}": value for index, entry in state.items() for key, value in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index_of = {number: index for index, number in enumerate(_numbers_of(optimizer))}
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        number, key = name.split(".", 1)
        index = index_of[int(number)]
        like = parameters[index]
        state.setdefault(index, {})[key] = part_like(tensor, like) if tensor.shape == like.shape else tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _numbers_of(optimizer: torch.optim.Optimizer) -> list[int]:
    """By which files know its parameters, in the order of its groups: the groups' own, or 0, 1, ..."""
    groups = optimizer.param_groups
    numbers = [number for group in groups for number in group.get("numbers", ())]
    return numbers or list(range(sum(len(group["params"]) for group in groups)))


def list_snapshots(run: Path) -> dict[int, Path]:
    """The power-function averages of a run by their steps, in order."""
    return by_step(run / SNAPSHOTS, ".safetensors")


def _keep_snapshot(profiles: Path, snapshot: Path) -> None:
    """A second name for the profiles' file, which rotation leaves alone."""
    with whole(snapshot) as partial:
        try:
            partial.hardlink_to(profiles)
        except OSError:  # a file system without such links
            shutil.copy(profiles, partial)
