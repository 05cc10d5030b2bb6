"""Images in rows and columns that have names, for a paper."""

from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

Pixels = UInt8[np.ndarray, "h w 3"]


FONT = ImageFont.load_default(size=22)


GAP = 2


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


def save_labelled(rows: list[tuple[str, list[Pixels]]], columns: list[str], path: Path, scale: int = 2) -> None:
    """A PNG for a paper: names of rows at the left, of columns above."""
    left = int(max([width_of(name) for name, _ in rows], default=0)) + 20 if any(n for n, _ in rows) else 4
    top = 36 if columns else 4
    height, width = (scale * side for side in rows[0][1][0].shape[:2])
    step_x, step_y = width + 12, height + (12 if columns else 2 * GAP)
    canvas = Image.new("RGB", (left + step_x * len(rows[0][1]), top + step_y * len(rows)), "white")
    draw = ImageDraw.Draw(canvas)
    for column, name in enumerate(columns):
        draw.text((left + column * step_x + width / 2, top / 2), name, "black", FONT, anchor="mm")
    for row, (name, blocks) in enumerate(rows):
        y = top + row * step_y
        draw.text((left - 12, y + height / 2), title(name), "black", FONT, anchor="rm")
        for column, block in enumerate(blocks):
            image = Image.fromarray(block).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(image, (left + column * step_x, y))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def title(name: str) -> str:
    return name.replace("_", " ")


def width_of(name: str) -> float:
    return FONT.getlength(title(name))
