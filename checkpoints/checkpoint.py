"""Reading checkpoints: `runs/<name>/checkpoints/<step>/ema.safetensors`, or that file alone.

The file is all that sampling and evaluation need. Its metadata hold the configuration, the arguments of the backbone
that follow from the data, the class names, the identity of autoencoder and splits, the step, the commit, and checksums
of metadata and weights, which every reader verifies. Files for resuming are next to it: `checkpoints.training_state`.
"""

import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from autoencoders.codec import Codec, add_to_hash, create_codec, weights_sha256
from checkpoints.hub import ASSET, EMBEDDED, is_checkpoint_name, resolve_to_file
from data.latents import abbreviate
from diffusion.diffusion import Diffusion
from experiment.build import build_diffusion
from experiment.config import ExperimentConfig
from experiment.imports import contents_of, load_imports
from experiment.mappings import from_dict
from experiment.run_config import RunConfig
from machine.accelerator import from_main
from machine.checkpoint_folder import CheckpointError, list_checkpoints
from machine.sharding import shard_like
from models import ModelSpec

WEIGHTS = "ema.safetensors"
LABELS = "label.weight"  # suffix of the names of label embeddings
OF_A_HOOK = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")  # variables by which git would describe another repository


@dataclass(frozen=True)
class Checkpoint:
    """The contents of `ema.safetensors`: metadata, and weights that are read on demand."""

    path: Path
    config: ExperimentConfig
    spec: ModelSpec
    classes: list[str]
    step: int
    commit: str
    identity: dict[str, dict[str, Any]]  # of `codec`, `train` and `test`; empty in older checkpoints
    weights_sha256: str | None  # None in older checkpoints

    @property
    def run(self) -> Path:
        """The run's folder; that of the weights if they lie outside a run; for embedded weights, a folder in runs/."""
        folder = self.path.parent
        if folder.resolve() == ASSET:
            return Path("runs", "embedded-checkpoint")
        return folder.parent.parent if folder.parent.name == "checkpoints" else folder

    @property
    def output_suffix(self) -> str:
        """Suffix for names of outputs: empty for a run's newest checkpoint, otherwise it identifies the weights."""
        saved, folder = list_checkpoints(self.run / "checkpoints"), self.path.parent
        if self.path.name != WEIGHTS:
            return f"-{self.path.stem}"
        is_newest = not saved or folder.resolve() == saved[-1].resolve() or folder.parent.name != "checkpoints"
        return "" if is_newest else f"-{folder.name}"

    @property
    def image_size(self) -> tuple[int, int]:
        return self.config.data.image_size, self.config.data.image_size

    @property
    def autoencoder(self) -> str:
        """The configured autoencoder; a relative folder that does not exist is looked up in the run's parents."""
        name = self.config.autoencoder
        places = [] if Path(name).is_dir() else [parent / name for parent in self.run.resolve().parents]
        return next((str(place) for place in places if (place / "config.json").is_file()), name)

    @property
    def num_guided(self) -> int:
        """Number of classes that can be guided away from the null label."""
        return self.config.guided_classes(len(self.classes))

    def load_model(self, device: torch.device | str = "cpu") -> nn.Module:
        """Build the backbone and load its EMA weights, in eval mode, frozen and on `device`. Raises
        CheckpointError if the file has other weights than when it was opened."""
        with torch.random.fork_rng(devices=[]):  # loading must not advance the global random state
            model = self.spec.build()
        load_weights(model.state_dict(), self.path)
        self.check_unchanged()
        return model.eval().requires_grad_(False).to(device)

    def check_unchanged(self) -> None:
        """Raise CheckpointError if the file has other weights than when it was opened, as `checkpoints/best` moves."""
        if read_metadata(self.path).get("weights_sha256") != self.weights_sha256:
            raise CheckpointError(f"--checkpoint {self.path}: replaced while it was read; give the command again")

    def build_diffusion(self) -> Diffusion:
        return build_diffusion(self.config.diffusion)

    def open_codec(self, asked: str | None, say: Callable[[str], None] = print) -> Codec:
        """Open and verify its autoencoder, or the one `asked` for in its place; a change of the latents is reported by
        `say`. Older checkpoints have no record of their autoencoder, and accept any."""
        codec, known = create_codec(asked or self.autoencoder), self.identity.get("codec", {})
        if known and asked is None:
            self.check_identity(codec=codec.provenance)
        elif known and any(known.get(name) != value for name, value in codec.identity.items()):
            say(f"--autoencoder {asked}: its latents differ from those that {self.path} was trained on")
        return codec

    def check_identity(self, **here: Mapping[str, Any]) -> None:
        """Verify that these are the parts that it was trained with, see the function `check_identity`."""
        check_identity(self.path, here, self.identity)


