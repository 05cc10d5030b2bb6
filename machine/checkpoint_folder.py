"""Checkpoint folders, one per step: written under a temporary name with checksums, then renamed; verified before
they are read."""

import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from machine.atomic_files import atomic_path, sha256_of, unused_path

CHECKSUMS = "checksums.json"
BEST = "best"


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or of another model; the message is for the user."""


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"{step:08d}"


def write_checkpoint(target: Path, fill: Callable[[Path], None]) -> None:
    """Write a checkpoint folder, filled by `fill`; after an OSError all older ones remain, of this step too."""
    partial, aside = _hidden_path(target, "partial"), _hidden_path(target, "aside")
    _restore_moved(target.parent)
    for left_over in [*target.parent.glob(".*.partial"), *target.parent.glob(".*.aside")]:
        shutil.rmtree(left_over, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        fill(partial)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        checksums = {path.relative_to(partial).as_posix(): sha256_of(path) for path in files}
        (partial / CHECKSUMS).write_text(json.dumps(checksums, indent=2))
        for path in [*files, partial / CHECKSUMS, *{file.parent for file in files}, partial]:
            _fsync(path)
        if target.exists():
            target.rename(aside)
        partial.rename(target)
        _fsync(target.parent)
    except Exception as error:
        _restore_moved(target.parent)
        shutil.rmtree(partial, ignore_errors=True)
        full = any(words in str(error) for words in ("No space left", "quota exceeded"))
        remedy = "make room" if full else "fix that"
        raise OSError(f"checkpoint {target} could not be written ({error}); {remedy} and --resume") from error
    if aside.exists():
        _delete(aside, "replaced.partial")


def list_checkpoints(folder: Path) -> list[Path]:
    """List complete checkpoints, oldest first."""
    _restore_moved(folder)
    return [*paths_by_step(folder).values()]


def paths_by_step(folder: Path, suffix: str = "") -> dict[int, Path]:
    """Paths named by a step only, in order: folders like `00000100`, or with a suffix files."""
    paths = [path for path in folder.glob(f"[0-9]*{suffix}") if path.name.removesuffix(suffix).isdecimal()]
    paths = [path for path in paths if path.is_dir() != bool(suffix)]
    return {int(path.stem): path for path in sorted(paths, key=lambda path: int(path.stem))}


def rotate(folder: Path, *, keep: int, keep_every: int = 0) -> None:
    """Delete all checkpoints except the newest `keep` intact ones, every `keep_every` steps' and the best."""
    if keep < 1:
        raise ValueError(f"--log.keep_checkpoints {keep} must be at least 1")
    best, num_whole = (folder / BEST).resolve(), 0
    for checkpoint in reversed(list_checkpoints(folder)):
        if num_whole < keep:
            with suppress(OSError):
                num_whole += find_damage(checkpoint) is None
        elif not (keep_every > 0 and int(checkpoint.name) % keep_every == 0) and checkpoint.resolve() != best:
            _delete(checkpoint, "rotated.partial")


def _hidden_path(checkpoint: Path, what: str) -> Path:
    return checkpoint.with_name(f".{checkpoint.name.strip('.')}.{os.getpid()}.{what}")


def _delete(checkpoint: Path, what: str) -> None:
    """Hide the checkpoint by a rename, then delete it; the next save retries files that cannot be deleted now."""
    with suppress(OSError):
        shutil.rmtree(checkpoint.rename(_hidden_path(checkpoint, what)), ignore_errors=True)


def _restore_moved(folder: Path) -> None:
    """Restore checkpoints that were moved aside for a replacement which a kill or an error prevented."""
    for aside in folder.glob(".*.aside"):
        target = aside.with_name(aside.name.split(".")[1])
        if not target.exists():
            with suppress(OSError):  # another process did it
                aside.rename(target)


@dataclass
class Best:
    """The best value of a metric so far and its step. The state is saved in checkpoints."""

    metric: str | None = None  # its name in the log; None if no checkpoint is the best
    lower: bool = True  # whether lower values are better
    value: float | None = None
    step: int | None = None
    measured_by: str | None = None  # hashes of the extractor etc.; values by others do not compare
    lost: bool = False  # whether `restore` found such a value

    def improves(self, value: float, step: int) -> bool:
        """Record the value if it is the best so far, and return whether it is."""
        better = self.value is None or (value < self.value if self.lower else value > self.value)
        if math.isfinite(value) and better:
            self.value, self.step = value, step
            return True
        return False

    def state(self) -> dict[str, Any]:
        return {"value": self.value, "step": self.step, "measured_by": self.measured_by}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned; a value that others have measured becomes None."""
        self.value, self.step = state["value"], state["step"]
        if self.value is not None and state.get("measured_by", self.measured_by) != self.measured_by:
            self.value, self.lost = None, True


def check_links(folder: Path) -> None:
    """Raise ValueError if the file system of a folder has no links, as `mark_best` makes after hours of training."""
    try:
        with TemporaryDirectory(dir=folder, prefix=".") as temporary:
            Path(temporary, BEST).symlink_to(temporary)
    except OSError as error:
        raise ValueError(
            f"--log.best: it is a link, and {folder} takes none ({error.strerror}); leave it out"
        ) from error


def mark_best(folder: Path, step: int | None) -> bool:
    """Point the link `folder/best` to this step's checkpoint, if it exists, else remove it; return which. A copy of the
    run may have a folder in the link's place, which is kept under another name."""
    link = folder / BEST
    if link.is_dir() and not link.is_symlink():
        print(f"{link} was no link, and is now {link.rename(unused_path(link))}", flush=True)
    if step is None or not checkpoint_path(folder, step).is_dir():
        (folder / BEST).unlink(missing_ok=True)
        return False
    with atomic_path(folder / BEST) as partial:
        partial.symlink_to(checkpoint_path(folder, step).name, target_is_directory=True)
    return True


def find_damage(checkpoint: Path) -> str | None:
    """Describe what is wrong with a checkpoint's files; None if all checksums match. Raises OSError if they cannot be
    read, which may be so for a moment alone."""
    try:
        checksums = dict(json.loads((checkpoint / CHECKSUMS).read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return f"{CHECKSUMS} is missing or damaged"
    for name, expected in checksums.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256_of(path) != expected:
            return f"{name} has another checksum"
    return None


def newest_intact(folder: Path, say: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint whose checksums match; damaged ones are reported and skipped."""
    for checkpoint in reversed(list_checkpoints(folder)):
        if (wrong := find_damage(checkpoint)) is None:
            return checkpoint
        say(f"checkpoint {checkpoint} is damaged: {wrong}; going back to the one before")
    return None


def checkpoint_to_resume(run: Path) -> Path:
    """The checkpoint from which `--resume RUN` continues. Raises CheckpointError if there is none."""
    if checkpoint := newest_intact(run / "checkpoints"):
        return checkpoint
    words = f"{run / 'checkpoints'} holds no whole checkpoint; start again with --resume auto and the first one's flags"
    raise CheckpointError(f"--resume {run}: nothing to resume, {words}")


def _fsync(path: Path) -> None:
    """Flush to disk, so that after a power loss a renamed folder is never empty; not all file systems flush folders."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno == errno.EINVAL):
            raise
    finally:
        os.close(handle)
