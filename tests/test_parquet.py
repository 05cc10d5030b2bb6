"""Parquet shards of Hugging Face's `datasets`, in a folder and streamed from a stub of the hub."""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
from hub_stub import COMMIT, Hub
from PIL import Image
from safetensors.torch import load_file

from data import open_dataset, summarize_splits
from data.encoding import build_cache
from data.layout import DataError
from data.parquet import UnreachableError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=")  # huggingface_hub, of its own HTTP library
TRAIN, VALIDATION, TEST = (f"data/{name}.parquet" for name in ("train-00000-of-00001", "validation", "test"))


def png(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def write(path, labels, names=("dog", "cat"), first=0, **columns):
    """Write a shard as `datasets` does, with three images a row group. Images are numbered from `first`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    stored = [{"bytes": png(first + number), "path": f"{number}.png"} for number in range(len(labels))]
    features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    features |= {name: {"names": list(names), "_type": "ClassLabel"} for name in columns}
    data = {"image": pa.array(stored, image), "label": pa.array(labels), **columns}
    table = pa.table({name: values for name, values in data.items() if values is not None})
    features = {name: about for name, about in features.items() if data[name] is not None}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=3)


@pytest.fixture
def pets(tmp_path):
    """Eight training images in three row groups, and four for validation; the test split's labels are withheld."""
    write(tmp_path / "pets" / TRAIN, [0, 1] * 4)
    write(tmp_path / "pets" / VALIDATION, [0, 1] * 2, first=8)
    write(tmp_path / "pets" / TEST, [-1] * 4, first=12)
    (tmp_path / "pets" / "README.md").write_text("---\n---\n")
    return tmp_path / "pets"


@pytest.fixture
def hub(monkeypatch, tmp_path, pets):
    """A stub of the hub with `me/pets`, as huggingface_hub finds it."""
    from huggingface_hub import HfFileSystem, constants

    hub = Hub()
    hub.repos["datasets/me/pets"] = {
        path.relative_to(pets).as_posix(): path.read_bytes() for path in pets.rglob("*") if path.is_file()
    }
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    resolve = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", resolve)
    monkeypatch.setenv("HF_TOKEN", "none")
    HfFileSystem.clear_instance_cache()
    yield hub
    HfFileSystem.clear_instance_cache()
    hub.shutdown()
    hub.server_close()


def test_classes_and_splits_are_those_of_the_shards(pets):
    train, held_out = (open_dataset(str(pets), split=split, image_size=8) for split in ("train", "test"))
    assert train.classes == ["cat", "dog"]
    assert train.labels.tolist() == [1, 0] * 4
    assert len(held_out) == 4
    assert summarize_splits(train, held_out).startswith(
        "pets (in 2 parquet shards, split by shards called train and val): 8"
    )
    assert len(train.left_out["without labels"]) == 4
    assert train.left_out["beside the shards"] == ["README.md"]
    for number in (5, 0, 7):
        assert torch.equal(train[number][0], torch.from_numpy(pixels_of(number)))
    copy = pickle.loads(pickle.dumps(held_out))
    assert torch.equal(copy[3][0], torch.from_numpy(pixels_of(11)))


def pixels_of(number):
    return np.array(Image.open(io.BytesIO(png(number)))).transpose(2, 0, 1)


def encoded(folder, dataset):
    def prepare(images):
        return torch.nn.functional.avg_pool2d(images.float(), 2) / 255

    build_cache(folder, dataset, prepare, {}, flips=True, batch_size=4, num_threads=3)
    return load_file(folder / "shard-00000.safetensors")


def test_a_zip_of_the_same_images_gives_the_same_cache(pets, tmp_path):
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
        for number in range(12):
            archive.writestr(f"{'train' if number < 8 else 'val'}/{number:02d}.png", png(number))
        rows = [
            f"{'train' if number < 8 else 'val'}/{number:02d}.png,{('dog', 'cat')[number % 2]}" for number in range(12)
        ]
        archive.writestr("labels.csv", "\n".join(["file,label", *rows]))
    for split in ("train", "test"):
        caches = [
            encoded(tmp_path / f"{path.stem}-{path.suffix}-{split}", open_dataset(str(path), split=split, image_size=8))
            for path in (pets, tmp_path / "pets.zip")
        ]
        assert all(torch.equal(caches[0][name], caches[1][name]) for name in caches[0])


def test_the_hub_is_streamed_and_gives_the_same_cache(pets, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    here, there = (open_dataset(path, split="train", image_size=8) for path in (str(pets), "hf://me/pets"))
    assert there.note == "in 2 parquet shards of the hub, split by shards called train and val"
    assert {**there.describe(), "source": "pets"} == here.describe()
    listed = [call for call in hub.calls if "/tree/" in call]
    hub.calls.clear()
    caches = [encoded(tmp_path / name, images) for name, images in (("here", here), ("there", there))]
    assert all(torch.equal(caches[0][name], caches[1][name]) for name in caches[0])
    assert 3 <= len(hub.calls) <= 2 * 3, "a row group at a time, and metadata"
    assert listed
    assert all(COMMIT in call for call in (*listed, *hub.calls)), "whatever becomes of the branch"
    assert not (tmp_path / "home").exists()


def test_a_data_set_of_the_hub_may_have_a_revision_and_a_folder(pets, hub):
    hub.repos["datasets/me/two"] = {
        f"{name}/{path.split('/')[1]}": content
        for name in ("small", "large")
        for path, content in hub.repos["datasets/me/pets"].items()
        if "/" in path
    }
    with pytest.raises(DataError, match=r"several data sets, large, small; give the folder of one"):
        open_dataset("hf://me/two", split="train", image_size=8)
    assert len(open_dataset("hf://me/two@main/small", split="train", image_size=8)) == 8


def test_a_data_set_of_which_the_hub_converted_a_part_is_read_and_said_to_be_one(pets, hub):
    hub.repos["datasets/me/large"] = {
        f"default/partial-{'train' if 'train' in path else 'validation'}/{number:04d}.parquet": content
        for number, (path, content) in enumerate(hub.repos["datasets/me/pets"].items())
        if path.endswith(".parquet")
    }
    dataset = open_dataset("hf://me/large", split="train", image_size=8)
    assert len(dataset) == 8
    assert "converted in part, as their folder says, split by shards called train and val" in dataset.note


@pytest.mark.parametrize(
    ("labels", "columns", "flag", "classes"),
    [
        ([0, 1, 2, 0, 1, 2], {"names": ("crane", "heron", "crane")}, None, ["crane (0)", "crane (2)", "heron"]),
        (["b", "a"] * 3, {}, None, ["a", "b"]),
        (pa.array(["b", "a"] * 3).dictionary_encode(), {}, None, ["a", "b"]),
        ([True, False] * 3, {"names": ()}, None, ["False", "True"]),
        ([3, 10] * 3, {"names": ()}, None, ["03", "10"]),
        (None, {}, None, []),
        ([0] * 6, {"fine": [0, 1] * 3}, "fine", ["cat", "dog"]),
    ],
    ids=["two of one name", "texts", "categories", "truths", "numbers", "none", "another column"],
)
def test_labels_may_be_numbers_or_texts(tmp_path, labels, columns, flag, classes):
    path = tmp_path / "x.parquet"
    if labels is None:
        table = pa.table({"image": pa.array([{"bytes": png(number)} for number in range(6)])})
        pq.write_table(table, path)
    else:
        write(path, labels, **columns)
    dataset = open_dataset(str(path), split="all", image_size=8, label_column=flag)
    assert dataset.classes == classes
    assert len(dataset) == 6


def several_label_columns(folder):
    table = pa.table({"image": [{"bytes": png(0)}], "fine": [0], "coarse": [0]})
    about = {name: {"names": ["cat"], "_type": "ClassLabel"} for name in ("fine", "coarse")}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": about}})})
    pq.write_table(table, folder / "x.parquet")


def other_columns(**second):
    """Two shards, the second with these columns instead of those of the first."""

    def make(folder):
        write(folder / "a.parquet", [0, 1])
        write(folder / "b.parquet", **{"labels": [0, 1], **second})

    return make


MISTAKES = {
    "labels of broken numbers": (
        lambda folder: write(folder / "x.parquet", [0.0, 1.0]),
        "x.parquet has labels in label, but of type double; store them as whole numbers or texts",
    ),
    "numbers beside names": (
        other_columns(names=()),
        "a.parquet has its labels in label, with names of classes, but b.parquet in label, without names",
    ),
    "labels of another column": (
        other_columns(labels=[None] * 2, kind=[0, 1]),
        "a.parquet has its labels in label, .* but b.parquet in kind, with names of classes; give shards of one data",
    ),
    "images of another column": (
        lambda folder: (
            write(folder / "a.parquet", [0, 1]),
            pq.write_table(pa.table({"mask": [{"bytes": png(0)}], "label": ["cat"]}), folder / "b.parquet"),
        ),
        "a.parquet has its images in image, but b.parquet in mask; give shards of one data set",
    ),
    "a column of numbers": (
        lambda folder: pq.write_table(pa.table({"image": [1], "label": [1]}), folder / "x.parquet"),
        "x.parquet has no column of images, but image, label; call one image",
    ),
    "several labels": (several_label_columns, "classes in the columns fine and coarse; --data.label_column fine"),
    "a missing label": (
        lambda folder: write(folder / "x.parquet", [0, -1, 1, 0]),
        r"x.parquet/00000001 has the label -1, which is no class \(withheld\?\)",
    ),
    "a label without a name": (
        lambda folder: write(folder / "x.parquet", [0, 1, 2]),
        "x.parquet/00000002 has the label 2, which is no class",
    ),
    "half a file": (
        lambda folder: (folder / "x.parquet").write_bytes(b"PAR1, and no more"),
        "x.parquet is not a whole parquet file",
    ),
    "tar beside it": (
        lambda folder: (write(folder / "x.parquet", [0, 1]), (folder / "x.tar").write_bytes(b"")),
        "both tar and parquet shards lie in it",
    ),
}


@pytest.mark.parametrize(("make", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(DataError, match=message):
        open_dataset(str(tmp_path), split="all", image_size=8)


def test_a_label_column_is_one_of_the_shards(pets, tmp_path):
    with pytest.raises(DataError, match=r"no column breed of numbers or texts; --data.label_column: there are label"):
        open_dataset(str(pets), split="all", label_column="breed")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"--data.label_column breed: .* holds no parquet files; leave it out"):
        open_dataset(str(tmp_path), split="all", label_column="breed")


@pytest.mark.parametrize(("stored", "reason"), [(None, "no bytes of an image"), (b"nothing", "not an image")])
def test_a_damaged_image_stops_or_is_left_out(tmp_path, stored, reason):
    rows = [{"bytes": png(0)}, {"bytes": stored}, {"bytes": png(1)}]
    pq.write_table(pa.table({"image": pa.array(rows, pa.struct([("bytes", pa.binary())]))}), tmp_path / "x.parquet")
    dataset = open_dataset(str(tmp_path), split="all", image_size=8)
    with pytest.raises(DataError, match=f"x.parquet/00000001 is damaged .*{reason}"):
        dataset[1]
    assert len(open_dataset(str(tmp_path), split="all", image_size=8, on_error="skip")) == 2


def test_an_image_that_cannot_be_fetched_is_not_left_out_as_damaged(hub):
    dataset = open_dataset("hf://me/pets", split="train", image_size=8)
    del hub.repos["datasets/me/pets"][TRAIN]
    for read in (lambda: dataset[0], lambda: dataset._is_readable(dataset.names[0])):
        with pytest.raises(UnreachableError, match=r"hf://me/pets: data/train.* cannot be fetched"):
            read()


def test_without_pyarrow_one_sentence_says_what_to_install(pets, monkeypatch):
    monkeypatch.setattr("data.parquet.import_module", lambda name: __import__("no_such_module"))
    with pytest.raises(DataError, match=r"parquet files need pyarrow; pip install -e '\.\[parquet\]'"):
        open_dataset(str(pets / TRAIN), split="all", image_size=9)


@pytest.mark.parametrize("path", ["hf://me/nothing", "hf://me"])
def test_what_the_hub_does_not_have_is_one_sentence(hub, path):
    with pytest.raises(UnreachableError, match=rf"--data.path {path}: no network, or no such data set on the hub \("):
        open_dataset(path, split="train", image_size=8)
    hub.repos["datasets/me/zips"] = {"a.zip": b""}
    with pytest.raises(DataError, match=r"no parquet files in it; hf://me/zips@refs/convert/parquet may have"):
        open_dataset("hf://me/zips", split="train", image_size=8)


def test_without_a_network_one_sentence_says_so(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        UnreachableError, match=r"^--data.path hf://me/pets: no network, .*refused\); write hf://owner/name$"
    ):
        open_dataset("hf://me/pets", split="train", image_size=8)
