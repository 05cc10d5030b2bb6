"""Images: folders and zips, procedural shapes, and the cache of what a codec makes of them."""

from __future__ import annotations


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
    words = [f"{about['source']} ({train.note}): {of} of {classes}"]
    for why in {**train.left_out, **held_out.left_out}:
        names = sorted({*train.left_out.get(why, ()), *held_out.left_out.get(why, ())})
        words += [f"left out {len(names)} {why} ({_abridged(names)})"] if names else []
    if enlarged := train.num_enlarged():
        words.append(f"{enlarged} of the training images are smaller than {about['image_size'][0]} and enlarged")
    return "; ".join(words)


def _abridged(names: list[str], at_most: int = 5) -> str:
    return ", ".join(names[:at_most]) + ", ..." * (len(names) > at_most)
