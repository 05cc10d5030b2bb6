"""Images: folders and zips, procedural shapes, and the cache of what a codec makes of them."""

from __future__ import annotations

from itertools import chain


def open_dataset(
    path: str,
    *,
    split: str,
    image_size: int,
    num_images: int = 5000,
    difficulty: str = "easy",
    use_labels: bool = True,
    **of_files,
):
    """The images at a path, or the procedural ones at 'shapes'; see `ImageDataset` and `ShapesDataset`."""
    if path == "shapes":
        from data.shapes import ShapesDataset

        return ShapesDataset(
            num_images, split=split, image_size=image_size, difficulty=difficulty, use_labels=use_labels
        )

    from data.images import ImageDataset

    return ImageDataset(path, split=split, image_size=image_size, use_labels=use_labels, **of_files)


def intake(train, held_out) -> str:
    """What was understood, in words: images, split, classes, what was left out and what is enlarged."""
    of = f"{len(train)} training and {len(held_out)} held-out images"
    classes = f"{len(train.classes)} classes ({_abridged(train.classes)})" if train.classes else "no classes"
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
    return [f"left out {len(names)} {why} ({_abridged(names)})" for why, names in reasons.items() if names]


def _abridged(names: list[str], at_most: int = 5) -> str:
    return ", ".join(names[:at_most]) + ", ..." * (len(names) > at_most)
