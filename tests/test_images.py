import shutil
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from data import open_dataset, summarize_splits
from data.images import DataError, ImageDataset, hold_out
from data.pixels import fit


@pytest.fixture
def tree(tmp_path):
    """Three classes of ten, six and two images, in many formats."""
    rng = np.random.default_rng(0)
    for name, count in {"cat": 10, "dog": 6, "emu": 2}.items():
        for number in range(count):
            path = tmp_path / "tree" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(path)
    (tmp_path / "tree" / "notes.csv").write_text("not an image")
    (tmp_path / "tree" / ".hidden.png").write_text("nor this")
    return tmp_path / "tree"


def zipped(tree):
    path = tree.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in tree.rglob("*"):
            archive.write(file, file.relative_to(tree))
    return path


def test_folder_and_zip_hold_the_same(tree):
    folder, archive = (ImageDataset(path, split="train", image_size=16) for path in (tree, zipped(tree)))
    assert folder.classes == archive.classes == ["cat", "dog", "emu"]
    assert folder.names == archive.names
    assert folder.source_hash == archive.source_hash
    assert all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(folder, archive, strict=True))


def test_split_is_disjoint_complete_and_keeps_proportions(tree):
    train, test, everything = (ImageDataset(tree, split=split) for split in ("train", "test", "all"))
    assert sorted(train.names + test.names) == everything.names
    assert torch.bincount(test.labels).tolist() == [2, 1, 1]
    assert ImageDataset(tree, split="test", split_seed=1).names != test.names


def test_smaller_fractions_are_subsets_of_larger_ones_and_the_held_out_images_stay(tree):
    def split(name, **settings):
        return ImageDataset(tree, split=name, **settings)

    whole, half, tenth = (split("train", train_fraction=fraction) for fraction in (1.0, 0.5, 0.1))
    assert [torch.bincount(images.labels).tolist() for images in (whole, half, tenth)] == [
        [8, 5, 1],
        [4, 3, 1],
        [1, 1, 1],
    ]
    assert {*tenth.names} < {*half.names} < {*whole.names}
    assert half.note.endswith("--data.train_fraction 0.5 of the training images")
    assert half.describe()["split"] != whole.describe()["split"]
    assert split("test", train_fraction=0.1).describe() == split("test").describe()
    assert split("train", train_fraction=0.5, split_seed=1).names != half.names


def test_a_fraction_of_shapes_is_refused():
    with pytest.raises(DataError, match=r"--data.train_fraction 0.5: shapes .* --data.num_images"):
        open_dataset("shapes", split="train", train_fraction=0.5)


@given(st.integers(2, 200), st.floats(0.01, 0.99), st.integers(0, 5), st.integers(1, 4))
@settings(max_examples=50)
def test_held_out_share_is_within_one_group(count, fraction, seed, size):
    groups = {f"class/{number}.png": f"group {number // size}" for number in range(count)}
    classes = dict.fromkeys(groups, "class")
    held_out = hold_out(classes, fraction, seed, groups)
    assert abs(len(held_out) - count * fraction) <= size
    assert not {groups[name] for name in held_out} & {groups[name] for name in groups if name not in held_out}
    assert hold_out(dict(reversed(classes.items())), fraction, seed, groups) == held_out


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # a test worker has one core
def test_workers_read_a_zip_at_once(tree):
    dataset = ImageDataset(zipped(tree), split="all", image_size=8)
    expected = torch.stack([dataset[i][0] for i in range(len(dataset))])
    read = torch.cat([images for images, _ in DataLoader(dataset, batch_size=4, num_workers=2)])
    assert torch.equal(read, expected)