FLAGS = {"codec": "--autoencoder", "alignment": "--alignment.extractor"}  # flags of parts; the others are images


def check_identity(
    weights: Path,
    here: Mapping[str, Mapping[str, Any]],
    identity: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    any_decoder: bool = False,
) -> None:
    """Raise CheckpointError, naming the flag, unless the content of autoencoder and splits is that which a checkpoint
    was trained with. Older checkpoints know only the name of the autoencoder, and the classes.

    Args:
        here: the parts in use, such as `{"codec": codec.provenance, "test": dataset.describe()}`.
        identity: the checkpoint's own; by default it is read from its file, `weights`.
        any_decoder: accept another decoder, as long as latents are the same.
    """
    metadata = read_metadata(weights)
    trained_with = json.loads(metadata.get("identity", "{}")) if identity is None else identity
    older = {"codec": {"autoencoder": json.loads(metadata.get("config", "{}")).get("autoencoder")}}
    if "classes" in metadata:
        older |= {part: {"classes": json.loads(metadata["classes"])} for part in ("train", "test")}
    for part, values in here.items():
        ignored = {"source", "autoencoder"} if part in trained_with else set[str]()  # paths, where hashes are known
        ignored |= {"decoder_sha256"} if any_decoder else set()
        for name, value in trained_with.get(part, older.get(part, {})).items():
            if name not in ignored and values.get(name) != value:
                flag, remedy = FLAGS.get(part, "--data.path"), "give the one that it was trained with"
                if name == "decoder_sha256":  # the last entry of a codec, so the entries about latents are the same
                    remedy += f", or this one by --autoencoder {values.get('autoencoder')}, as its latents are the same"
                raise CheckpointError(
                    f"{flag}: {weights} was trained with another {part}, whose {name} was {abbreviate(value)}, here "
                    f"{abbreviate(values.get(name))}; {remedy}"
                )


def make_metadata(
    config: RunConfig, step: int, identity: Mapping[str, Mapping[str, Any]] | None = None, **entries: Any
) -> dict[str, str]:
    """Return the metadata of a checkpoint; for a backbone, `entries` are `spec` and `classes`."""
    values = {"config": config.to_dict(), "step": step, "identity": identity or {}, **entries}
    values |= {"imports": contents_of(getattr(config, "imports", ()))}
    encoded = {name: json.dumps(value, default=asdict) for name, value in values.items()}
    return {**encoded, "commit": current_commit()}


def open_checkpoint(path: str | Path, accelerator: Accelerator | None = None) -> Checkpoint:
    """Open a checkpoint, without its weights: a run's newest one, a checkpoint's folder, the weights file,
    hf://owner/name, or `embedded`. With an accelerator the main process chooses for all, see `find_weights`. Raises
    CheckpointError if there is none, or if it is damaged or malformed."""
    weights = find_weights(path, accelerator)
    metadata = read_metadata(weights)
    missing = {"config", "spec", "classes", "step", "commit"} - metadata.keys()
    if missing:
        raise CheckpointError(f"--checkpoint {weights}: not written by train.py, it lacks {sorted(missing)}")
    imports, contents = [], {}
    with suppress(ValueError, TypeError, KeyError, AttributeError):  # malformed metadata are reported below
        imports = [str(name) for name in json.loads(metadata["config"])["imports"]]
        contents = dict(json.loads(metadata.get("imports", "{}")))
    load_imports(imports, stored_in=weights, contents=contents)  # before the configuration, to which they add settings
    try:
        spec, classes = json.loads(metadata["spec"]), json.loads(metadata["classes"])
        checkpoint = Checkpoint(
            path=weights,
            config=from_dict(ExperimentConfig, json.loads(metadata["config"])),
            spec=ModelSpec(**{**spec, "input_size": tuple(spec["input_size"])}),
            classes=[str(name) for name in classes],
            step=int(metadata["step"]),
            commit=metadata["commit"],
            identity={name: dict(part) for name, part in json.loads(metadata.get("identity", "{}")).items()},
            weights_sha256=metadata.get("weights_sha256"),
        )
        if checkpoint.classes != classes or len(classes) != checkpoint.spec.num_classes:
            raise ValueError(f"{checkpoint.spec.num_classes} classes, named {abbreviate(classes)}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"--checkpoint {weights}: its metadata are malformed, or of an earlier commit ({error})"
        ) from error
    return checkpoint


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Save a safetensors file with checksums in its metadata; equal tensors and metadata give equal bytes."""
    metadata = {**metadata, "weights_sha256": weights_sha256(tensors)}
    try:
        save_file(dict(tensors), path, metadata={**metadata, "metadata_sha256": _sha256(metadata)})
    except SafetensorError as error:  # raised for errors of the disk
        raise OSError(f"{path} could not be written ({error}); check the disk") from error
    _sort_header(path)


def _sort_header(path: Path) -> None:
    """Sort the metadata in a safetensors file's header, which the library writes in random order."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(length))


