"""Checkpoints: `runs/<name>/checkpoints/<step>/{ema.safetensors, state/}`.

`ema.safetensors` is enough on its own to sample and to score: its metadata carries the configuration, the
backbone's derived arguments, the class names, what autoencoder and splits it was trained with, the step, the commit,
and checksums of itself and of the weights, which every reader checks. `state/` is what resuming needs. Nothing read
back is ever unpickled. `machine.checkpoint_folder` writes them whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from autoencoders.codec import Codec, create_codec, weights_sha256
from checkpoints.averages import EMA
from checkpoints.hub import local
from data.latents import short
from experiment.config import ExperimentConfig
from experiment.diffusions import build_diffusion
from experiment.imports import load_imports
from experiment.settings import from_dict
from machine.checkpoint_folder import CheckpointError, checkpoint_path, list_checkpoints, rotate, write_checkpoint
from machine.sharding import gather, load_whole, part_like
from models.spec import ModelSpec

WEIGHTS = "ema.safetensors"
PROFILES = "profiles.safetensors"
SNAPSHOTS = "snapshots"  # beside checkpoints/: power-function averages, never dropped


@dataclass(frozen=True)
class Checkpoint:
    """What sampling and scoring need to know, read from `ema.safetensors` alone."""

    path: Path
    config: ExperimentConfig
    spec: ModelSpec
    classes: list[str]
    step: int
    commit: str
    identity: dict[str, dict[str, Any]]  # what `codec`, `train` and `test` were; of older checkpoints nothing

    @property
    def run(self) -> Path:
        """The run's folder, or the weights' own where they lie outside one."""
        folder = self.path.parent
        return folder.parent.parent if folder.parent.name == "checkpoints" else folder

    @property
    def mark(self) -> str:
        """For names of what is made from it: nothing of a run's newest checkpoint, else which weights of the run."""
        saved, own = list_checkpoints(self.run / "checkpoints"), self.path.parent
        if saved and self.path.name != WEIGHTS:
            return f"-{self.path.stem}"
        is_newest = not saved or own.resolve() == saved[-1].resolve() or own.parent.name != "checkpoints"
        return "" if is_newest else f"-{own.name}"

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of its images."""
        return self.config.data.image_size, self.config.data.image_size

    @property
    def autoencoder(self) -> str:
        """Of its configuration; a folder that is not there from here is looked for from where the run lies."""
        name = self.config.autoencoder
        places = [] if Path(name).is_dir() else [parent / name for parent in self.run.resolve().parents]
        return next((str(place) for place in places if (place / "config.json").is_file()), name)

    @property
    def num_guided(self) -> int:
        """Of its classes those that can be guided away from the null label."""
        return self.config.guided_classes(len(self.classes))

    def load_model(self, device: torch.device | str = "cpu") -> nn.Module:
        """The averaged backbone in eval mode."""
        model = self.spec.build()
        load_weights(model.state_dict(), read_tensors(self.path), self.path)
        return model.eval().requires_grad_(False).to(device)

    def build_diffusion(self):
        """The diffusion that the backbone was trained under."""
        return build_diffusion(self.config.diffusion)

    def open_codec(self, asked: str | None, say: Callable[[str], None] = print) -> Codec:
        """Its autoencoder: by its content the one that it was trained with, or, in its place, what is asked for; that
        of other latents is told of, another decoder is the other's own business.

        Raises:
            CheckpointError: where what lies there is another by now.
        """
        codec, known = create_codec(asked or self.autoencoder), self.identity.get("codec", {})
        if asked is None:
            self.check_codec(codec)
        elif known and any(known.get(name) != value for name, value in codec.identity.items()):
            say(f"--autoencoder {asked}: its latents are others than those that {self.path} was trained on")
        return codec

    def check_codec(self, codec: Codec) -> None:
        """See `check_identity`; older checkpoints, which know of none, take any."""
        if "codec" in self.identity:
            self.check_identity(codec=codec.provenance)

    def check_identity(self, **found: Mapping[str, Any]) -> None:
        """That an autoencoder (`codec=codec.provenance`) and splits (`test=dataset.describe()`) are by their content
        those that it was trained with; where they lie does not matter.

        Raises:
            CheckpointError: naming the flag, and what differs.
        """
        for part, values in found.items():
            older = {"autoencoder": self.config.autoencoder} if part == "codec" else {"classes": self.classes}
            expected = self.identity.get(part, older)
            same_identity(self.path, part, expected, values, but=() if expected is older else ("source", "autoencoder"))


def same_identity(
    path: Path, part: str, known: Mapping[str, Any], found: Mapping[str, Any], but: Sequence[str] = ("source",)
) -> None:
    """That what is here of a `part` is what a checkpoint knows of it, `but` where it lies.

    Raises:
        CheckpointError: naming the flag, and what differs.
    """
    flag = "--autoencoder" if part == "codec" else "--data.path"
    for name, value in known.items():
        if name not in but and found.get(name) != value:
            raise CheckpointError(
                f"{flag}: {path} was trained with another {part}, whose {name} was {short(value)}, here "
                f"{short(found.get(name))}; give the one that it was trained with"
            )


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
    identity: Mapping[str, Mapping[str, Any]],
    progress: dict[str, Any],
    write: bool = True,
    rotates: bool = True,
) -> Path:
    """Write `folder/<step>` whole or not at all, then, if it `rotates`, drop what the configuration does not keep.

    `identity` is for `check_identity`, `progress` what resuming needs beside tensors: JSON. Of several processes all
    have to call, as each may have a part of the tensors, and one has to `write`.

    Raises:
        OSError: when it cannot be written; the partial folder is removed, older checkpoints stay.
    """
    averages, profiles = gather(ema.tensors, keep=write), gather(ema.profile_tensors(), keep=write)
    weights, moments = gather(model.state_dict(), keep=write), gather(optimizer_tensors(optimizer), keep=write)
    target = checkpoint_path(folder, step)
    if not write:
        return target
    metadata = metadata_of(config, spec, classes, step, identity)

    def fill(checkpoint: Path) -> None:
        state = checkpoint / "state"
        state.mkdir()
        save_tensors(averages, checkpoint / WEIGHTS, metadata)
        save_file(weights, state / "model.safetensors")
        save_file(moments, state / "optimizer.safetensors")
        (state / "progress.json").write_text(json.dumps({"step": step, **progress}))
        if profiles:
            save_tensors(profiles, state / PROFILES, {**metadata, "began": json.dumps(ema.began or {})})
            _keep_snapshot(state / PROFILES, folder.parent / SNAPSHOTS / f"{target.name}.safetensors")

    write_checkpoint(target, fill)
    if rotates:
        rotate(folder, keep=config.log.keep_checkpoints, keep_every=config.log.keep_every)
    return target


def metadata_of(
    config: ExperimentConfig,
    spec: ModelSpec,
    classes: list[str],
    step: int,
    identity: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, str]:
    """What makes a safetensors file of averaged weights a checkpoint."""
    return {
        "config": json.dumps(config.to_dict()),
        "spec": json.dumps(asdict(spec)),
        "classes": json.dumps(classes),
        "step": str(step),
        "commit": current_commit(),
        "identity": json.dumps(identity or {}),
    }


def list_snapshots(run: Path) -> dict[int, Path]:
    """The power-function averages of a run by their steps, in order."""
    found = {int(path.stem): path for path in (run / SNAPSHOTS).glob("[0-9]*.safetensors") if path.stem.isdecimal()}
    return dict(sorted(found.items()))


def drop_snapshots(run: Path, *, after: int) -> None:
    """Those of steps that a resumed run takes again: with other settings they would be of another training."""
    for step, path in list_snapshots(run).items():
        if step > after:
            path.unlink()


def _keep_snapshot(profiles: Path, snapshot: Path) -> None:
    """A second name for the profiles' file, which rotation leaves alone: before the checkpoint is whole, so that there
    is none without its snapshot."""
    snapshot.parent.mkdir(exist_ok=True)
    partial = snapshot.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    try:
        partial.hardlink_to(profiles)
    except OSError:  # a file system without such links
        shutil.copy(profiles, partial)
    partial.replace(snapshot)


def resume(checkpoint: Path, model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load a checkpoint into the objects; returns what was saved as `progress`, and `step`, the steps done.

    Raises:
        CheckpointError: when it does not fit, or a file has another checksum.
    """
    ema.let_go()
    load_weights(ema.tensors, read_tensors(checkpoint / WEIGHTS), checkpoint)
    load_weights(model.state_dict(), read_tensors(checkpoint / "state" / "model.safetensors"), checkpoint)
    if ema.profiles:
        load_weights(ema.profile_tensors(), read_tensors(checkpoint / "state" / PROFILES), checkpoint)
    load_optimizer(optimizer, read_tensors(checkpoint / "state" / "optimizer.safetensors"))
    return json.loads((checkpoint / "state" / "progress.json").read_text())


