"""Folders and zips: links, files that are not images, and members that cannot be read."""

import os
import struct
import zipfile
import zlib
from unittest.mock import Mock

import pytest
from PIL import Image

from data import files
from data.files import Folder, content_hash
from data.images import DataError, ImageDataset, open_files


@pytest.fixture
def tree(tmp_path):
    for number, name in enumerate(("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png")):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (50 * number, 0, 0)).save(path)
    return tmp_path / "tree"


def test_loops_of_links_end_and_repeat_nothing(tree):
    (tree / "cat" / "again").symlink_to(tree)
    (tree / "dog" / "here").symlink_to(tree / "dog")
    (tree / "dog" / "itself").symlink_to("itself")
    (tree / "aaa").symlink_to(tree / "cat")
    (tree / "dog" / "2.png").symlink_to(tree / "cat" / "0.png")
    os.link(tree / "cat" / "1.png", tree / "dog" / "3.png")
    dataset = ImageDataset(tree)
    assert dataset.names == ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"]
    left_out = dataset.left_out["links to what is there already"]
    assert sorted(left_out) == ["aaa", "cat/again", "dog/2.png", "dog/3.png", "dog/here"]


def test_symbolic_links_to_images_elsewhere_are_followed(tree, tmp_path):
    (tree / ".store").mkdir()
    for number, place in enumerate((tree / ".store", tmp_path, tree)):
        Image.new("RGB", (8, 8)).save(place / f"blob{number}", "PNG")
        (tree / "dog" / f"link{number}.png").symlink_to(place / f"blob{number}")
    (tree / "emu").symlink_to(tmp_path / "emu")
    (tmp_path / "emu").mkdir()
    (tree / "cat" / "1.png").rename(tmp_path / "emu" / "0.png")
    names = ImageDataset(tree).names
    assert names[-4:] == ["dog/link0.png", "dog/link1.png", "dog/link2.png", "emu/0.png"]


def test_a_folders_hash_is_kept_as_long_as_no_file_changes(tree, tmp_path, monkeypatch):
    """A file's size and modification time may stay the same. Hashes of new files, and those computed in no time, are
    not cached."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    names = Folder(tree).names
    first = content_hash(Folder(tree), names)
    with monkeypatch.context() as patch:
        patch.delenv("XDG_CACHE_HOME")
        patch.setattr("pathlib.Path.home", Mock(side_effect=RuntimeError))  # of a user without a home
        assert content_hash(Folder(tree), names) == first
    monkeypatch.setattr(files, "SLOW_SECONDS", -1.0)
    assert content_hash(Folder(tree), names) == first
    assert not (tmp_path / "kept").exists()
    monkeypatch.setattr(files, "SETTLED", 0)
    assert content_hash(Folder(tree), names) == first
    with monkeypatch.context() as patch:
        patch.delattr(Folder, "checksum")
        assert content_hash(Folder(tree), names) == first
    (kept,) = (path for path in (tmp_path / "kept").rglob("*") if path.is_file())
    for cut in ("", first[:20], "z" * 64):  # of a machine that went down: it would be another data set's too
        kept.write_text(cut)
        assert content_hash(Folder(tree), names) == first
    image, before = tree / names[0], (tree / names[0]).stat()
    image.write_bytes(image.read_bytes()[:-1] + b"?")
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert content_hash(Folder(tree), names) != first


def test_images_are_measured_once_as_long_as_they_are_the_same(tree, tmp_path, monkeypatch):
    """At the first start all headers are read, which for a million files means reading all of them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    monkeypatch.setattr(files, "SLOW_SECONDS", -1.0)
    dataset = ImageDataset(tree, image_size=16)
    assert dataset.num_enlarged() == len(dataset) == 4
    with monkeypatch.context() as patch:
        patch.delattr(ImageDataset, "_decode")
        assert ImageDataset(tree, image_size=16).num_enlarged() == 4
    assert ImageDataset(tree, image_size=8).num_enlarged() == 0
    Image.new("RGB", (20, 20)).save(tree / "cat" / "0.png")
    assert ImageDataset(tree, image_size=16).num_enlarged() == 3


