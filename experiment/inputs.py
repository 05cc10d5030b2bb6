"""Check that the files and folders that settings name exist, or can be written, before libraries are imported, which
takes seconds."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from machine.hugging_face import SCHEME
from settings import UNSET


class Kind(NamedTuple):
    """A kind of names: whether something by a name exists, and the rest of the sentence if not."""

    exists: Callable[[str], bool]
    problem: str


def is_images(name: str) -> bool:
    """Whether a name is of images on the disk, on the hub, or of a data set in code."""
    known = name == "shapes" or name in _registered("data", "DATASETS")
    return known or name.startswith(SCHEME) or Path(name).exists()


def is_checkpoint(name: str) -> bool:
    """Whether a name is of a checkpoint on the hub or in this repository, or the path of anything."""
    return name == "embedded" or name.startswith(SCHEME) or Path(name).exists()


def is_autoencoder(name: str) -> bool:
    """Whether a name is of a folder, of an autoencoder of this repository or from outside, or may be a hub id."""
    parts = name.split("/")
    is_hub_id = len(parts) > 1 and "" not in parts and parts[0] not in (".", "..", "~")
    is_mistyped = parts[0] == "runs" or (len(parts) > 2 and Path(name).parent.is_dir())
    known = name == "pixel" or name.startswith("embedded") or name in _registered("autoencoders.codec", "CODECS")
    return Path(name).is_dir() or ("," not in name and (known or (is_hub_id and not is_mistyped)))


def _registered(module: str, table: str) -> Any:
    """The names in a table of `experiment.registry`; it is empty unless `--imports` has loaded its module."""
    return getattr(sys.modules.get(module), table, ())


def is_name_or_file(name: str) -> bool:
    """Whether a file exists, if a name looks like the path of one; other names are left to those who know them all."""
    looks_like_path = "/" in name or Path(name).suffix[1:2].isalpha()
    return ":" in name or not looks_like_path or Path(name).is_file()


def is_weights(name: str) -> bool:
    """Whether a file exists, or a name is that of a public one."""
    from conversion.public_files import is_public

    return Path(name).is_file() or is_public(name)


GIVE_CHECKPOINT = "a run's folder, a checkpoint, ema.safetensors, hf://owner/name or embedded"
GIVE_SAMPLES = "a run's folder, a checkpoint, hf://owner/name, embedded, a folder or zip of images, or an npz"
GIVE_IMAGES = "a folder, a zip, tar or parquet shards of images, hf://owner/name, or 'shapes'"
NO_FILE = ": no such file"
KINDS = {
    "images": Kind(is_images, f": is neither a folder nor a file; give {GIVE_IMAGES}"),
    "checkpoint": Kind(is_checkpoint, f" does not exist; give {GIVE_CHECKPOINT}"),
    "samples": Kind(is_checkpoint, f" does not exist; give {GIVE_SAMPLES}"),
    "autoencoder": Kind(is_autoencoder, ": no such folder; give one in diffusers' format, a hub id, or embedded"),
    "reference": Kind(lambda name: name.startswith("VIRTUAL_imagenet") or Path(name).is_file(), NO_FILE),
    "weights": Kind(is_weights, NO_FILE),
    "name or file": Kind(is_name_or_file, NO_FILE),
    "file": Kind(lambda name: Path(name).is_file(), NO_FILE),
    "folder": Kind(lambda name: Path(name).is_dir(), ": no such folder"),
    "file or folder": Kind(lambda name: Path(name).exists(), ": no such file or folder"),
}


def check_inputs(config: Any, prefix: str = "--") -> None:
    """Raise ValueError, naming the flag, if a setting that `settings.reads` declares names nothing that exists, or one
    of several names with commas in between, or one of `settings.writes` what cannot be written. Only the main process
    checks, as others may not see its files. Settings in `config.unread` are left out."""
    if os.environ.get("RANK", "0") != "0":
        return
    for setting in (setting for setting in fields(config) if setting.name not in getattr(config, "unread", ())):
        value, kind = getattr(config, setting.name), KINDS.get(setting.metadata.get("reads", ""))
        for part in value if isinstance(value, list) else [value]:
            if is_dataclass(part):
                check_inputs(part, f"{prefix}{setting.name}.")
            elif "writes" in setting.metadata and part not in (None, UNSET):
                check_output(f"{prefix}{setting.name}", Path(part), setting.metadata["writes"].split())
            elif kind is not None and part not in (None, UNSET):
                names = [str(part)] if kind.exists(str(part)) else str(part).split(",")
                if not all(map(kind.exists, names)):
                    raise ValueError(f"{prefix}{setting.name} {part}{kind.problem}")


def check_output(flag: str, path: Path, endings: Sequence[str] = ()) -> None:
    """Raise ValueError, naming the flag, unless a file with one of these endings can be written at the path."""
    if endings and (path.suffix.lower() not in endings or path.is_dir()):
        raise ValueError(f"{flag} {path}: give {' or '.join(f'FILE{ending}' for ending in endings)}")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{flag} {path}: nothing can be written in {folder}")
