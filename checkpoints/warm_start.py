"""Starting a model from the weights of a checkpoint, as far as they fit it (`--init_from`)."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from autoencoders.codec import Codec
from checkpoints.checkpoint import LABELS, check_identity, find_weights, iterate_tensors, read_metadata, read_shapes
from data.layout import join_abridged
from experiment.build import defining_settings
from experiment.config import DiffusionConfig
from experiment.mappings import from_dict
from machine.checkpoint_folder import CheckpointError
from machine.sharded_building import weights_of
from machine.sharding import full_tensor, shard_like


def warm_start(
    model: nn.Module,
    path: str,
    classes: Sequence[str] = (),
    accelerator: Accelerator | None = None,
    *,
    whole: bool = False,
) -> str:
    """Initialise a model from the EMA weights of a checkpoint, and return a report of what was loaded.

    Weights are matched by name and shape, and rows of label embeddings by class name. Raises CheckpointError if none
    fits or, for a `whole` model, if one is missing, except for label embeddings.
    """
    file, state = find_weights(path, accelerator), weights_of(model)
    theirs, ours = read_shapes(file), {name: tensor.shape for name, tensor in state.items()}
    known = json.loads(read_metadata(file).get("classes", "[]"))
    classes_differ = bool(classes and known) and list(classes) != known
    rows = (len(classes) + 1, len(known) + 1) if classes_differ else None
    taken, by_class = match_weights(theirs, ours, rows)
    if not taken:
        raise CheckpointError(f"--init_from {path}: no weight of it has the name and shape of one of this model")
    if whole and (missing := sorted(name for name in ours.keys() - taken if not name.endswith(LABELS))):
        raise CheckpointError(
            f"--train.adapter: --init_from {path} has no {join_abridged(missing)} of this shape, which would stay "
            "random; take the --model and --model_args that it was trained with, or leave the adapter out"
        )
    for name, tensor in iterate_tensors(file):
        if name in by_class:
            tensor = map_label_rows(full_tensor(state[name]).cpu(), list(classes), tensor, known)
        if name in taken:
            state[name].copy_(shard_like(tensor, state[name]))
    left_out = {
        "of another shape": theirs.keys() & ours.keys() - taken,
        "not in this model": theirs.keys() - ours.keys(),
        "not in the checkpoint": ours.keys() - theirs.keys(),
    }
    reasons = "; ".join(f"{reason}: {join_abridged(sorted(names))}" for reason, names in left_out.items() if names)
    report = f"--init_from {path}: took {len(taken)} of {len(theirs)} tensors{f' ({reasons})' if reasons else ''}"
    kept = f"; {len({*classes} & {*known})} of {len(classes)} classes keep their label embeddings"
    return report + kept if classes_differ else report


def match_weights(
    theirs: Mapping[str, torch.Size], ours: Mapping[str, torch.Size], rows: tuple[int, int] | None
) -> tuple[set[str], set[str]]:
    """Match weights by name and shape, and label embeddings of other classes by name and their numbers of `rows`, ours
    and theirs. Return the names of all that match, and of the embeddings."""
    common = theirs.keys() & ours.keys()
    by_class = {name for name in common if name.endswith(LABELS) and (ours[name][0], theirs[name][0]) == rows}
    return by_class | {name for name in common if ours[name] == theirs[name]}, by_class


def map_label_rows(
    table: Float[Tensor, "n d"], classes: list[str], known_table: Float[Tensor, "m d"], known: list[str]
) -> Float[Tensor, "n d"]:
    """Copy rows of another label embedding for classes of the same name, and for the null label, the last row."""
    shared = [name for name in classes if name in known]
    rows, known_rows = ([*map(names.index, shared), len(names)] for names in (classes, known))
    return table.index_copy(0, torch.tensor(rows), known_table[known_rows].to(table.dtype))  # files may be in half


def changes_of_meaning(
    path: str, codec: Codec, diffusion: DiffusionConfig, accelerator: Accelerator | None = None
) -> list[str]:
    """Return warnings that the output of a checkpoint's model meant something else, as its latents were others than
    those of `codec`, or its settings others than those of `diffusion`."""
    file, warnings = find_weights(path, accelerator), list[str]()
    metadata = read_metadata(file)
    if "config" in metadata:
        try:
            check_identity(file, {"codec": codec.provenance}, any_decoder=True)
        except CheckpointError as error:
            warnings.append(f"warning: {error}")
    if settings := changed_meaning(diffusion, metadata):
        warnings.append(f"its output had another meaning, which has to be relearned: {', '.join(settings)}")
    return warnings


def changed_meaning(diffusion: DiffusionConfig, metadata: Mapping[str, str]) -> list[str]:
    """Return the checkpoint's settings of diffusion by which its output means something else than under `diffusion`."""
    before: dict[str, Any] = {}
    with suppress(ValueError, TypeError, KeyError, AttributeError):  # an autoencoder's, or with settings since removed
        before = defining_settings(from_dict(DiffusionConfig, json.loads(metadata["config"])["diffusion"]))
    now = defining_settings(diffusion)
    if before and before["kind"] != now["kind"]:
        return [f"--diffusion.kind {before['kind']}"]
    if before.get("guidance_max") is None:
        now.pop("guidance_max", None)  # at scale 1, where such a model begins, its output means the same as without
    return [f"--diffusion.{name} {before[name]}" for name in now if name in before and before[name] != now[name]]
