"""Checkpoints as they are read: `runs/<name>/checkpoints/<step>/ema.safetensors`, or that file alone.

It is enough to sample and to score: its metadata carries the configuration, the backbone's derived arguments, the class
names, what autoencoder and splits it was trained with, the step, the commit, and checksums of itself and of the
weights, which every reader checks. What resuming needs lies beside it: `checkpoints.training_state`.
"""

import hashlib
import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from autoencoders.codec import Codec, create_codec, weights_sha256
from checkpoints.hub import ASSET, EMBEDDED, is_name, local
from data.images import abridged
from data.latents import short
from diffusion.diffusion import Diffusion
from experiment.build import build_diffusion, meaning_of
from experiment.config import DiffusionConfig, ExperimentConfig
from experiment.imports import contents_of, load_imports
from experiment.mappings import from_dict
from experiment.run_config import RunConfig
from machine.accelerator import from_main
from machine.checkpoint_folder import CheckpointError, list_checkpoints
from machine.sharding import part_like
from models import ModelSpec

WEIGHTS = "ema.safetensors"
LABELS = "label.weight"  # how the name of a table of labels ends


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
        """The run's folder, or the weights' own where they lie outside one; of the embedded ones a place in runs/."""
        folder = self.path.parent
        if folder.resolve() == ASSET:  # by whatever path
            return Path("runs", "embedded-checkpoint")
        return folder.parent.parent if folder.parent.name == "checkpoints" else folder

    @property
    def mark(self) -> str:
        """For names of what is made from it: nothing of a run's newest checkpoint, else which weights of the run."""
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
        """Of its configuration; a folder that is not there from here is looked for from where the run lies."""
        name = self.config.autoencoder
        places = [] if Path(name).is_dir() else [parent / name for parent in self.run.resolve().parents]
        return next((str(place) for place in places if (place / "config.json").is_file()), name)

    @property
    def num_guided(self) -> int:
        """Of its classes those that can be guided away from the null label."""
        return self.config.guided_classes(len(self.classes))

    def load_model(self, device: torch.device | str = "cpu") -> nn.Module:
        with torch.random.fork_rng(devices=[]):  # a guide is none of what a training's seed is for
            model = self.spec.build()
        load_weights(model.state_dict(), read_tensors(self.path), self.path)
        return model.eval().requires_grad_(False).to(device)

    def build_diffusion(self) -> Diffusion:
        return build_diffusion(self.config.diffusion)

    def open_codec(self, asked: str | None, say: Callable[[str], None] = print) -> Codec:
        """Its own autoencoder, checked, or what is asked for in its place: one of other latents is told of. Older
        checkpoints know of none, and take any."""
        codec, known = create_codec(asked or self.autoencoder), self.identity.get("codec", {})
        if known and asked is None:
            self.check_identity(codec=codec.provenance)
        elif known and any(known.get(name) != value for name, value in codec.identity.items()):
            say(f"--autoencoder {asked}: its latents are others than those that {self.path} was trained on")
        return codec

    def check_identity(self, **here: Mapping[str, Any]) -> None:
        """That these are the parts that it was trained with: see `check_identity` below."""
        check_identity(self.path, here, self.identity)


FLAGS = {"codec": "--autoencoder", "alignment": "--alignment.extractor"}  # of parts; the others are images


def check_identity(
    weights: Path,
    here: Mapping[str, Mapping[str, Any]],
    identity: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    any_decoder: bool = False,
) -> None:
    """That an autoencoder (`{"codec": codec.provenance}`) and splits (`{"test": dataset.describe()}`) are by content
    those that a checkpoint was trained with; of older ones only name and classes are known. A CheckpointError names the
    flag, and what differs. `identity` is read off the weights where it is not at hand; with `any_decoder` latents alone
    have to be the same."""
    metadata = read_metadata(weights)
    trained_with = json.loads(metadata.get("identity", "{}")) if identity is None else identity
    older = {"codec": {"autoencoder": json.loads(metadata.get("config", "{}")).get("autoencoder")}}
    if "classes" in metadata:
        older |= {part: {"classes": json.loads(metadata["classes"])} for part in ("train", "test")}
    for part, values in here.items():
        places = {"source", "autoencoder"} if part in trained_with else set[str]()
        places |= {"decoder_sha256"} if any_decoder else set()
        for name, value in trained_with.get(part, older.get(part, {})).items():
            if name not in places and values.get(name) != value:
                flag, remedy = FLAGS.get(part, "--data.path"), "give the one that it was trained with"
                if name == "decoder_sha256":  # the last of a codec's: its latents are the same
                    remedy += f", or this one by --autoencoder {values.get('autoencoder')}, as its latents are the same"
                raise CheckpointError(
                    f"{flag}: {weights} was trained with another {part}, whose {name} was {short(value)}, here "
                    f"{short(values.get(name))}; {remedy}"
                )


