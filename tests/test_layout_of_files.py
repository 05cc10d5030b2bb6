"""Folder layouts are read as their owners mean them, or refused; nothing is left out without a word."""

import unicodedata

import pytest

from data.layout import DataError, infer_layout

TABLE = b"file,label\na.png,cat\nb.png,dog\n"


def of(*names, table=TABLE, **arguments):
    return infer_layout(names, lambda name: table, **arguments)


@pytest.mark.parametrize(("train", "test"), [("train", "test"), ("Train", "val"), ("training", "VALID")])
@pytest.mark.parametrize("above", ["", "pets/", "my/pets/"])
def test_usual_levels_are_the_split(train, test, above):
    names = [f"{above}{train}/cat/0.png", f"{above}{train}/dog/1.png", f"{above}{test}/cat/2.png"]
    layout = of(*names)
    assert (
        layout.classes == dict(zip(sorted(names), ["cat", "dog", "cat"], strict=True)) or above + train > above + test
    )
    assert {*layout.classes.values()} == {"cat", "dog"}
    assert layout.splits == {"train": names[:2], "test": names[2:]}
    assert f"split as {train}/ and {test}/" in layout.note


def test_images_for_validation_are_left_out_where_there_is_a_test():
    layout = of("train/cat/0.png", "val/cat/1.png", "test/cat/2.png")
    assert layout.splits == {"train": ["train/cat/0.png"], "test": ["test/cat/2.png"]}
    assert layout.left_out == {"in val/, beside train/ and test/": ["val/cat/1.png"]}


@pytest.mark.parametrize("above", ["", "pets/"])
def test_stray_files_do_not_split_classes_in_two(above):
    names = ["train/cat/0.png", "test/cat/1.png", "preview.png", "train/preview.png", "readme.txt", "test/x.heic"]
    layout = of(*(above + name for name in names), "__MACOSX/train/cat/._0.png", ".DS_Store")
    assert layout.classes == dict.fromkeys([above + "train/cat/0.png", above + "test/cat/1.png"], "cat")
    assert layout.left_out == {
        "in no class folder": [above + "preview.png", above + "train/preview.png"],
        "other files": [above + "readme.txt"],
        "of kind .heic, which is not read: convert it to PNG": [above + "test/x.heic"],
    }


def test_a_loose_image_does_not_hide_the_class_folders():
    layout = of("preview.png", "cat/0.png", "dog/1.png")
    assert layout.classes == {"cat/0.png": "cat", "dog/1.png": "dog"}
    assert layout.left_out == {"in no class folder": ["preview.png"]}


@pytest.mark.parametrize(
    ("names", "classes", "note"),
    [
        (["pets/cat/0.png", "pets/dog/1.png"], ["cat", "dog"], "in pets/"),
        (["pets/cat/0.png", "pets/preview.png"], ["cat"], "in pets/"),
        (["my/pets/cat/0.png", "my/preview.png"], ["cat"], "in my/pets/"),
        (["cat/0.png", "cat/1.png"], ["cat", "cat"], ""),
        (["0.png", "1.png"], ["", ""], ""),
        (["train/cat/0.png", "train/dog/1.png"], ["cat", "dog"], "in train/"),
        (["train/0.png", "bus/1.png"], ["bus", "train"], ""),  # vehicles
        (["train/0.png", "test/1.png"], ["", ""], "split as train/ and test/"),
        (["birds/owl/0.png", "cat/1.png"], ["birds/owl", "cat"], ""),
        (["photo/cat/0.png", "sketch/cat/1.png"], ["photo/cat", "sketch/cat"], ""),  # domains
        (["trains/steam/0.png", "cars/vans/1.png"], ["cars/vans", "trains/steam"], ""),
        (["train/images/cat/0.png", "test/images/cat/1.png"], ["cat", "cat"], "split as train/ and test/"),
    ],
)
def test_further_folder_layouts(names, classes, note):
    layout = of(*names)
    assert [*layout.classes.values()] == classes
    assert layout.note == note


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/a/0.png", "val/a/1.png", "valid/a/2.png"], r"beside each other lie train/, val/, valid/"),
        (["Train/a/0.png", "train/a/1.png", "test/a/2.png"], r"beside each other lie Train/, test/, train/"),
        (["train/a/0.png", "test/a/1.png", "extra/a/2.png"], r"lie extra/, test/, train/: a split is one train/"),
        (["train/a/0.png", "dev/a/1.png"], r"(dev|train)/ and (dev|train)/ hold the same classes, such as a/: a split"),
        (["trainset/a/0.png", "testset/a/1.png", "testset/b/1.png"], r"hold the same classes, such as a/: a split"),
        (["train2017/0.png", "val2017/1.png"], r"train2017/, val2017/: a split, or classes\? call its folders train/"),
        (["images_train/a/0.png", "images_test/a/1.png"], r"hold the same classes, such as a/: a split"),
        (["val/a/0.png", "test/a/1.png"], r"beside each other lie test/, val/"),
        (["cat/train/0.png", "cat/test/1.png", "dog/train/2.png"], r"cat/test/ has the split below the class"),
        (["cat/0.png", "cat/thumbs/1.png", "dog/1.png"], r"in cat/ and in cat/thumbs/ below it.*'\[cat/thumbs\]'"),
        (["0.png", "1.png", "2.png", "more/3.png"], r"3 images lie loose, such as 0.png, and 1 in folders"),
        (["cat/0.png", "cat/1.png", "cat/small/a/1.png"], r"2 images lie loose, such as cat/0.png, and 1 in folders"),
    ],
)
def test_ambiguous_folder_layouts_are_refused(names, message):
    with pytest.raises(DataError, match=message):
        of(*names)