def read_metadata(path: Path) -> dict[str, str]:
    """Read and verify the metadata of a safetensors file, without its tensors."""
    with _opened(path) as file:
        metadata = file.metadata() or {}
    if metadata.get("metadata_sha256", _sha256(metadata)) != _sha256(metadata):
        raise CheckpointError(f"--checkpoint {path}: its metadata have another checksum; give another copy of it")
    return metadata


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read and verify the tensors of a safetensors file."""
    return dict(iterate_tensors(path))


def read_shapes(path: Path) -> dict[str, torch.Size]:
    """Read the shapes of the tensors of a safetensors file."""
    with _opened(path) as file:
        return {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def iterate_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Read tensors one at a time, so that only what is kept of them takes memory, and verify them at the end."""
    expected, digest = read_metadata(path).get("weights_sha256"), hashlib.sha256()
    with _opened(path) as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            if expected is not None:
                add_to_hash(digest, name, tensor)
            yield name, tensor
    if expected is not None and digest.hexdigest() != expected:
        raise CheckpointError(f"--checkpoint {path}: its weights have another checksum; give another copy of it")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"--checkpoint {path}: cut short or not a safetensors file ({error})") from error


def _sha256(metadata: Mapping[str, str]) -> str:
    """Hash the metadata without their own checksum."""
    entries = {name: value for name, value in metadata.items() if name != "metadata_sha256"}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def load_weights(tensors: dict[str, Tensor], path: Path) -> None:
    """Copy the tensors of a file in place into those, or the shards, of a model or average of the same shapes."""
    ours, theirs = {name: tensor.shape for name, tensor in tensors.items()}, read_shapes(path)
    if mismatched := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
        raise CheckpointError(
            f"{path} is of another model: {len(mismatched)} tensors do not fit, such as {', '.join(mismatched[:3])}"
        )
    with torch.no_grad():
        for name, tensor in iterate_tensors(path):
            tensors[name].copy_(shard_like(tensor, tensors[name]))


def current_commit() -> str:
    """Return the commit of the code, with a '+' if the tree has changes; empty outside a git checkout, and without
    git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=+"]
    environment = {name: value for name, value in os.environ.items() if name not in OF_A_HOOK}
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment).stdout.strip()
    return ""


def find_weights(path: str | Path, accelerator: Accelerator | None = None) -> Path:
    """Return the file of weights of a checkpoint, which for a run's folder is the newest. With an accelerator, the main
    process chooses for all, because a training may be writing another checkpoint."""
    if accelerator and not is_checkpoint_name(path):
        return from_main(accelerator, partial(find_weights, path))
    path = resolve_to_file(path, WEIGHTS)
    if path.is_file():
        return path
    if (path / WEIGHTS).is_file():
        return path / WEIGHTS
    checkpoints = list_checkpoints(path / "checkpoints")
    if checkpoints:
        return checkpoints[-1] / WEIGHTS
    reason = "holds no checkpoint" if path.exists() else "does not exist"
    raise CheckpointError(
        f"--checkpoint {path} {reason}; give a run's folder, a checkpoint, {WEIGHTS}, hf://owner/name or {EMBEDDED}"
    )
