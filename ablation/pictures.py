"""Samples of all variants from the same noise: a grid a model, and classes as rows beside models as columns."""

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
from ablation.study import pictured
from sampling.image_files import save_labelled, tile, title, width_of

BESIDE = 4  # samples a class and model, beside the other models'


@dataclass(frozen=True)
class Pictures:
    """Pictures that one variant has drawn: `images[class][number]`."""

    variant: str
    classes: list[str]
    images: UInt8[np.ndarray, "classes n h w 3"]


def read_pictures(results: Results) -> list[Pictures]:
    """Of the first seed of each variant that has been drawn, as the plan has it: others would pass for its classes."""
    pictures = []
    for variant in results.variants:
        folder, key = Path(variant.plan["folder"]), variant.plan["keys"].get("draw")
        if key is not None and done_stages(folder).get("draw") == key:
            with np.load(folder / "pictures.npz") as file:
                images = file["arr_0"]
            classes = pictured(results.plan["ablation"]["pictures"]["classes"], variant.plan["classes"]) or [""]
            by_class = rearrange(images, "(k n) h w c -> k n h w c", k=len(classes))
            pictures.append(Pictures(variant.name, classes, by_class))
    return pictures


def beside(pictures: list[Pictures]) -> list[tuple[str, list[UInt8[np.ndarray, "n h w 3"]]]]:
    """For each class that all models have drawn, its first samples by each."""
    shared = [name for name in pictures[0].classes if all(name in one.classes for one in pictures)] if pictures else []
    return [(name, [one.images[one.classes.index(name), :BESIDE] for one in pictures]) for name in shared]


def save_beside(pictures: list[Pictures], path: Path) -> None:
    """A PNG for a paper: classes as rows, models as columns; models as rows where a name is wider than its column."""
    models = [one.variant for one in pictures]
    blocks = [(name, [tile(images, 2) for images in of_models]) for name, of_models in beside(pictures)]
    if max(map(width_of, models)) > 2 * blocks[0][1][0].shape[1]:
        classes = [title(name) for name, _ in blocks]
        blocks = [(model, [of_class[number] for _, of_class in blocks]) for number, model in enumerate(models)]
        models = classes if any(classes) else []
    save_labelled(blocks, models, path)


def data_uri(images: UInt8[np.ndarray, "n h w 3"], columns: int) -> str:
    """A PNG in the page itself, with nothing between the tiles, whatever ground the page has."""
    opaque = np.full((*images.shape[:3], 1), 255, np.uint8)
    pixels = tile(np.concatenate([images, opaque], axis=-1), columns)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