@pytest.mark.parametrize("chosen", [{"exclude_classes": ["cat/thumbs"]}, {"classes": ["cat", "dog"]}])
def test_nested_class_can_be_left_out(chosen):
    layout = of("cat/0.png", "cat/thumbs/1.png", "dog/1.png", **chosen)
    assert layout.classes["cat/0.png"] == "cat"


@pytest.mark.parametrize("cat", ["cat", "chat\u00e9", "chate\u0301"])
def test_nested_classes_that_are_both_chosen_are_refused(cat):
    """The same holds in either Unicode form; macOS decomposes folder names."""
    folder, cat = unicodedata.normalize("NFD", cat), unicodedata.normalize("NFC", cat)
    names = [f"{folder}/0.png", f"{folder}/thumbs/1.png", "dog/1.png"]
    with pytest.raises(DataError, match=rf"in {folder}/ and in {folder}/thumbs/ below it"):
        of(*names, classes=[cat, f"{cat}/thumbs"])
    assert of(*names, exclude_classes=[f"{cat}/thumbs"]).classes[names[0]] == folder


@pytest.mark.parametrize("folders", [("", ""), ("images/", ""), ("pets/", "pets/"), ("pets/images/", "pets/")])
def test_labels_are_read_where_no_folders_name_them(folders):
    images, beside = folders
    layout = of(*(f"{images}{name}.png" for name in "abc"), f"{beside}labels.csv")
    assert layout.classes == {f"{images}a.png": "cat", f"{images}b.png": "dog"}
    assert layout.left_out == {"not named in labels.csv": [f"{images}c.png"]}
    assert layout.tables == [f"{beside}labels.csv"]


def test_whitespace_around_labels_is_ignored():
    layout = of("a.png", "b.png", "labels.csv", table=b"file,label\na.png, cat\nb.png,cat \n")
    assert {*layout.classes.values()} == {"cat"}


def test_labels_of_each_split_are_its_own():
    layout = infer_layout(
        ["train/a.png", "train/labels.csv", "test/a.png", "test/labels.csv"],
        lambda name: b"file,label\na.png,cat" if name.startswith("train") else b"file,label\na.png,dog",
    )
    assert layout.classes == {"train/a.png": "cat", "test/a.png": "dog"}


def test_class_folders_go_before_labels():
    layout = of("cat/a.png", "dog/b.png", "labels.csv", table=b"file,hair\n")
    assert layout.classes == {"cat/a.png": "cat", "dog/b.png": "dog"}
    assert layout.left_out == {"other files": ["labels.csv"]}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (b"id,breed\na.png,cat", r"labels.csv must have columns file and label, and has id, breed"),
        (b"", r"labels.csv must have columns file and label, and has nothing"),
        (b"file,label\na.png,cat\nz.png,cat", r"labels.csv: z.png is not there"),
        (b"file,label\na.png,", r"labels.csv: a.png has no label"),
        (b"file,label\na.png,cat\na.png,dog", r"labels.csv: a.png has two labels, cat and dog"),
        (b"file,label,split\na.png,cat,train\nb.png,cat,test", r"labels.csv has a column split, which is not read"),
        (b"file,label\n\xff,cat", r"labels.csv cannot be read"),
        (b'file,label\n"a.png,cat', r"labels.csv cannot be read"),
    ],
)
def test_invalid_label_tables_are_refused(table, message):
    with pytest.raises(DataError, match=message):
        of("a.png", "b.png", "labels.csv", table=table)


def test_a_name_that_both_splits_have_is_given_with_its_folder():
    """Otherwise the iteration order of a set, which varies by process, would decide which of the two gets the label."""
    names = ["train/a.png", "train/b.png", "test/a.png", "labels.csv"]
    with pytest.raises(DataError, match=r"labels.csv: a.png may be test/a.png or train/a.png; fix the table"):
        of(*names)
    table = b"file,label\ntrain/a.png,cat\nb.png,dog\ntest/a.png,dog\n"
    assert of(*names, table=table).classes == {"train/a.png": "cat", "train/b.png": "dog", "test/a.png": "dog"}