def metadata_of(
    config: RunConfig, step: int, identity: Mapping[str, Mapping[str, Any]] | None = None, **more: Any
) -> dict[str, str]:
    """What makes a safetensors file of averaged weights a checkpoint; of a backbone, `more` is `spec` and `classes`."""
    values = {"config": config.to_dict(), "step": step, "identity": identity or {}, **more}
    values |= {"imports": contents_of(getattr(config, "imports", ()))}
    encoded = {name: json.dumps(value, default=asdict) for name, value in values.items()}
    return {**encoded, "commit": current_commit()}


def warm_start(
    model: nn.Module,
    path: str,
    classes: Sequence[str] = (),
    codec: Codec | None = None,
    accelerator: Accelerator | None = None,
    *,
    diffusion: DiffusionConfig | None = None,
    whole: bool = False,
) -> str:
    """Copy averaged weights by name and shape and, of tables of labels, the rows of `classes` by name; says what was
    not taken, and where they are of another `codec`'s latents or put out what means something else under `diffusion`.
    What a `whole` model lacks is a CheckpointError, but for labels."""
    file, state = find_weights(path, accelerator), model.state_dict()
    weights, metadata = read_tensors(file), read_metadata(file)
    known = json.loads(metadata.get("classes", "[]"))
    are_others = bool(classes and known) and list(classes) != known
    for name in (name for name in weights if are_others and name.endswith(LABELS) and name in state):
        if (len(state[name]), len(weights[name])) == (len(classes) + 1, len(known) + 1):
            weights[name] = relabelled(state[name].cpu(), list(classes), weights[name], known)
    shapes = {name: tensor.shape for name, tensor in state.items()}
    fitting = {name: tensor for name, tensor in weights.items() if shapes.get(name) == tensor.shape}
    if not fitting:
        raise CheckpointError(f"--init_from {path}: no weight of it has the name and shape of one of this model")
    if whole and (lacking := sorted(name for name in shapes.keys() - fitting.keys() if not name.endswith(LABELS))):
        raise CheckpointError(
            f"--train.adapter: --init_from {path} has no {abridged(lacking)} of this shape, which would stay random; "
            "take the --model and --model_args that it was trained with, or leave the adapter out"
        )
    model.load_state_dict(fitting, strict=False)
    left_out = {
        "of another shape": weights.keys() & shapes.keys() - fitting.keys(),
        "not in this model": weights.keys() - shapes.keys(),
        "not in the checkpoint": shapes.keys() - weights.keys(),
    }
    reasons = "; ".join(f"{reason}: {abridged(sorted(names))}" for reason, names in left_out.items() if names)
    told = f"took {len(fitting)} of {len(weights)} tensors{f' ({reasons})' if reasons else ''}"
    told += f"; {len({*classes} & {*known})} of {len(classes)} classes are its own" if are_others else ""
    if codec and "config" in metadata:
        try:
            check_identity(file, {"codec": codec.provenance}, any_decoder=True)
        except CheckpointError as error:
            told += f"; warning: {error}"
    if diffusion and (others := other_meaning(diffusion, metadata)):
        told += f"; its output had another meaning, which has to be learned anew: {', '.join(others)}"
    return f"--init_from {path}: {told}"


