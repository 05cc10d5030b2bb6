"""Near-duplicates end on one side of a split; what looks different does not."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from data import summarize_splits
from data.duplicates import near_duplicates
from data.images import ImageDataset


def picture(seed):
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC)


def brighter(image):
    return Image.eval(image, lambda value: value // 2 + 100)


ALIKE = {
    "again.jpg": lambda image: image,
    "mirrored.jpg": ImageOps.mirror,
    "smaller.jpg": lambda image: image.resize((40, 40)),
    "brighter.jpg": brighter,
    "blurred.jpg": lambda image: image.filter(ImageFilter.GaussianBlur(1)),
}


def test_changed_images_are_found_and_others_not():
    images = {f"{number:02}.png": picture(number) for number in range(50)}
    images |= {f"x {name}": change(picture(7)) for name, change in ALIKE.items()}
    found = near_duplicates(list(images), images.__getitem__)
    assert found == dict.fromkeys(["07.png", *(f"x {name}" for name in ALIKE)], "07.png")


def on_white(seed):
    """Something small in the middle of nothing, as a catalogue has it."""
    canvas = Image.new("RGB", (64, 64), "white")
    canvas.paste(picture(seed).resize((24, 24)), (20, 20))
    return canvas


def test_even_ground_makes_nothing_alike():
    images = {f"{number:02}.png": on_white(number) for number in range(30)}
    images |= {"x mirrored.png": ImageOps.mirror(on_white(7)), "x smaller.png": on_white(7).resize((48, 48))}
    saved = io.BytesIO()
    on_white(7).save(saved, "JPEG", quality=85)
    images["x saved.jpg"] = Image.open(saved)
    images |= {f"y {grey}.png": Image.new("RGB", (64, 64), (grey, grey, grey)) for grey in (0, 100, 200, 205)}
    found = near_duplicates(list(images), images.__getitem__)
    groups = {
        "07.png": ["07.png", "x mirrored.png", "x smaller.png", "x saved.jpg"],
        "y 200.png": ["y 200.png", "y 205.png"],
    }
    assert found == {name: first for first, group in groups.items() for name in group}


@pytest.mark.parametrize("seed", range(3))
def test_near_duplicates_stay_on_one_side_of_the_split_and_are_counted(tmp_path, seed):
    for number in range(20):
        folder = tmp_path / ("cat" if number % 2 else "dog")
        folder.mkdir(exist_ok=True)
        picture(number).save(folder / f"{number}.png")
        ImageOps.mirror(picture(number)).save(folder / f"{number} mirrored.jpg")
    train, test = (
        ImageDataset(tmp_path, split=split, split_seed=seed, group_near_duplicates=True) for split in ("train", "test")
    )
    assert (len(train), len(test)) == (32, 8)
    of = [{name.split("/")[1].split(".")[0].split()[0] for name in part.names} for part in (train, test)]
    assert not of[0] & of[1]
    assert "40 near-duplicates in 20 groups kept together" in summarize_splits(train, test)
