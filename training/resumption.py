"""Resume a run: settings that define the meaning of its weights must stay the same, the others may change."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from checkpoints.checkpoint import WEIGHTS, read_metadata
from checkpoints.training_state import SNAPSHOTS, list_snapshots
from data.layout import join_abridged
from experiment.config import DEFAULT_EPOCHS
from experiment.imports import load_imports
from experiment.mappings import flatten, from_dict
from experiment.run_config import R, RunConfig, with_resume
from machine.atomic_files import unused_path
from machine.checkpoint_folder import CheckpointError, checkpoint_to_resume, list_checkpoints, paths_by_step

OUTPUTS = (SNAPSHOTS, "log.jsonl", "tracking", "samples*", "scores*", "progress.*", "ema-*.safetensors")


def start_or_resume(config: R, say: Callable[[str], None]) -> tuple[R, Path | None]:
    """Prepare a run's folder; return configuration and checkpoint, None for a new run, which needs it empty."""
    run = config.folder
    if (run / "plan.json").is_file():
        raise FileExistsError(f"{run} holds an ablation; give another --name")
    if config.resume:
        checkpoint = checkpoint_to_resume(run)
        return resume_config(config, checkpoint, say), checkpoint
    if (run / WEIGHTS).exists():  # imported or downloaded; they would still be what everybody loads from this run
        raise FileExistsError(f"{run} holds weights already, {WEIGHTS}: give another --name")
    if list_checkpoints(run / "checkpoints"):
        raise FileExistsError(f"{run} holds a run already: --resume {run}, give another --name, or delete it")
    for path in [path for pattern in OUTPUTS for path in run.glob(pattern) if ".before-" not in path.name]:
        say(f"{path} is of an earlier training, and is now {path.rename(unused_path(path))}")
    return config, None


def discard_later_results(run: Path, step: int, say: Callable[[str], None] = print) -> None:
    """Remove the results of later steps, which the run will take again, possibly with other settings: delete snapshots
    and grids, and rename checkpoints, which are damaged and would still count as the newest ones."""
    for path_step, path in [*list_snapshots(run).items(), *paths_by_step(run / "samples", ".png").items()]:
        if path_step > step:
            path.unlink()
    for checkpoint in list_checkpoints(run / "checkpoints"):
        if int(checkpoint.name) > step:
            say(f"{checkpoint} is damaged, and is now {checkpoint.rename(unused_path(checkpoint))}")


def resume_config(config: R, checkpoint: Path, say: Callable[[str], None]) -> R:
    """Validate the configuration of a resumed run against its checkpoint. Raises a CheckpointError that names a flag
    which must not change, or settings that its config.yaml lacks."""
    metadata, run = read_metadata(checkpoint / WEIGHTS), checkpoint.parent.parent
    if "config" not in metadata:  # older checkpoints of autoencoders
        return with_resume(config, None)
    contents = json.loads(metadata.get("imports", "{}"))
    load_imports(getattr(config, "imports", ()), stored_in=run, contents=contents)
    values, in_yaml = json.loads(metadata["config"]), flatten(yaml.safe_load((run / "config.yaml").read_text()))
    if missing := [f"{flag}: {value}" for flag, value in flatten(values).items() if flag not in in_yaml]:
        raise CheckpointError(f"--resume {run}: its config.yaml is cut short, put back {join_abridged(missing, 8)}")
    stored = from_dict(type(config), values)
    old, new = stored.identity(), config.identity()
    for flag in {**old, **new}:
        if old.get(flag) != new.get(flag):
            raise CheckpointError(
                f"--{flag} {new.get(flag)}: {run} was trained with {old.get(flag)}, and its checkpoints mean "
                f"nothing else; leave it out, or start a run of another --name (--init_from {run})"
            )
    _check_epochs(config, stored, metadata, checkpoint)
    for flag in ("name", "init_from"):
        if getattr(config, flag) != getattr(stored, flag):
            say(f"--{flag} {getattr(config, flag)}: without effect on {run}, which is resumed")
    config = replace(config, name=stored.name, init_from=stored.init_from)  # pyright: ignore[reportArgumentType]
    return with_resume(config, None)