def other_meaning(diffusion: DiffusionConfig, metadata: Mapping[str, str]) -> list[str]:
    """In which settings of its diffusion a checkpoint's output means something else."""
    before: dict[str, Any] = {}
    with suppress(ValueError, TypeError, KeyError, AttributeError):  # of an autoencoder, or of settings that went
        before = meaning_of(from_dict(DiffusionConfig, json.loads(metadata["config"])["diffusion"]))
    now = meaning_of(diffusion)
    if before and before["kind"] != now["kind"]:
        return [f"--diffusion.kind {before['kind']}"]
    return [f"--diffusion.{name} {before[name]}" for name in now if name in before and before[name] != now[name]]


def relabelled(
    table: Float[Tensor, "n d"], classes: list[str], known_table: Float[Tensor, "m d"], known: list[str]
) -> Float[Tensor, "n d"]:
    """A table of labels with the known rows of classes of the same name, and of the null label, which is the last."""
    shared = [name for name in classes if name in known]
    rows, known_rows = ([*map(names.index, shared), len(names)] for names in (classes, known))
    return table.index_copy(0, torch.tensor(rows), known_table[known_rows].to(table.dtype))  # of files in half too


def open_checkpoint(path: str | Path, accelerator: Accelerator | None = None) -> Checkpoint:
    """From a run's folder (its newest), a checkpoint's folder, the weights file, hf://owner/name, or by the name
    `embedded`; a CheckpointError says why there is none. For an accelerator see `find_weights`."""
    weights = find_weights(path, accelerator)
    metadata = read_metadata(weights)
    missing = {"config", "spec", "classes", "step", "commit"} - metadata.keys()
    if missing:
        raise CheckpointError(f"--checkpoint {weights}: not written by train.py, it lacks {sorted(missing)}")
    imports, contents = [], {}
    with suppress(ValueError, TypeError, KeyError, AttributeError):  # which reading all of it will tell
        imports = [str(name) for name in json.loads(metadata["config"])["imports"]]
        contents = dict(json.loads(metadata.get("imports", "{}")))
    load_imports(imports, stored_in=weights, contents=contents)  # first: what they register has settings
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
        )
        if checkpoint.classes != classes or len(classes) != checkpoint.spec.num_classes:
            raise ValueError(f"{checkpoint.spec.num_classes} classes, named {short(classes)}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"--checkpoint {weights}: its metadata are malformed, or of an earlier commit ({error})"
        ) from error
    return checkpoint


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """A safetensors file whose metadata carry checksums of themselves and of the tensors, wherever it goes."""
    sealed = {**metadata, "weights_sha256": weights_sha256(tensors)}
    try:
        save_file(dict(tensors), path, metadata={**sealed, "metadata_sha256": _sha256(sealed)})
    except SafetensorError as error:  # of the disk
        raise OSError(f"{path} could not be written ({error}); see to the disk") from error


def read_metadata(path: Path) -> dict[str, str]:
    """Of a safetensors file, and nothing else of it; a CheckpointError where it is missing, cut short or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"--checkpoint {path}: cut short or not a safetensors file ({error})") from error
    if metadata.get("metadata_sha256", _sha256(metadata)) != _sha256(metadata):
        raise CheckpointError(f"--checkpoint {path}: its metadata have another checksum; give another copy of it")
    return metadata


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Of a safetensors file; a CheckpointError where it is missing, cut short or damaged."""
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
    """Copy weights into the tensors of a model or an average, or into parts of them; they must fit exactly."""
    ours, theirs = ({name: tuple(tensor.shape) for name, tensor in part.items()} for part in (tensors, weights))
    if wrong := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
        raise CheckpointError(
            f"{path} is of another model: {len(wrong)} tensors do not fit, such as {', '.join(wrong[:3])}"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(part_like(weights[name], tensor))


def current_commit() -> str:
    """Commit of the code, with '+' where the tree was changed; empty outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=+"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def find_weights(path: str | Path, accelerator: Accelerator | None = None) -> Path:
    """The file; with an accelerator its main process says which is the newest, as a training may write another one
    meanwhile."""
    if accelerator and not is_name(path):
        return from_main(accelerator, partial(find_weights, path))
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
        f"--checkpoint {path} {reason}; give a run's folder, a checkpoint, {WEIGHTS}, hf://owner/name or {EMBEDDED}"
    )
