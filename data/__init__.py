"""Images: folders and zips, procedural shapes, and the cache of what a codec makes of them."""

from __future__ import annotations

from collections.abc import Sequence


def open_dataset(
    path: str,
    *,
    split: str,
    image_size: int,
    test_fraction: float = 0.2,
    split_seed: int = 0,
    exclude_classes: Sequence[str] = (),
    on_error: str = "stop",
    num_images: int = 5000,
    difficulty: str = "easy",
    min_size: int = 0,
    use_labels: bool = True,
):
    """The images at a path, or the procedural ones at 'shapes'; see `ImageDataset` and `ShapesDataset`."""
    if path == "shapes":
        from data.shapes import ShapesDataset

        return ShapesDataset(
            num_images, split=split, image_size=image_size, difficulty=difficulty, use_labels=use_labels
        )

    from data.images import ImageDataset

    return ImageDataset(
        path,
        split=split,
        image_size=image_size,
        test_fraction=test_fraction,
        split_seed=split_seed,
        exclude_classes=exclude_classes,
        on_error=on_error,
        min_size=min_size,
        use_labels=use_labels,
    )
