"""Data sets: image files, procedural shapes, and the cache of their encoded images."""

from collections.abc import Callable
from functools import partial
from inspect import signature
from itertools import chain
from typing import Any

from data.image_set import ImageSet
from data.images import ImageDataset
from data.layout import DataError, join_abridged
from data.shapes import ShapesDataset

DATASETS: dict[str, Callable[..., ImageSet]] = {"shapes": ShapesDataset}  # other names are paths of image files


def open_dataset(path: str, **settings: Any) -> ImageSet:
    """Open a data set of `DATASETS` by name, or image files by path. `settings` are those of the section `data`; each
    data set receives the ones that it has parameters for."""
    dataset = DATASETS.get(path) or partial(ImageDataset, path)
    parameters = signature(dataset).parameters
    for name in ("classes", "exclude_classes", "label_column"):
        if settings.get(name) and name not in parameters:
            raise DataError(f"--data.{name} {settings[name]}: {path} keeps all of its classes; leave it out, or '[]'")
    if settings.get("train_fraction", 1) != 1 and "train_fraction" not in parameters:
        fraction = settings["train_fraction"]
        raise DataError(
            f"--data.train_fraction {fraction}: {path} is cut by its own settings, such as --data.num_images"
        )
    return dataset(**{name: value for name, value in settings.items() if name in parameters})


def summarize_splits(train, held_out) -> str:
    """Summarise the data in one line: images, split, classes, and how many are left out, enlarged or off-colour."""
    counts = f"{len(train)} training and {len(held_out)} held-out images"
    classes = f"{len(train.classes)} classes ({join_abridged(train.classes)})" if train.classes else "no classes"
    about = train.describe()
    source = f"{about['source']} ({train.note})" if train.note else about["source"]
    parts = [f"{source}: {counts} of {classes}", *summarize_left_out(train, held_out)]
    if num_enlarged := train.num_enlarged():
        parts.append(f"{num_enlarged} of the training images are smaller than {about['image_size'][0]} and enlarged")
    if num_other := train.num_other_colors():
        parts.append(f"{num_other} of the training images have a colour profile other than sRGB, which is not applied")
    return "; ".join(parts)


def summarize_left_out(*splits) -> list[str]:
    """Say which files the splits leave out, a sentence per reason."""
    by_reason = {
        reason: sorted({*chain.from_iterable(split.left_out.get(reason, ()) for split in splits)})
        for reason in chain.from_iterable(split.left_out for split in splits)
    }
    return [f"left out {len(names)} {reason} ({join_abridged(names)})" for reason, names in by_reason.items() if names]