def test_train_and_test_folders_are_the_split(tree):
    (tree.parent / "levels").mkdir()
    tree.rename(tree.parent / "levels" / "train")
    (tree.parent / "levels" / "test" / "cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tree.parent / "levels" / "test" / "cat" / "0.png")
    dataset = ImageDataset(tree.parent / "levels", split="test")
    assert dataset.names == ["test/cat/0.png"]
    assert dataset.classes == ["cat", "dog", "emu"]


def test_images_of_any_size_are_cut_to_any_other():
    """After rounding, the crop may be slightly larger than the image."""
    for side, width, height in [(28, 212, 116), (28, 116, 332), (28, 221, 29), (100, 110, 174)]:
        assert fit(Image.new("L", (width, height)), (side, side)).size == (side, side)


def test_images_are_cut_to_the_centre(tmp_path):
    picture = Image.new("RGB", (30, 10), "red")
    picture.paste("blue", (10, 0, 20, 10))
    picture.save(tmp_path / "wide.png")
    image, _ = ImageDataset(tmp_path, image_size=10)[0]
    assert image[:, 5, 5].tolist() == [0, 0, 255]
    assert ImageDataset(tmp_path, image_size=(5, 15))[0][0].shape == (3, 5, 15)


@pytest.mark.parametrize("name", ["classes", "exclude_classes"])
def test_a_dataset_that_keeps_all_classes_says_so(name):
    assert open_dataset("shapes", **{name: []}).classes
    with pytest.raises(DataError, match=rf"--data.{name} \['star'\]: shapes keeps all of its classes; leave it out"):
        open_dataset("shapes", **{name: ["star"]})


def test_excluded_classes_leave(tree):
    assert ImageDataset(tree, exclude_classes=["dog"]).classes == ["cat", "emu"]
    assert ImageDataset(tree, classes=["emu", "cat"]).classes == ["cat", "emu"]
    assert ImageDataset(tree, classes=["emu", "cat"], exclude_classes=["cat"]).classes == ["emu"]


def mistake(tree, kind):
    if kind == "missing":
        return tree / "nowhere", {}
    if kind == "empty":
        (tree / "void").mkdir()
        return tree / "void", {}
    if kind == "no zip":
        (tree / "file.zip").write_text("text")
        return tree / "file.zip", {}
    if kind == "cut zip":
        path = zipped(tree)
        path.write_bytes(path.read_bytes()[:500])
        return path, {}
    if kind == "single":
        (tree / "dog" / "0.png").rename(tree / "lone.png")
        (tree / "fox").mkdir()
        (tree / "lone.png").rename(tree / "fox" / "0.png")
        return tree, {"split": "train"}
    if kind in ("untrained", "grouped"):
        levels = {"test": "cat", "train": "dog" if kind == "untrained" else "cat"}
        for level, name in levels.items():
            (tree / level / name).mkdir(parents=True)
            (tree / "emu" / f"{len(level) - 4}.png").rename(tree / level / name / "0.png")
        for name in ("cat", "dog", "emu"):
            shutil.rmtree(tree / name)
        return tree, {"group_near_duplicates": kind == "grouped"}
    if kind == "no classes":
        return tree / "cat", {"classes": ["yak"]}
    return tree, {"exclude_classes": ["yak"]} if kind == "unknown class" else {"classes": ["cat", "yak"]}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"--data.path .*nowhere: is neither a folder nor a file"),
        ("empty", r"--data.path .*void: no images in it"),
        ("no zip", r"--data.path .*file.zip: neither a folder nor a whole zip"),
        ("cut zip", r"neither a folder nor a whole zip"),
        ("untrained", r"class 'cat' has held-out images and none to train on"),
        ("grouped", r"--data.group_near_duplicates true: .*has a split of its own \(split as train/ and test/\)"),
        ("single", r"class 'fox' has one image.*--data.exclude_classes '\[fox\]'"),
        (
            "unknown class",
            r"--data.exclude_classes yak: no such class; there are cat, dog, emu; '\[\]' leaves out none",
        ),
        ("unknown class to keep", r"--data.classes yak: no such class; there are cat, dog, emu; null takes all"),
        ("no classes", r"--data.classes yak: no such class; these images have none, leave it out"),
    ],
)
def test_mistakes_are_told_in_words(tree, kind, message):
    path, arguments = mistake(tree, kind)
    with pytest.raises(DataError, match=message):
        ImageDataset(path, **arguments)


