"""Tar shards as the webdataset library writes them: classes, split, order, and what is refused."""

import io
import json
import pickle
import tarfile
import zipfile

import pytest
import yaml
from PIL import Image
from processes import TINY, log, run

from data.images import DataError, ImageDataset


def picture(number):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (15 * number, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def pack(path, *files):
    """Write a tar file with these names and contents, in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def samples(first, labels, suffix="cls"):
    """Files of samples, a picture and a label each."""
    files = []
    for number, label in enumerate(labels, first):
        said = json.dumps({"label": label, "width": 8}) if suffix == "json" else str(label)
        files += [(f"{number:05d}.png", picture(number)), (f"{number:05d}.{suffix}", said.encode())]
    return files


@pytest.fixture
def shards(tmp_path):
    pack(tmp_path / "shards" / "data-1.tar", *samples(3, [10, 2, 10]))
    pack(tmp_path / "shards" / "data-0.tar", *samples(0, [2, 10, 2]))
    return tmp_path / "shards"


@pytest.mark.parametrize("suffix", ["cls", "json"])
def test_samples_have_their_labels_in_the_order_of_shards(tmp_path, suffix):
    for number in (1, 0):
        pack(tmp_path / f"{number}.tar", *samples(2 * number, [2, 10], suffix))
    dataset = ImageDataset(tmp_path)
    assert dataset.names == ["0.tar/00000.png", "0.tar/00001.png", "1.tar/00002.png", "1.tar/00003.png"]
    assert dataset.classes == ["02", "10"]  # sorted as numbers are
    assert dataset.labels.tolist() == [0, 1, 0, 1]
    assert [int(dataset[index][0][0, 0, 0]) for index in range(4)] == [0, 15, 30, 45]
    assert dataset.note == "in 2 tar shards"
    assert not any(dataset.left_out.values())
    assert (pickle.loads(pickle.dumps(dataset))[3][0] == dataset[3][0]).all()  # as workers and processes get it


def test_a_single_tar_is_a_shard_with_class_names_beside_it(shards):
    (shards / "classnames.txt").write_text("\n".join(f"kind {number}" for number in range(11)))
    assert ImageDataset(shards).classes == ["kind 10", "kind 2"]
    alone = ImageDataset(shards / "data-0.tar")
    assert (alone.classes, alone.labels.tolist()) == (["kind 10", "kind 2"], [1, 0, 1])
    assert alone.note == "in 1 tar shard"


def test_tar_labels_may_be_names_or_absent(tmp_path):
    pack(tmp_path / "named" / "0.tar", *samples(0, ["cat", "Große Katze"]))
    assert ImageDataset(tmp_path / "named").classes == ["Große Katze", "cat"]
    files = [("a.png", picture(0)), ("a.txt", b"a caption"), ("b.png", picture(1)), ("._b.png", b"of macOS")]
    pack(tmp_path / "captions" / "0.tar", *files)
    unlabelled = ImageDataset(tmp_path / "captions")
    assert (unlabelled.classes, len(unlabelled)) == ([], 2)
    assert unlabelled.left_out["other files"] == ["0.tar/a.txt"]


@pytest.mark.parametrize(
    ("train", "test"),
    [("imagenet1k-train-0000", "imagenet1k-validation-00"), ("train/0", "val/0"), ("Training_0", "Test_0")],
)
def test_shards_called_train_and_test_are_the_split(tmp_path, train, test):
    pack(tmp_path / f"{train}.tar", *samples(0, [0, 1, 0]))
    pack(tmp_path / f"{test}.tar", *samples(3, [1]))
    held_out = ImageDataset(tmp_path, split="test")
    assert held_out.names == [f"{test}.tar/00003.png"]
    assert held_out.classes == ["0", "1"]
    assert ImageDataset(tmp_path, split="train").labels.tolist() == [0, 1, 0]
    assert "split by shards called train and" in held_out.note


def test_val_shards_are_left_out_beside_test_shards(tmp_path):
    for number, name in enumerate(("train", "val", "test")):
        pack(tmp_path / f"{name}.tar", *samples(2 * number, [0, 1]))
    assert ImageDataset(tmp_path, split="test").names == ["test.tar/00004.png", "test.tar/00005.png"]
    left_out = ImageDataset(tmp_path, split="train").left_out["in val shards, beside train and test"]
    assert left_out == ["val.tar/00002.png", "val.tar/00003.png"]


def test_without_a_split_of_their_own_a_share_of_each_class_is_held_out(shards):
    train, test = (ImageDataset(shards, split=split, test_fraction=0.3) for split in ("train", "test"))
    assert sorted(test.labels.tolist()) == [0, 1]
    assert sorted(train.names + test.names) == ImageDataset(shards).names
    assert train.names == sorted(train.names)


def test_tars_of_class_folders_are_read_like_zips(tmp_path):
    files = [(f"./photos/{label}/{number}.png", picture(number)) for number, label in enumerate(("cat", "dog", "cat"))]
    pack(tmp_path / "0.tar", *files[:2])
    pack(tmp_path / "1.tar", *files[2:])
    dataset = ImageDataset(tmp_path)
    assert dataset.classes == ["cat", "dog"]
    assert dataset.names == ["0.tar/photos/cat/0.png", "1.tar/photos/cat/2.png", "0.tar/photos/dog/1.png"]
    assert dataset.note == "in photos/"
    pack(tmp_path / "2.tar", files[0])
    with pytest.raises(DataError, match=r"photos/cat/0.png lies in two shards, as 0.tar.* and 2.tar"):
        ImageDataset(tmp_path)


def test_tars_beside_images_are_other_files(shards):
    (shards / "cat").mkdir()
    Image.new("RGB", (8, 8)).save(shards / "cat" / "0.png")
    dataset = ImageDataset(shards)
    assert dataset.names == ["cat/0.png"]
    assert dataset.left_out["other files"] == ["data-0.tar", "data-1.tar"]


def test_source_hashes_depend_on_pixels_and_labels(shards):
    before = ImageDataset(shards).source_hash
    assert ImageDataset(shards).source_hash == before
    pack(shards / "data-0.tar", *samples(0, [10, 10, 2]))
    assert ImageDataset(shards).source_hash != before
    pack(shards / "data-0.tar", *samples(0, [2, 10, 2]))
    assert ImageDataset(shards).source_hash == before
    (shards / "classnames.txt").write_text("\n".join("abcdefghijk"))
    assert ImageDataset(shards).source_hash != before


def cut(path):
    path.write_bytes(path.read_bytes()[:700])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: cut(folder / "data-0.tar"), r"data-0.tar: not a whole, uncompressed tar file"),
        (lambda folder: (folder / "a.tar").symlink_to("nowhere"), r"a.tar: not a whole, uncompressed tar file"),
        (lambda folder: (folder / "data-0.tar").write_text("no tar"), r"data-0.tar: not a whole, uncompressed tar"),
        (
            lambda folder: pack(folder / "a.tar", *samples(0, [1]), *samples(0, [1])),
            r"a.tar: it contains 00000.png twice",
        ),
        (lambda folder: pack(folder / "a.tar", ("x.png", picture(0))), r"a.tar/x.png has no label, .* data-0.tar/"),
        (lambda folder: pack(folder / "a.tar", *samples(0, [-1])), r"a.tar/00000.cls has the label '-1'.*withheld"),
        (lambda folder: pack(folder / "a.tar", *samples(0, [""])), r"a.tar/00000.cls has the label ''"),
        (lambda folder: pack(folder / "a.tar", *samples(0, [[1]], "json")), r"a.tar/00000.json has the label \[1\]"),
        (
            lambda folder: pack(folder / "a.tar", ("x.png", picture(0)), ("x.json", b"[1]")),
            r"a.tar/x.json is no label that can be read",
        ),
        (
            lambda folder: pack(folder / "a.tar", ("x.png", picture(0)), ("x.cls", b"1"), ("x.jpg", b"")),
            r"a.tar/x.jpg: its sample has another image, a.tar/x.png",
        ),
        (lambda folder: (folder / "classnames.txt").write_text("a\nb"), "classnames.txt has 2 lines, .* up to 10"),
        (
            lambda folder: (folder / "classnames.txt").write_text("a\n" * 11),
            "classnames.txt has 11 lines, 1 of them unlike",
        ),
        (lambda folder: pack(folder / "train-0.tar", *samples(0, [1])), "data-0.tar lies among shards that are called"),
        (lambda folder: pack(folder / "train-test.tar", *samples(0, [1])), "its name says test and train; rename it"),
    ],
)
def test_what_cannot_be_understood_is_one_sentence(shards, spoil, message):
    spoil(shards)
    with pytest.raises(DataError, match=f"^--data.path .*{message}"):
        ImageDataset(shards)


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.TAR.ZST"])
def test_compressed_tars_are_refused(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(DataError, match="a compressed tar file can only be read sequentially; decompress it"):
        ImageDataset(tmp_path / name)


def test_a_damaged_image_is_named_or_skipped(shards):
    pack(shards / "data-2.tar", ("9.png", picture(0)[:30]), ("9.cls", b"2"))
    with pytest.raises(DataError, match=r"data-2.tar/9.png is damaged \(.*--data.on_error skip"):
        ImageDataset(shards)[6]
    assert ImageDataset(shards, on_error="skip").left_out["damaged"] == ["data-2.tar/9.png"]


def test_a_training_reads_them_in_place(tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "autoencoder": "pixel"}))
    for shard in range(2):
        pack(tmp_path / "shards" / f"{shard}.tar", *samples(8 * shard, ["cat", "dog"] * 4))
    flags = ("--data.path", "shards", "--data.image_size", 8, "--model_args.patch_size", 1)
    done = run("train.py", "--config", "tiny.yaml", *flags, cwd=tmp_path)
    assert "shards (in 2 tar shards, split by --data.test_fraction 0.2): 12 training and 4 held-out" in done.stdout
    assert len([event for event in log(tmp_path, "tiny") if "loss" in event]) == TINY["train"]["num_steps"]
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["0.tar", "1.tar"]


def test_samples_after_damage_in_a_tar_are_never_dropped_silently(shards):
    path = shards / "data-1.tar"
    content, second = path.read_bytes(), 2 * 1024  # where the second sample's header is
    with tarfile.open(path) as archive:
        assert archive.getmembers()[2].offset == second
    flipped = bytearray(content)
    flipped[second + 148] ^= 1  # in the header's checksum
    damaged = {"flipped": bytes(flipped), "between two files": content[:second], "in a header": content[: second + 99]}
    damaged["two archives in one"] = content[:second] + bytes(1024) + content
    for written in damaged.values():
        path.write_bytes(written)
        with pytest.raises(DataError, match=r"data-1.tar: not a whole, uncompressed tar file \(at byte 2048"):
            ImageDataset(shards)
    path.write_bytes(content[: second + 4 * 1024] + bytes(512))  # one block of zeros is an end, too
    assert len(ImageDataset(shards)) == 6


def test_links_and_files_beside_the_shards_are_said(shards):
    (shards / "more").mkdir()
    (shards / "more" / "data-2.tar.gz").touch()
    with tarfile.open(shards / "data-0.tar", "a") as archive:
        link = tarfile.TarInfo("00009.png")
        link.type, link.linkname = tarfile.LNKTYPE, "00000.png"
        archive.addfile(link)
    (shards / "again.tar").symlink_to("data-0.tar")  # half of whose images would be held out, and half trained on
    left_out = ImageDataset(shards).left_out
    assert left_out["links to what is there already"] == ["again.tar", "data-0.tar/00009.png"]
    assert left_out["beside the shards"] == ["more/data-2.tar.gz"]


def test_an_empty_class_name_is_refused(shards):
    (shards / "classnames.txt").write_text("\n" + "".join(f"name {number}\n" for number in range(1, 12)))
    with pytest.raises(DataError, match=r"classnames.txt has 12 lines, 11 of them unlike"):
        ImageDataset(shards)


def test_a_tree_is_read_as_in_a_zip(tmp_path):
    """Names with dots, images of one name, tables of labels, files of other kinds."""
    dotted = [(f"{kind}/img.{number}.png", picture(number)) for number in range(3) for kind in ("cat", "dog")]
    trees = {
        "dots": [*dotted, ("cat/a.png", picture(9)), ("cat/a.bmp", picture(8)), ("dog/a.heic", b""), ("b.txt", b"")]
    }
    table = "file,label\n" + "".join(f"{number}.png,{'ab'[number % 2]}\n" for number in range(4))
    loose = [(f"{number}.png", picture(number)) for number in range(4)]
    trees["table"] = [*loose, ("labels.csv", table.encode())]
    for name, files in trees.items():
        pack(tmp_path / name / "tree.tar", *files)
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            for path, content in files:
                archive.writestr(path, content)
        packed, zipped = ImageDataset(tmp_path / name), ImageDataset(tmp_path / f"{name}.zip")
        assert (packed.classes, packed.note) == (zipped.classes, zipped.note)
        assert packed.names == [f"tree.tar/{path}" for path in zipped.names]
        assert packed.labels.equal(zipped.labels)
        found, expected = packed.left_out, zipped.left_out
        assert found == {why: [f"tree.tar/{path}" for path in left] for why, left in expected.items()}


@pytest.mark.parametrize("nested", [False, True], ids=["class folders", "below train/ and val/"])
def test_shards_of_class_folders_that_are_called_train_and_val_are_the_split(tmp_path, nested):
    """Otherwise held-out images would be trained on, and images with equal names in both splits be refused."""
    for shard, first in (("train", 0), ("val", 4)):
        above = f"{shard}/" if nested else ""
        files = [
            (f"{above}{kind}/{number}.png", picture(first + number)) for kind in ("cat", "dog") for number in (0, 1)
        ]
        pack(tmp_path / f"{shard}.tar", *files)
    train, test = (ImageDataset(tmp_path, split=split) for split in ("train", "test"))
    assert {name.partition("/")[0] for name in train.names} == {"train.tar"}
    assert {name.partition("/")[0] for name in test.names} == {"val.tar"}
    assert (train.classes, len(train), len(test)) == (["cat", "dog"], 4, 4)
