"""Checkpoints: `runs/<name>/checkpoints/<step>/{ema.safetensors, state/}`.

`ema.safetensors` is enough on its own to sample and to score: its metadata carries the configuration, the
backbone's derived arguments, the class names, the step and the commit. `state/` is what resuming needs. A
checkpoint is written under a temporary name and renamed when whole; nothing read back is ever unpickled.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from experiment.build import ModelSpec, build_process
from experiment.config import (
    DataConfig,
    DiffusionConfig,
    EvaluationConfig,
    ExperimentConfig,
    LogConfig,
    OptimConfig,
    SamplingConfig,
    TrainConfig,
)
from experiment.ema import EMA

WEIGHTS = "ema.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that is missing, cut short or of another model, in the user's words."""


@dataclass(frozen=True)
class Checkpoint:
    """What sampling and scoring need to know, read from `ema.safetensors` alone."""

    path: Path
    config: ExperimentConfig
    spec: ModelSpec
    classes: list[str]
    step: int
    commit: str

    @property
    def run(self) -> Path:
        """The run's folder, or the weights' own where they lie outside one."""
        folder = self.path.parent
        return folder.parent.parent if folder.parent.name == "checkpoints" else folder

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of its images."""
        return self.config.data.image_size, self.config.data.image_size

    def load_model(self, device: torch.device | str = "cpu") -> nn.Module:
        """The averaged backbone in eval mode."""
        model = self.spec.build()
        load_weights(model, _read_tensors(self.path), self.path)
        return model.eval().requires_grad_(False).to(device)

    def build_process(self):
        """The diffusion process that the backbone was trained under."""
        return build_process(self.config.diffusion)


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    model: nn.Module,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    config: ExperimentConfig,
    spec: ModelSpec,
    classes: list[str],
    keep: int,
) -> Path:
    """Write `folder/<step>` whole or not at all, then drop all but the newest `keep`.

    Raises:
        OSError: when the disk has no room; the partial folder is removed, older checkpoints stay.
    """
    target = folder / f"{step:08d}"
    partial = folder / f".{step:08d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "state").mkdir(parents=True)
    metadata = {
        "config": json.dumps(config.to_dict()),
        "spec": json.dumps(asdict(spec)),
        "classes": json.dumps(classes),
        "step": str(step),
        "commit": current_commit(),
    }
    try:
        save_file(_contiguous(ema.model.state_dict()), partial / WEIGHTS, metadata=metadata)
        save_file(_contiguous(model.state_dict()), partial / "state" / "model.safetensors")
        save_file(_flatten_optimizer(optimizer), partial / "state" / "optimizer.safetensors")
        (partial / "state" / "progress.json").write_text(json.dumps({"step": step}))
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"checkpoint {target} could not be written ({error}); make room and --resume") from error
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def resume(folder: Path, model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest checkpoint of a run into the objects; returns the steps it had done.

    Raises:
        CheckpointError: when there is none, or it does not fit.
    """
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        raise CheckpointError(f"--resume: nothing to resume, {folder} holds no checkpoint")
    newest = checkpoints[-1]
    load_weights(ema.model, _read_tensors(newest / WEIGHTS), newest)
    load_weights(model, _read_tensors(newest / "state" / "model.safetensors"), newest)
    _unflatten_optimizer(optimizer, _read_tensors(newest / "state" / "optimizer.safetensors"))
    return int(json.loads((newest / "state" / "progress.json").read_text())["step"])


def list_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("[0-9]*") if path.is_dir())


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A checkpoint from a run's folder (its newest), a checkpoint's folder, or the weights file.

    Raises:
        CheckpointError: when there is none, the file is cut short, or it is not one of ours.
    """
    weights = _find_weights(Path(path))
    try:
        with safe_open(weights, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"--checkpoint {weights}: cut short or not a safetensors file ({error})") from error
    missing = {"config", "spec", "classes", "step", "commit"} - metadata.keys()
    if missing:
        raise CheckpointError(f"--checkpoint {weights}: not written by train.py, it lacks {sorted(missing)}")
    spec = json.loads(metadata["spec"])
    return Checkpoint(
        path=weights,
        config=_config_from_dict(json.loads(metadata["config"])),
        spec=ModelSpec(**{**spec, "input_size": tuple(spec["input_size"])}),
        classes=json.loads(metadata["classes"]),
        step=int(metadata["step"]),
        commit=metadata["commit"],
    )


def load_weights(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Load a state dict that must fit exactly.

    Raises:
        CheckpointError: listing what does not fit.
    """
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if own != given:
        wrong = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
        raise CheckpointError(
            f"{path} is of another model: {len(wrong)} tensors are missing, unknown or of another shape, "
            f"such as {', '.join(wrong[:3])}"
        )
    model.load_state_dict(weights)


def current_commit() -> str:
    """Commit of the code, with '+' where the tree was changed; empty outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=+"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _find_weights(path: Path) -> Path:
    if path.is_file():
        return path
    if (path / WEIGHTS).is_file():
        return path / WEIGHTS
    checkpoints = list_checkpoints(path / "checkpoints")
    if checkpoints:
        return checkpoints[-1] / WEIGHTS
    reason = "holds no checkpoint" if path.exists() else "does not exist"
    raise CheckpointError(f"--checkpoint {path} {reason}; give a run's folder, a checkpoint or {WEIGHTS}")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cut short or missing ({error})") from error


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return _contiguous({f"{index}.{key}": value for index, entry in state.items() for key, value in entry.items()})


def _unflatten_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _config_from_dict(values: dict[str, Any]) -> ExperimentConfig:
    values["optim"]["betas"] = tuple(values["optim"]["betas"])
    parts = {
        "data": DataConfig,
        "diffusion": DiffusionConfig,
        "optim": OptimConfig,
        "train": TrainConfig,
        "sampling": SamplingConfig,
        "evaluation": EvaluationConfig,
        "log": LogConfig,
    }
    built = {key: part(**values.get(key, {})) for key, part in parts.items()}
    return ExperimentConfig(**{**values, **built})
