"""Near-duplicates end on one side of a split; what looks different does not."""

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from data import intake
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
    assert "40 near-duplicates in 20 groups kept together" in intake(train, test)
