"""Save images in folders or in ADM's npz format, batch by batch. A failed save leaves no file."""

import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from machine.atomic_files import atomic_path, check_empty, join_inside
from metrics.npz import WEIGHTS_HASH


def save_folder(batches: Iterable[UInt8[Tensor, "b 3 h w"]], class_names: list[str], folder: Path) -> None:
    """Save images as `class/000123.png` in a new folder, numbered by index. `class_names` holds each image's class."""
    check_empty(folder, "--output")
    with atomic_path(folder, keep=True) as partial:  # another program may have written there meanwhile
        paths = [
            join_inside(partial, f"./{name}/{index:06d}.png", "--output") for index, name in enumerate(class_names)
        ]
        name_of = {path.parent: name for path, name in zip(paths, class_names, strict=True)}
        for path, name in zip(paths, class_names, strict=True):
            other = name_of[path.parent]
            if other != name or any(part.startswith(".") for part in path.parent.relative_to(partial).parts):
                problem = "is hidden" if other == name else f"is that of {other!r} too"
                raise ValueError(f"--output {folder}: the folder of the class {name!r} {problem}; give FILE.npz")
        for path, image in zip(paths, (image for images in batches for image in images), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


def save_npz(
    batches: Iterable[UInt8[Tensor, "b 3 h w"]],
    labels: Tensor,
    classes: list[str],
    path: Path,
    weights: str | None = None,
) -> None:
    """Save ADM's `arr_0` [n h w 3]; with classes `arr_1` [n], which are labels, and `classes`, their names; and
    `weights_sha256`, the hash of the `weights` that generated the images. These are written batch by batch, as they may
    exceed the memory. Other samples of that name are kept."""
    others = {"arr_1": labels.numpy(), "classes": np.array(classes)} if classes else {}
    others |= {WEIGHTS_HASH: np.array(weights)} if weights else {}
    with atomic_path(path, keep=True) as partial, zipfile.ZipFile(partial, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            for index, images in enumerate(batches):
                pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
                if index == 0:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *pixels.shape[1:])}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(pixels.data)
        for name, array in others.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array)
