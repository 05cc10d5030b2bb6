"""Going on with a run: what its weights mean stays, anything else may change."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from checkpoints.checkpoint import WEIGHTS, read_metadata
from checkpoints.training_state import SNAPSHOTS, list_snapshots
from data.images import abridged
from experiment.imports import load_imports
from experiment.mappings import flatten, from_dict
from experiment.run_config import R, RunConfig, resuming
from machine.checkpoint_folder import CheckpointError, by_step, list_checkpoints, to_resume
from machine.whole_files import beside

LEFT_BEHIND = (SNAPSHOTS, "log.jsonl", "tracking", "samples*", "scores*", "progress.*", "ema-*.safetensors")


def start_or_go_on(config: R, say: Callable[[str], None]) -> tuple[R, Path | None]:
    """The configuration of a fresh run, or of a resumed one and its checkpoint; or a FileExistsError."""
    run = config.folder
    if (run / "plan.json").is_file():
        raise FileExistsError(f"{run} holds an ablation; give another --name")
    if config.resume:
        checkpoint = to_resume(run)
        return go_on(config, checkpoint, say), checkpoint
    if (run / WEIGHTS).exists():  # imported, or of the hub: they would go on being what `run` means to all readers
        raise FileExistsError(f"{run} holds weights already, {WEIGHTS}: give another --name")
    if list_checkpoints(run / "checkpoints"):
        raise FileExistsError(f"{run} holds a run already: --resume {run}, give another --name, or delete it")
    for path in [path for pattern in LEFT_BEHIND for path in run.glob(pattern) if ".before-" not in path.name]:
        say(f"{path} is of an earlier training, and is now {_aside(path)}")
    return config, None


def take_back(run: Path, step: int, say: Callable[[str], None] = print) -> None:
    """What there is of steps after this one, which a run takes again: snapshots, which with other settings would be of
    another training, and grids go; checkpoints, which are damaged, get another name, as they would go on being the
    newest to whoever reads the run."""
    for number, path in [*list_snapshots(run).items(), *by_step(run / "samples", ".png").items()]:
        if number > step:
            path.unlink()
    for checkpoint in list_checkpoints(run / "checkpoints"):
        if int(checkpoint.name) > step:
            say(f"{checkpoint} is damaged, and is now {_aside(checkpoint)}")


def _aside(path: Path) -> Path:
    return path.rename(beside(path))


def go_on(config: R, checkpoint: Path, say: Callable[[str], None]) -> R:
    """The configuration of a resumed run; a CheckpointError names a flag that changes its meaning, or what is lost."""
    metadata, run = read_metadata(checkpoint / WEIGHTS), checkpoint.parent.parent
    if "config" not in metadata:  # an autoencoder's, before it kept it
        return resuming(config, None)
    contents = json.loads(metadata.get("imports", "{}"))
    load_imports(getattr(config, "imports", ()), stored_in=run, contents=contents)
    values, written = json.loads(metadata["config"]), flatten(yaml.safe_load((run / "config.yaml").read_text()))
    if lost := [f"{flag}: {value}" for flag, value in flatten(values).items() if flag not in written]:
        raise CheckpointError(f"--resume {run}: its config.yaml is cut short, put back {abridged(lost, 8)}")
    stored = from_dict(type(config), values)
    before, asked = stored.identity(), config.identity()
    for flag in {**before, **asked}:
        if before.get(flag) != asked.get(flag):
            raise CheckpointError(
                f"--{flag} {asked.get(flag)}: {run} was trained with {before.get(flag)}, and its checkpoints mean "
                f"nothing else; leave it out, or start a run of another --name (--init_from {run})"
            )
    for flag in ("name", "init_from"):
        if getattr(config, flag) != getattr(stored, flag):
            say(f"--{flag} {getattr(config, flag)}: without effect on {run}, which is resumed")
    config = replace(config, name=stored.name, init_from=stored.init_from)  # pyright: ignore[reportArgumentType]
    return resuming(config, None)


def other_measure(checkpoint: Path, config: RunConfig, identity: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What `log.best` was measured by, and is not any more: a best value from then compares with none to come."""
    metadata, flags = read_metadata(checkpoint / WEIGHTS), flatten(json.loads(json.dumps(config.to_dict())))
    if flags.get("log.best") is None or "config" not in metadata:
        return []
    before, is_loss = flatten(json.loads(metadata["config"])), flags["log.best"] == "validation_loss"
    by = ("log.num_validation", "train.seed", "auxiliary") if is_loss else ("evaluation.", "sampling.")
    idle = {"evaluation.batch_size", "evaluation.weights_path"}
    named = [flag for flag in flags if flag.startswith(("log.best", *by)) and flag not in idle and flag in before]
    others = [f"--{flag} {before[flag]}" for flag in named if before[flag] != flags[flag]]
    codec = json.loads(metadata.get("identity", "{}")).get("codec", {})
    decoder = {"decoder_sha256"} & codec.keys() & identity.get("codec", {}).keys()
    has_other = not is_loss and any(codec[name] != identity["codec"][name] for name in decoder)
    return [*others, *["decoder of --autoencoder"] * has_other]
