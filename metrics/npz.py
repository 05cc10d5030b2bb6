"""Images and labels in npz files, in ADM's format (Dhariwal and Nichol 2021): `arr_0` [n h w 3], `arr_1` [n], and as
sample.py adds them, the names of the `classes` and the hash of the weights."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

Arrays = Mapping[str, np.ndarray]
WEIGHTS_HASH = "weights_sha256"  # array with the hash of the weights that generated the images


def read_arrays(path: Path, flag: str) -> dict[str, np.ndarray]:
    """Read all arrays of a file. Errors are sentences that begin with `flag`, here and below."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # on damaged files, numpy and zipfile raise errors of any type
        raise ValueError(f"{flag}: not a whole npz file ({error})") from error


def images_in(arrays: Arrays, flag: str) -> UInt8[Tensor, "n 3 h w"]:
    array = arrays.get("arr_0", np.zeros(0))
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
        raise ValueError(f"{flag}: arr_0 is {array.dtype} {list(array.shape)}, not uint8 [n h w 3]")
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()


def weights_in(arrays: Arrays) -> dict[str, str]:
    """The hash of the weights that generated the images, as an entry of a record; empty if the file has none."""
    return {WEIGHTS_HASH: str(arrays[WEIGHTS_HASH])} if WEIGHTS_HASH in arrays else {}


def labels_in(arrays: Arrays, flag: str) -> tuple[Int64[Tensor, " n"], list[str]]:
    """Return the label of each image, and the names of the classes, if the file has them."""
    labels, names = arrays.get("arr_1", np.zeros(0)), arrays.get("classes", np.zeros(0))
    if names.ndim != 1:
        raise ValueError(f"{flag}: classes is {names.dtype} {list(names.shape)}, not a list of names")
    classes = [str(name) for name in names]
    is_valid = labels.dtype.kind in "iu" and labels.shape == arrays["arr_0"].shape[:1]
    if not is_valid or (labels < 0).any() or (classes and (labels >= len(classes)).any()):
        among = f"among its {len(classes)} classes" if classes else "from 0 on"
        raise ValueError(f"{flag}: arr_1 holds no label of each image {among}")
    return torch.from_numpy(labels.astype(np.int64)), classes