def _check_epochs(config: RunConfig, stored: RunConfig, metadata: Mapping[str, str], checkpoint: Path) -> None:
    """Raise CheckpointError if epochs would count steps of other batch sizes like those to come."""
    train: Any = config.train
    step = int(checkpoint.name)
    num_seen = images_seen(metadata, step, stored.train.batch_size)
    if num_seen == step * train.batch_size:
        return
    steps_were = f"--train.batch_size {train.batch_size}: {step} steps were of other sizes"
    if hasattr(train, "num_epochs") and config.optim.decay == "step":
        raise CheckpointError(
            f"{steps_were}, and --optim.decay step would count them alike; take another --optim.decay"
        )
    if train.num_steps is not None:
        return
    images = json.loads(metadata.get("identity", "{}")).get("train", {}).get("num_images", math.nan)
    num_epochs = train.num_epochs or DEFAULT_EPOCHS
    left = (num_epochs * images - num_seen) / train.batch_size
    raise CheckpointError(
        f"{steps_were}, and --train.num_epochs would count them alike; give "
        f"--train.num_steps {'N' if math.isnan(left) else step + max(0, math.ceil(left))} --train.num_epochs null, "
        f"which makes {num_epochs} epochs"
    )


def images_seen(metadata: Mapping[str, str], step: int, batch_size: int) -> int:
    """Number of images in all steps of a checkpoint, whose batches may have had other sizes before the present one."""
    num_seen = since = 0
    for part in json.loads(metadata.get("history", "[]")):
        if former := part["settings"].get("train.batch_size"):
            num_seen, since = num_seen + (part["until"] - since) * former, part["until"]
    return num_seen + (step - since) * batch_size


# Groups of settings that may change, and that results depend on.
RECIPE = ("optim.", "train.", "loss.", "discriminator.", "auxiliary", "alignment.weight")
LENGTHS_AND_PATHS = {"train.num_steps", "train.num_epochs", "train.max_hours", "alignment.weights_path"}


def former_settings(checkpoint: Path, config: RunConfig) -> list[dict[str, Any]]:
    """Former settings of a resumed training, oldest first: `settings` by flag, `until` a step."""
    metadata = read_metadata(checkpoint / WEIGHTS)
    history = json.loads(metadata.get("history", "[]"))
    former, now = (flatten(json.loads(text)) for text in (metadata.get("config", "{}"), json.dumps(config.to_dict())))
    names = [name for name in former if name.startswith(RECIPE) and name not in LENGTHS_AND_PATHS and name in now]
    changed = {name: former[name] for name in names if former[name] != now[name]}
    return [*history, {"until": int(checkpoint.name), "settings": changed}] if changed else history


def changed_metric(checkpoint: Path, config: RunConfig, identity: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """List changed settings, with former values, that make earlier values of `log.best` incomparable."""
    metadata, flags = read_metadata(checkpoint / WEIGHTS), flatten(json.loads(json.dumps(config.to_dict())))
    if flags.get("log.best") is None or "config" not in metadata:
        return []
    former, is_loss = flatten(json.loads(metadata["config"])), flags["log.best"] == "validation_loss"
    prefixes = ("log.num_validation", "train.seed", "auxiliary") if is_loss else ("evaluation.", "sampling.")
    irrelevant = {"evaluation.batch_size", "evaluation.weights_path"}
    relevant = [flag for flag in flags if flag.startswith(("log.best", *prefixes)) and flag not in irrelevant]
    changed = [f"--{flag} {former[flag]}" for flag in relevant if flag in former and former[flag] != flags[flag]]
    codec = json.loads(metadata.get("identity", "{}")).get("codec", {})
    in_both = {"decoder_sha256"} & codec.keys() & identity.get("codec", {}).keys()
    if not is_loss and any(codec[name] != identity["codec"][name] for name in in_both):
        changed.append("decoder of --autoencoder")
    return changed