def bomb(side):
    """A PNG of a few bytes that claims to be `side` pixels wide and high."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


def spoil(path, kind):
    content = path.read_bytes()
    path.unlink()
    if kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "huge file":
        with path.open("wb") as file:
            file.truncate(2**31)
    elif kind == "bomb":
        path.write_bytes(bomb(30000))
    elif kind == "huge header":
        path.write_bytes(bomb(2**31 - 1))
    else:
        path.write_bytes(content[:30])


@pytest.mark.parametrize("kind", ["dangling link", "fifo", "huge file", "bomb", "huge header", "cut"])
def test_what_cannot_be_read_is_named_or_skipped(tree, kind):
    spoil(tree / "cat" / "1.png", kind)
    with pytest.raises(DataError, match=r"cat/1.png is damaged \(.*--data.on_error skip"):
        ImageDataset(tree)[1]
    skipping = ImageDataset(tree, on_error="skip", min_size=4)
    assert skipping.names == ["cat/0.png", "dog/0.png", "dog/1.png"]
    assert skipping.left_out["damaged"] == ["cat/1.png"]


def zip_of(tree, name_of=lambda name: name):
    path = tree.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(tree.rglob("*.png")):
            archive.write(file, name_of(file.relative_to(tree).as_posix()))
    return path


@pytest.mark.parametrize("kind", ["encrypted", "corrupt", "unknown compression", "huge"])
def test_members_that_cannot_be_read_are_named_or_skipped(tree, kind):
    path = zip_of(tree)
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"dog/1.png"))
    local = struct.unpack_from("<I", content, entry + 42)[0]
    if kind == "encrypted":
        content[entry + 8] |= 1
        content[local + 6] |= 1
    elif kind == "unknown compression":
        content[entry + 10] = content[local + 8] = 77
    elif kind == "huge":
        struct.pack_into("<I", content, entry + 24, 2**31)
    else:
        content[local + 45] ^= 255
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"dog/1.png is damaged \(.*--data.on_error skip"):
        ImageDataset(path)[3]
    assert ImageDataset(path, on_error="skip").left_out["damaged"] == ["dog/1.png"]


def test_zips_of_windows_have_their_classes(tree):
    folder = ImageDataset(tree)
    archive = ImageDataset(zip_of(tree, lambda name: name.replace("/", "\\")))
    assert archive.classes == folder.classes == ["cat", "dog"]
    assert archive.names == folder.names
    assert (archive[3][0] == folder[3][0]).all()


def test_names_that_lead_out_of_a_zip_are_no_images(tree):
    archive = ImageDataset(zip_of(tree, lambda name: name.replace("dog/0", "../../dog/0").replace("cat/0", "/cat/0")))
    assert archive.names == ["cat/0.png", "cat/1.png", "dog/1.png"]
    assert archive.classes == ["cat", "dog"]


@pytest.mark.parametrize("path", ["./cat/0.png", "/cat/0.png", "cat//0.png", "cat\\0.png", ".\\cat\\0.png"])
def test_a_zips_ways_to_write_a_path_are_one(tmp_path, path):
    """A leading `./` does not make a folder hidden: a class used to disappear without a word."""
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(path, b"")
        archive.writestr("./cat/", b"")
    assert open_files(tmp_path / "x.zip").names == ["cat/0.png"]


def test_a_name_in_two_unicode_forms_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("caf\u00e9", "cafe\u0301"):
            archive.writestr(f"{name}/0.png", b"")
    with pytest.raises(DataError, match=r"two classes are called .*, in two Unicode forms: rename one"):
        ImageDataset(tmp_path / "x.zip")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("again", ["cat/0.png", "./cat/0.png"])
def test_two_images_of_one_name_in_a_zip_are_not_one(tree, tmp_path, again):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("cat/0.png", "cat/1.png", again):
            archive.write(tree / name, name)
    with pytest.raises(DataError, match=r"a.zip: it contains .*cat/0.png twice; write it again"):
        ImageDataset(tmp_path / "a.zip")
