"""Samples of all variants from the same noise: one grid per model, and a grid of classes by models."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image

from ablation.identity import done_stages
from ablation.results import Results
from ablation.study import classes_to_draw
from sampling.grids import display_name, label_width, save_labelled, tile_images

NUM_SIDE_BY_SIDE = 4  # samples per class and model in the grid of classes by models


@dataclass(frozen=True)
class Pictures:
    """Samples of one variant: `images[class][number]`."""

    variant: str
    classes: list[str]
    images: UInt8[np.ndarray, "classes n h w 3"]


def read_pictures(results: Results) -> list[Pictures]:
    """Read the pictures of each variant's first seed, without those drawn by another plan."""
    pictures = []
    for variant in results.variants:
        folder, key = Path(variant.plan["folder"]), variant.plan["keys"].get("draw")
        if key is not None and done_stages(folder).get("draw") == key:
            with np.load(folder / "pictures.npz") as file:
                images = file["arr_0"]
            classes = classes_to_draw(results.plan["ablation"]["pictures"]["classes"], variant.plan["classes"]) or [""]
            by_class = rearrange(images, "(k n) h w c -> k n h w c", k=len(classes))
            pictures.append(Pictures(variant.name, classes, by_class))
    return pictures


def side_by_side(pictures: list[Pictures]) -> list[tuple[str, list[UInt8[np.ndarray, "n h w 3"]]]]:
    """For each class that all models share, return its name and the first samples by each model."""
    if not pictures:
        return []
    shared = [name for name in pictures[0].classes if all(name in model.classes for model in pictures)]
    return [
        (name, [model.images[model.classes.index(name), :NUM_SIDE_BY_SIDE] for model in pictures]) for name in shared
    ]


def save_side_by_side(pictures: list[Pictures], path: Path) -> None:
    """Write a PNG for a paper: classes are rows and models columns, or the reverse where a model's name is too wide."""
    models = [model.variant for model in pictures]
    blocks = [(name, [tile_images(images, 2) for images in by_model]) for name, by_model in side_by_side(pictures)]
    if max(map(label_width, models)) > 2 * blocks[0][1][0].shape[1]:
        classes = [display_name(name) for name, _ in blocks]
        blocks = [(model, [by_model[column] for _, by_model in blocks]) for column, model in enumerate(models)]
        models = classes if any(classes) else []
    save_labelled(blocks, models, path)


def data_uri(images: UInt8[np.ndarray, "n h w 3"], columns: int) -> str:
    """Tile images into a PNG that is embedded in the page; gaps between them are transparent."""
    alpha = np.full((*images.shape[:3], 1), 255, np.uint8)
    pixels = tile_images(np.concatenate([images, alpha], axis=-1), columns)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
