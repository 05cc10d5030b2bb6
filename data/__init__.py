"""Images: folders and zips, procedural shapes, and the cache of what a codec makes of them."""

from collections.abc import Callable
from inspect import signature
from itertools import chain
from typing import Any

from data.image_set import ImageSet
from data.images import ImageDataset, abridged
from data.layout import DataError
from data.shapes import ShapesDataset

DATASETS: dict[str, Callable[..., ImageSet]] = {"shapes": ShapesDataset}  # by name; any other path is of image files


def open_dataset(path: str, **settings: Any) -> ImageSet:
    """A split of the images at a path, or of a dataset in `DATASETS`, which is told those settings that it takes."""
    if path not in DATASETS:
        files = {name: value for name, value in settings.items() if name not in ("num_images", "difficulty")}
        return ImageDataset(path, **files)
    taken = signature(DATASETS[path]).parameters
    for name in ("classes", "exclude_classes"):
        if settings.get(name) and name not in taken:
            raise DataError(f"--data.{name} {settings[name]}: {path} keeps all of its classes; leave it out, or '[]'")
    return DATASETS[path](**{name: value for name, value in settings.items() if name in taken})


def intake(train, held_out) -> str:
    """What was understood, in words: images, split, classes, what was left out and what is enlarged."""
    of = f"{len(train)} training and {len(held_out)} held-out images"
    classes = f"{len(train.classes)} classes ({abridged(train.classes)})" if train.classes else "no classes"
    about = train.describe()
    words = [f"{about['source']} ({train.note}): {of} of {classes}", *left_out(train, held_out)]
    if enlarged := train.num_enlarged():
        words.append(f"{enlarged} of the training images are smaller than {about['image_size'][0]} and enlarged")
    return "; ".join(words)


def left_out(*splits) -> list[str]:
    """What of the images is in none of these, for each reason."""
    reasons = {
        why: sorted({*chain.from_iterable(split.left_out.get(why, ()) for split in splits)})
        for why in chain.from_iterable(split.left_out for split in splits)
    }
    return [f"left out {len(names)} {why} ({abridged(names)})" for why, names in reasons.items() if names]
