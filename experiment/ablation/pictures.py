"""Samples of all variants from the same noise: a grid a model, and classes as rows beside models as columns."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from experiment.ablation.results import Results
from experiment.ablation.stages import pictured

Pixels = UInt8[np.ndarray, "h w 3"]
FONT = ImageFont.load_default(size=22)
GAP = 2
BESIDE = 4  # samples a class and model, beside the other models'


@dataclass(frozen=True)
class Pictures:
    """Of one variant: `images[class][number]`."""

    variant: str
    classes: list[str]
    images: UInt8[np.ndarray, "classes n h w 3"]


def read_pictures(results: Results) -> list[Pictures]:
    """Of the first seed of each variant that has been drawn."""
    found = []
    for variant in results.variants:
        path = variant.runs[0].folder / "pictures.npz"
        if path.is_file():
            with np.load(path) as file:
                images = file["arr_0"]
            classes = pictured(results.plan["ablation"]["pictures"]["classes"], variant.runs[0].plan["classes"]) or [""]
            found.append(Pictures(variant.name, classes, rearrange(images, "(k n) h w c -> k n h w c", k=len(classes))))
    return found


def beside(pictures: list[Pictures]) -> list[tuple[str, list[UInt8[np.ndarray, "n h w 3"]]]]:
    """For each class, its first samples by each model."""
    return [(name, [one.images[k, :BESIDE] for one in pictures]) for k, name in enumerate(pictures[0].classes)]


def tile(images: UInt8[np.ndarray, "n h w c"], columns: int) -> UInt8[np.ndarray, "height width c"]:
    """Side by side, row by row; what is in between is white, and transparent where there is a fourth channel."""
    n, h, w, channels = images.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    canvas = np.full(
        (rows * (h + GAP) - GAP, columns * (w + GAP) - GAP, channels), [255, 255, 255, 0][:channels], np.uint8
    )
    for number, image in enumerate(images):
        top, left = number // columns * (h + GAP), number % columns * (w + GAP)
        canvas[top : top + h, left : left + w] = image
    return canvas


def save_beside(pictures: list[Pictures], path: Path) -> None:
    """A PNG for a paper: classes as rows, models as columns; models as rows where a name is wider than its column."""
    models = [one.variant for one in pictures]
    blocks = [(name, [tile(images, 2) for images in each]) for name, each in beside(pictures)]
    if max(map(_width, models)) > 2 * blocks[0][1][0].shape[1]:
        classes = [_title(name) for name, _ in blocks]
        blocks = [(model, [of_class[number] for _, of_class in blocks]) for number, model in enumerate(models)]
        models = classes if any(classes) else []
    save_labelled(blocks, models, path)


def save_labelled(rows: list[tuple[str, list[Pixels]]], columns: list[str], path: Path, scale: int = 2) -> None:
    """A PNG for a paper: names of rows at the left, of columns above."""
    left = int(max([_width(name) for name, _ in rows], default=0)) + 20 if any(n for n, _ in rows) else 4
    top = 36 if columns else 4
    height, width = (scale * side for side in rows[0][1][0].shape[:2])
    step_x, step_y = width + 12, height + (12 if columns else 2 * GAP)
    canvas = Image.new("RGB", (left + step_x * len(rows[0][1]), top + step_y * len(rows)), "white")
    draw = ImageDraw.Draw(canvas)
    for column, name in enumerate(columns):
        draw.text((left + column * step_x + width / 2, top / 2), name, "black", FONT, anchor="mm")
    for row, (name, blocks) in enumerate(rows):
        y = top + row * step_y
        draw.text((left - 12, y + height / 2), _title(name), "black", FONT, anchor="rm")
        for column, block in enumerate(blocks):
            image = Image.fromarray(block).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(image, (left + column * step_x, y))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, optimize=True)


def _title(name: str) -> str:
    return name.replace("_", " ")


def _width(name: str) -> float:
    return FONT.getlength(_title(name))


def data_uri(images: UInt8[np.ndarray, "n h w 3"], columns: int) -> str:
    """A PNG in the page itself, with nothing between the tiles, whatever ground the page has."""
    opaque = np.full((*images.shape[:3], 1), 255, np.uint8)
    pixels = tile(np.concatenate([images, opaque], axis=-1), columns)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
