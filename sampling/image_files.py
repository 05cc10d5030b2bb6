"""Images to files: labelled grids, folders, ADM's npz; each whole or not there."""

import zipfile
from collections.abc import Iterable
from pathlib import Path

from jaxtyping import UInt8
from torch import Tensor

from machine.whole_files import inside, whole


def save_grid(
    images: UInt8[Tensor, "n 3 h w"],
    path: Path,
    *,
    columns: int,
    column_names: list[str] | None = None,
    captions: list[str] | None = None,
) -> None:
    """A grid as PNG or PDF, row by row, with a name above each column or a caption under each image."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = images.shape[-2:]
    scale = max(1, 64 // width)
    height, width = height * scale, width * scale
    columns = min(columns, len(images))
    font = ImageFont.load_default(size=9)
    head = 14 if column_names else 0
    foot = 12 if captions else 0
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (columns * (width + 2) + 2, rows * (height + foot + 2) + head + 2), "white")
    draw = ImageDraw.Draw(canvas)
    for column, name in enumerate(column_names or []):
        draw.text((column * (width + 2) + 4, 2), name, fill="black", font=font)
    for number, image in enumerate(images):
        left = 2 + number % columns * (width + 2)
        top = 2 + head + number // columns * (height + foot + 2)
        tile = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.NEAREST)
        canvas.paste(tile, (left, top))
        if captions:
            draw.text((left, top + height), _fit(captions[number], width, font), fill="black", font=font)
    kind = Image.registered_extensions().get(path.suffix.lower())
    with whole(path) as partial:
        canvas.save(partial, format=kind, quality=95, subsampling=0)  # a PDF holds a JPEG


def save_folder(batches: Iterable[UInt8[Tensor, "b 3 h w"]], class_names: list[str], folder: Path) -> None:
    """`class/000123.png`, numbered by the image's index; whole or not there.

    Raises:
        FileExistsError: when the folder holds files already, so that two draws are never mixed.
        ValueError: for the name of a class that leads out of the folder.
    """
    from PIL import Image

    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"--output {folder} is not empty; give another folder or delete it")
    with whole(folder) as partial:
        paths = [inside(partial, f"./{name}/{number:06d}.png", "--output") for number, name in enumerate(class_names)]
        for path, image in zip(paths, (image for images in batches for image in images), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


def save_npz(batches: Iterable[UInt8[Tensor, "b 3 h w"]], labels: Tensor, classes: list[str], path: Path) -> None:
    """`arr_0` [n h w 3] and `arr_1` [n], as ADM's evaluation reads them (Dhariwal and Nichol 2021), and the names of
    the `classes` that the labels number; whole or not there. What comes is written at once: memory holds a batch."""
    import numpy as np

    with whole(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            for number, images in enumerate(batches):
                pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
                if number == 0:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *pixels.shape[1:])}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(pixels.data)
        for name, array in {"arr_1": labels.numpy(), "classes": np.array(classes)}.items():
            if array.size:
                with archive.open(f"{name}.npy", "w") as file:
                    np.lib.format.write_array(file, array)


def _fit(text: str, width: int, font) -> str:
    while font.getlength(text) > width:
        text = text[:-1]
    return text
