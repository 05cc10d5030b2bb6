"""Grids of images, with names or captions, as pictures."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngImageFile, PngInfo
from torch import Tensor

from machine.atomic_files import atomic_path

SMALL, LARGE = ImageFont.load_default(size=9), ImageFont.load_default(size=22)
GAP, HEADER, CAPTION = 2, 14, 12  # pixels between images, above them for names, and below each for a caption
LARGEST_PDF = 65500  # pixels a side: a PDF holds its picture as JPEG
# Text chunks of a PNG: the hash of the weights that generated the images, and the settings as JSON.
DRAWN_BY, DRAWN_WITH = "weights_sha256", "sampling"
Names = list[str] | None


def save_grid(
    images: UInt8[Tensor, "n 3 h w"],
    path: Path,
    *,
    columns: int,
    weights: str | None = None,
    settings: Mapping[str, Any] | None = None,
    keep: bool = False,
    **names: Names,
) -> None:
    """Save a grid (see `draw_grid`) as PDF, or as PNG, which records the hash of the `weights` that generated it and
    the `settings` of their sampling. With `keep`, another file of that name is kept."""
    metadata = PngInfo()
    if weights is not None:
        metadata.add_text(DRAWN_BY, weights)
    if settings is not None:
        metadata.add_text(DRAWN_WITH, json.dumps(settings))
    options: dict[str, Any] = {"quality": 95, "subsampling": 0, "pnginfo": metadata}  # quality: of the JPEG in a PDF
    with atomic_path(path, keep=keep) as partial:
        draw_grid(images, columns, **names).save(partial, **options)


def read_weights_hash(path: Path) -> str | None:
    """Read the hash of the weights that generated a grid, if it is recorded."""
    return _read_text(path, DRAWN_BY)


def read_settings(path: Path) -> dict[str, Any]:
    """Read the settings of a grid's sampling; empty if they are not recorded."""
    with suppress(ValueError, TypeError):
        return dict(json.loads(_read_text(path, DRAWN_WITH) or "{}"))
    return {}


def _read_text(path: Path, name: str) -> str | None:
    with suppress(OSError, SyntaxError), PngImageFile(path) as image:  # `Image.open` refuses large pictures
        return image.info.get(name)
    return None


def grid_size(
    num: int, image_size: tuple[int, int], columns: int, *, column_names: Names = None, captions: Names = None
) -> tuple[int, int]:
    """Width and height of the grid that `draw_grid` draws of `num` images of a height and width."""
    height, width = (side * max(1, 64 // image_size[1]) for side in image_size)
    columns, step_y = min(columns, num), height + CAPTION * bool(captions) + GAP
    return columns * (width + GAP) + GAP, -(-num // columns) * step_y + HEADER * bool(column_names) + GAP


def check_size(path: Path, num: int, image_size: tuple[int, int], columns: int, **names: Names) -> None:
    """Raise ValueError, before the images are drawn, if their grid (see `grid_size`) is too large for a PDF."""
    width, height = grid_size(num, image_size, columns, **names)
    if path.suffix.lower() == ".pdf" and max(width, height) > LARGEST_PDF:
        raise ValueError(
            f"--output {path}: it would have {width}x{height} pixels, and a PDF at most {LARGEST_PDF:,} a side; give "
            "FILE.png, or fewer images"
        )


def draw_grid(
    images: UInt8[Tensor, "n 3 h w"], columns: int, *, column_names: Names = None, captions: Names = None
) -> Image.Image:
    """Draw images row by row, with a name above each column or a caption under each image."""
    height, width = (side * max(1, 64 // images.shape[-1]) for side in images.shape[-2:])
    header, step_x, step_y = HEADER * bool(column_names), width + GAP, height + CAPTION * bool(captions) + GAP
    names: dict[str, Names] = {"column_names": column_names, "captions": captions}
    canvas = Image.new("RGB", grid_size(len(images), (images.shape[-2], images.shape[-1]), columns, **names), "white")
    draw = ImageDraw.Draw(canvas)
    for column, name in enumerate(column_names or []):
        draw.text((column * step_x + 4, 2), name, fill="black", font=SMALL)
    for index, image in enumerate(images):
        left, top = GAP + index % columns * step_x, GAP + header + index // columns * step_y
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        canvas.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top))
        if captions:
            draw.text((left, top + height), _shorten(captions[index], width), fill="black", font=SMALL)
    return canvas


def tile_images(images: UInt8[np.ndarray, "n h w c"], columns: int) -> UInt8[np.ndarray, "height width c"]:
    """Tile images row by row, separated by white gaps, which are transparent if there is a fourth channel."""
    n, h, w, channels = images.shape
    columns = min(columns, n)
    tiles = np.full((-(-n // columns) * columns, h + GAP, w + GAP, channels), [255, 255, 255, 0][:channels], np.uint8)
    tiles[:n, :h, :w] = images
    return rearrange(tiles, "(rows columns) h w c -> (rows h) (columns w) c", columns=columns)[:-GAP, :-GAP]


def save_labelled(
    rows: list[tuple[str, list[UInt8[np.ndarray, "h w 3"]]]], columns: list[str], path: Path, scale: int = 2
) -> None:
    """Save a PNG for a paper, with the names of rows at the left and of columns above."""
    left = int(max(label_width(name) for name, _ in rows)) + 20 if any(name for name, _ in rows) else 4
    top = 36 if columns else 4
    height, width = (scale * side for side in rows[0][1][0].shape[:2])
    step_x, step_y = width + 12, height + (12 if columns else 2 * GAP)
    canvas = Image.new("RGB", (left + step_x * len(rows[0][1]), top + step_y * len(rows)), "white")
    draw = ImageDraw.Draw(canvas)
    for column, name in enumerate(columns):
        draw.text((left + column * step_x + width / 2, top / 2), name, "black", LARGE, anchor="mm")
    for row, (name, blocks) in enumerate(rows):
        y = top + row * step_y
        draw.text((left - 12, y + height / 2), display_name(name), "black", LARGE, anchor="rm")
        for column, block in enumerate(blocks):
            image = Image.fromarray(block).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(image, (left + column * step_x, y))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def display_name(name: str) -> str:
    return name.replace("_", " ")


def label_width(name: str) -> float:
    return LARGE.getlength(display_name(name))


def _shorten(text: str, width: int) -> str:
    while SMALL.getlength(text) > width:
        text = text[:-1]
    return text
