"""Reading the weights in files of other training scripts: a state dict, or a training checkpoint with averages."""

import argparse
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}
AVERAGE = re.compile(r"ema|averag|shadow", re.IGNORECASE)
NOT_BACKBONE = re.compile(r"opt|sched|scaler|disc", re.IGNORECASE)
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
OUTER = {"model", "net", "network", "denoiser", "ema_model", "model_ema", "ema"}


def read_weights(path: Path) -> tuple[dict[str, Any], int]:
    """Read the weights of a published file, averaged where it has averages, and the training step. Raises ValueError
    where the file has no weights, or would have to be unpickled into more than plain data."""
    if not path.is_file():
        raise ValueError(f"--weights {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            saved = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace, *numpy_scalars()]):  # types of saved arguments
                saved = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"--weights {path}: not plain weights, and nothing else is unpickled ({reason})") from None
    except (RuntimeError, EOFError, SafetensorError) as error:
        raise ValueError(f"--weights {path}: cut short, or not a file of torch ({error})") from None
    step = int(saved.get("train_steps", 0)) if isinstance(saved, dict) else 0
    averaged, trained = split_checkpoint(saved)
    # The XSwin authors do not average batch-norm statistics: their average has the initial ones, so take the trained.
    statistics = {name: value for name, value in trained.items() if name.rsplit(".", 1)[-1] in STATISTICS}
    weights = averaged | statistics if averaged else trained
    if not weights:
        raise ValueError(f"--weights {path}: no tensors in it, neither at the top nor in a part, such as ema or model")
    return weights, step


def split_checkpoint(saved: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """Find averaged and trained weights in a checkpoint; the average is a nested dictionary, or a prefix of names."""
    if not isinstance(saved, dict):
        return {}, {}
    parts: dict[str, dict[str, Any]] = {"": strip_wrappers(saved)}
    for name, part in saved.items():
        if isinstance(part, dict) and not NOT_BACKBONE.search(str(name)):
            inner_parts = (strip_wrappers(inner) for inner in part.values())
            parts[str(name)] = strip_wrappers(part) or next(filter(None, inner_parts), {})
    averaged: dict[str, Any] = {}
    trained: dict[str, Any] = {}
    for name, tensors in parts.items():
        average = {key: value for key, value in tensors.items() if AVERAGE.search(name) or AVERAGE.match(key)}
        averaged = averaged or strip_common_prefix(average)
        trained = trained or strip_common_prefix({key: value for key, value in tensors.items() if key not in average})
    return averaged, trained


def strip_wrappers(weights: object) -> dict[str, Any]:
    """Keep the tensors, in float32, and remove what DistributedDataParallel, FSDP and torch.compile add to names."""
    tensors = {}
    for name, tensor in weights.items() if isinstance(weights, dict) else ():
        if isinstance(tensor, torch.Tensor) and tensor.dim() + ("num_batches" in str(name)):
            unwrapped = ".".join(part for part in str(name).split(".") if part not in WRAPPERS)
            tensors[unwrapped] = tensor.float() if tensor.is_floating_point() else tensor
    return tensors


def strip_common_prefix(tensors: dict[str, Any]) -> dict[str, Any]:
    """Remove a prefix that all names share, and REPA's projectors, which are only needed in training."""
    outer = {name.partition(".")[0] for name in tensors}
    if len(outer) == 1 and outer <= OUTER:
        return strip_common_prefix({name.partition(".")[2]: tensor for name, tensor in tensors.items()})
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("projectors.")}


def numpy_scalars() -> list[Any]:
    """List the types that unpickling a NumPy scalar needs; all are NumPy's own."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = {type(np.dtype(kind)) for kind in "?bhilefdBHIL"}
    return [(scalar, "numpy.core.multiarray.scalar"), scalar, np.dtype, *kinds]
