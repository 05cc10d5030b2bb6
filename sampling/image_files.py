"""Images to files: labelled grids, folders, ADM's npz; each whole or not there."""

import zipfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from machine.whole_files import check_empty, inside, whole

SMALL, LARGE = ImageFont.load_default(size=9), ImageFont.load_default(size=22)
GAP = 2  # pixels between images
DRAWN_BY = "weights_sha256"  # of a PNG's texts
Names = list[str] | None


def save_grid(
    images: UInt8[Tensor, "n 3 h w"], path: Path, *, columns: int, weights: str | None = None, **names: Names
) -> None:
    """A grid (see `draw_grid`) as PNG, which says the hash of the `weights` that drew it, or PDF."""
    about = PngInfo()
    if weights is not None:
        about.add_text(DRAWN_BY, weights)
    how: dict[str, Any] = {"quality": 95, "subsampling": 0, "pnginfo": about}  # a PDF holds a JPEG
    with whole(path) as partial:
        draw_grid(images, columns, **names).save(partial, **how)


def drawn_by(path: Path) -> str | None:
    """The hash of the weights that drew a grid, where it says so."""
    with suppress(OSError), Image.open(path, formats=("PNG",)) as image:
        return image.info.get(DRAWN_BY)
    return None


def draw_grid(
    images: UInt8[Tensor, "n 3 h w"], columns: int, *, column_names: Names = None, captions: Names = None
) -> Image.Image:
    """Images row by row, with a name above each column or a caption under each image."""
    height, width = images.shape[-2:]
    scale = max(1, 64 // width)
    height, width = height * scale, width * scale
    columns = min(columns, len(images))
    head, foot = 14 if column_names else 0, 12 if captions else 0
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + foot + GAP) + head + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for column, name in enumerate(column_names or []):
        draw.text((column * (width + GAP) + 4, 2), name, fill="black", font=SMALL)
    for number, image in enumerate(images):
        left = GAP + number % columns * (width + GAP)
        top = GAP + head + number // columns * (height + foot + GAP)
        canvas.paste(_picture(image).resize((width, height), Image.Resampling.NEAREST), (left, top))
        if captions:
            draw.text((left, top + height), _fit(captions[number], width), fill="black", font=SMALL)
    return canvas


def tile(images: UInt8[np.ndarray, "n h w c"], columns: int) -> UInt8[np.ndarray, "height width c"]:
    """Side by side, row by row; what is in between is white, and transparent where there is a fourth channel."""
    n, h, w, channels = images.shape
    columns = min(columns, n)
    tiles = np.full((-(-n // columns) * columns, h + GAP, w + GAP, channels), [255, 255, 255, 0][:channels], np.uint8)
    tiles[:n, :h, :w] = images
    return rearrange(tiles, "(rows columns) h w c -> (rows h) (columns w) c", columns=columns)[:-GAP, :-GAP]


def save_labelled(
    rows: list[tuple[str, list[UInt8[np.ndarray, "h w 3"]]]], columns: list[str], path: Path, scale: int = 2
) -> None:
    """A PNG for a paper: names of rows at the left, of columns above."""
    left = int(max(width_of(name) for name, _ in rows)) + 20 if any(name for name, _ in rows) else 4
    top = 36 if columns else 4
    height, width = (scale * side for side in rows[0][1][0].shape[:2])
    step_x, step_y = width + 12, height + (12 if columns else 2 * GAP)
    canvas = Image.new("RGB", (left + step_x * len(rows[0][1]), top + step_y * len(rows)), "white")
    draw = ImageDraw.Draw(canvas)
    for column, name in enumerate(columns):
        draw.text((left + column * step_x + width / 2, top / 2), name, "black", LARGE, anchor="mm")
    for row, (name, blocks) in enumerate(rows):
        y = top + row * step_y
        draw.text((left - 12, y + height / 2), title(name), "black", LARGE, anchor="rm")
        for column, block in enumerate(blocks):
            image = Image.fromarray(block).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(image, (left + column * step_x, y))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def title(name: str) -> str:
    return name.replace("_", " ")


def width_of(name: str) -> float:
    return LARGE.getlength(title(name))


def save_folder(batches: Iterable[UInt8[Tensor, "b 3 h w"]], class_names: list[str], folder: Path) -> None:
    """`class/000123.png`, numbered by the image's index; two draws are never mixed in a folder."""
    check_empty(folder, "--output")
    with whole(folder) as partial:
        paths = [inside(partial, f"./{name}/{number:06d}.png", "--output") for number, name in enumerate(class_names)]
        names = {path.parent: name for path, name in zip(paths, class_names, strict=True)}
        for path, name in zip(paths, class_names, strict=True):
            if names[path.parent] != name or any(part[0] == "." for part in path.parent.relative_to(partial).parts):
                why = "is hidden" if names[path.parent] == name else f"is that of {names[path.parent]!r} too"
                raise ValueError(f"--output {folder}: the folder of the class {name!r} {why}; give FILE.npz")
        for path, image in zip(paths, (image for images in batches for image in images), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            _picture(image).save(path)


def save_npz(batches: Iterable[UInt8[Tensor, "b 3 h w"]], labels: Tensor, classes: list[str], path: Path) -> None:
    """`arr_0` [n h w 3] and `arr_1` [n] as ADM has them, and `classes` that labels number; memory holds a batch."""
    with whole(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            for number, images in enumerate(batches):
                pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
                if number == 0:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *pixels.shape[1:])}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(pixels.data)
        for name, array in {"arr_1": labels.numpy(), "classes": np.array(classes)}.items():
            if classes:  # else the labels are of none
                with archive.open(f"{name}.npy", "w") as file:
                    np.lib.format.write_array(file, array)


def _picture(image: UInt8[Tensor, "3 h w"]) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def _fit(text: str, width: int) -> str:
    while SMALL.getlength(text) > width:
        text = text[:-1]
    return text