def warm_start(model: nn.Module, path: str) -> str:
    """Copy the averaged weights that have a namesake of the same shape; says in words what was not taken.

    Raises:
        CheckpointError: when there is no checkpoint, or nothing of it fits.
    """
    weights = read_tensors(_find_weights(path))
    own = model.state_dict()
    fitting = {name: tensor for name, tensor in weights.items() if name in own and own[name].shape == tensor.shape}
    if not fitting:
        raise CheckpointError(f"--init_from {path}: no weight of it has the name and shape of one of this model")
    model.load_state_dict(fitting, strict=False)
    reshaped = sorted(name for name in weights.keys() & own.keys() if name not in fitting)
    unknown, missing = sorted(weights.keys() - own.keys()), sorted(own.keys() - weights.keys())
    left = {"of another shape": reshaped, "not in this model": unknown, "not in the checkpoint": missing}
    told = "; ".join(f"{what}: {', '.join(names)}" for what, names in left.items() if names)
    return f"--init_from {path}: took {len(fitting)} of {len(weights)} tensors{f' ({told})' if told else ''}"


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A checkpoint from a run's folder (its newest), a checkpoint's folder, the weights file, or hf://owner/name.

    Raises:
        CheckpointError: when there is none, the file is cut short or damaged, or it is not one of ours.
    """
    weights = _find_weights(path)
    metadata = read_metadata(weights)
    missing = {"config", "spec", "classes", "step", "commit"} - metadata.keys()
    if missing:
        raise CheckpointError(f"--checkpoint {weights}: not written by train.py, it lacks {sorted(missing)}")
    try:
        spec, classes = json.loads(metadata["spec"]), json.loads(metadata["classes"])
        found = Checkpoint(
            path=weights,
            config=from_dict(ExperimentConfig, json.loads(metadata["config"])),
            spec=ModelSpec(**{**spec, "input_size": tuple(spec["input_size"])}),
            classes=[str(name) for name in classes],
            step=int(metadata["step"]),
            commit=metadata["commit"],
            identity={name: dict(part) for name, part in json.loads(metadata.get("identity", "{}")).items()},
        )
        imports = [str(name) for name in found.config.imports]
        if found.classes != classes or len(classes) != found.spec.num_classes:
            raise ValueError(f"{found.spec.num_classes} classes, named {short(classes)}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"--checkpoint {weights}: its metadata are malformed ({error})") from error
    load_imports(imports, stored_in=weights)
    return found


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """A safetensors file whose metadata carry checksums of themselves and of the tensors, wherever it goes."""
    sealed = {**metadata, "weights_sha256": weights_sha256(tensors)}
    save_file(dict(tensors), path, metadata={**sealed, "metadata_sha256": _sha256(sealed)})


def read_metadata(path: Path) -> dict[str, str]:
    """Of a safetensors file, and nothing else of it.

    Raises:
        CheckpointError: when it is missing, cut short or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"--checkpoint {path}: cut short or not a safetensors file ({error})") from error
    if metadata.get("metadata_sha256", _sha256(metadata)) != _sha256(metadata):
        raise CheckpointError(f"--checkpoint {path}: its metadata have another checksum; give another copy of it")
    return metadata


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Of a safetensors file.

    Raises:
        CheckpointError: when it is missing, cut short or damaged.
    """
    expected = read_metadata(path).get("weights_sha256")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cut short or missing ({error})") from error
    if expected is not None and weights_sha256(tensors) != expected:
        raise CheckpointError(f"--checkpoint {path}: its weights have another checksum; give another copy of it")
    return tensors


def _sha256(metadata: Mapping[str, str]) -> str:
    rest = {name: value for name, value in metadata.items() if name != "metadata_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def load_weights(tensors: dict[str, Tensor], weights: dict[str, Tensor], path: Path) -> None:
    """Copy weights into the tensors of a model or an average (or into parts of them); they must fit exactly.

    Raises:
        CheckpointError: listing what does not fit.
    """
    own = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if own != given:
        wrong = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
        raise CheckpointError(
            f"{path} is of another model: {len(wrong)} tensors are missing, unknown or of another shape, "
            f"such as {', '.join(wrong[:3])}"
        )
    load_whole(tensors, weights)


def current_commit() -> str:
    """Commit of the code, with '+' where the tree was changed; empty outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=+"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _find_weights(path: str | Path) -> Path:
    path = local(path, WEIGHTS)
    if path.is_file():
        return path
    if (path / WEIGHTS).is_file():
        return path / WEIGHTS
    checkpoints = list_checkpoints(path / "checkpoints")
    if checkpoints:
        return checkpoints[-1] / WEIGHTS
    reason = "holds no checkpoint" if path.exists() else "does not exist"
    raise CheckpointError(
        f"--checkpoint {path} {reason}; give a run's folder, a checkpoint, {WEIGHTS} or hf://owner/name"
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Its state by `<number of the parameter>.<name>`."""
    state, numbers = optimizer.state_dict()["state"], numbers_of(optimizer)
    return {f"{numbers[index]}.{key}": value for index, entry in state.items() for key, value in entry.items()}


def numbers_of(optimizer: torch.optim.Optimizer) -> list[int]:
    """By which files know its parameters, in the order of its groups: the groups' own, or 0, 1, ..."""
    groups = optimizer.param_groups
    numbers = [number for group in groups for number in group.get("numbers", ())]
    return numbers or list(range(sum(len(group["params"]) for group in groups)))


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index_of = {number: index for index, number in enumerate(numbers_of(optimizer))}
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        number, key = name.split(".", 1)
        index = index_of[int(number)]
        like = parameters[index]
        state.setdefault(index, {})[key] = part_like(tensor, like) if tensor.shape == like.shape else tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