def test_truncated_image_is_named_or_skipped(tree):
    path = tree / "cat" / "3.png"
    path.write_bytes(path.read_bytes()[:200])
    dataset = ImageDataset(tree)
    with pytest.raises(DataError, match=r"cat/3.png is damaged .*--data.on_error skip"):
        _ = [dataset[i] for i in range(len(dataset))]
    skipping = open_dataset(str(tree), split="all", image_size=16, on_error="skip")
    assert len(skipping) == len(dataset) - 1
    assert skipping.left_out["damaged"] == ["cat/3.png"]


@pytest.mark.parametrize("split", ["train", "test", "all"])
def test_labels_can_be_left_unused_without_moving_the_split(tree, split):
    labelled, unlabelled = (ImageDataset(tree, split=split, use_labels=used) for used in (True, False))
    assert unlabelled.names == labelled.names
    assert unlabelled.classes == []
    assert unlabelled.labels.tolist() == [0] * len(labelled)
    assert unlabelled[0][1] == 0
    assert unlabelled.describe() == {**labelled.describe(), "classes": []}
    shapes = open_dataset("shapes", split=split, image_size=8, num_images=20, use_labels=False)
    assert shapes.classes == []
    assert torch.equal(shapes[3][0], open_dataset("shapes", split=split, image_size=8, num_images=20)[3][0])
    assert shapes[3][1] == 0


def test_small_images_are_left_out_and_counted(tree):
    for number, size in enumerate([(15, 40), (40, 15), (16, 16)]):
        Image.new("RGB", size).save(tree / "cat" / f"small{number}.png")
    dataset = ImageDataset(tree, min_size=16)
    assert dataset.left_out["smaller than 16"] == ["cat/small0.png", "cat/small1.png"]
    assert "cat/small2.png" in dataset.names
    assert len(dataset) == 19
    with pytest.raises(DataError, match=r"no images left in the all split"):
        ImageDataset(tree, min_size=64)
    (tree / "cat" / "0.png").write_bytes(b"")
    assert len(ImageDataset(tree, min_size=16, on_error="skip")) == 18


def test_a_class_of_which_nothing_is_left_is_not_asked_of_a_model(tree):
    (tree / "elf").mkdir()
    for number in range(4):
        Image.new("RGB", (9, 9)).save(tree / "elf" / f"{number}.png")
    with pytest.raises(DataError, match=r"class 'elf' has no images left in the train split; left out: .*'\[elf\]'"):
        ImageDataset(tree, split="train", min_size=16)
    assert ImageDataset(tree, split="test", min_size=16).classes == [*ImageDataset(tree).classes]
    assert not ImageDataset(tree, split="train", min_size=16, use_labels=False).classes


def test_the_intake_message_reports_used_and_ignored_files(tree):
    Image.new("RGB", (16, 40)).save(tree / "cat" / "small.png")
    Image.new("RGB", (4, 4)).save(tree / "preview.png")
    (tree / "dog" / "0.png").write_bytes(b"")
    (tree / "twin").symlink_to(tree / "cat")
    arguments = {"image_size": 20, "exclude_classes": ["emu"], "on_error": "skip", "min_size": 10}
    train, test = (open_dataset(str(tree), split=split, **arguments) for split in ("train", "test"))
    assert summarize_splits(train, test) == (
        f"tree (split by --data.test_fraction 0.2): {len(train)} training and {len(test)} held-out images of 2 classes "
        "(cat, dog); left out 1 links to what is there already (twin); left out 1 other files (notes.csv); "
        "left out 1 in no class folder (preview.png); left out 2 of excluded classes (emu/0.png, emu/1.png); "
        "left out 1 damaged (dog/0.png)"
        + "; 1 of the training images are smaller than 20 and enlarged"
        * ("cat/small.png" in train.names)
    )
    assert len(train) + len(test) == 16
    shapes = [open_dataset("shapes", split=split, image_size=8, num_images=20) for split in ("train", "test")]
    assert summarize_splits(*shapes).startswith(
        "shapes (difficulty easy): 20 training and 10 held-out images of 10 classes (circle"
    )
