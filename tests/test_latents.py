import json
from functools import partial

import pytest
import torch
from safetensors import SafetensorError

from data.images import DataError
from data.latents import LatentCache, build_cache, cache_name
from data.shapes import ShapesDataset

IDENTITY = {"autoencoder": "toy", "sha256": "0", "input_range": "[-1, 1]", "scale": 1.0, "shift": 0.0}


def prepare(images):
    return images.float().mean(dim=1, keepdim=True)


@pytest.fixture
def dataset(monkeypatch):
    monkeypatch.setattr("data.latents.IMAGES_PER_SHARD", 8)
    return ShapesDataset(30, image_size=8)


def build(folder, dataset, **arguments):
    build_cache(folder, dataset, prepare, IDENTITY, **{"flips": True, "batch_size": 3, **arguments})


def expected(dataset, **changes):
    return {**IDENTITY, **dataset.describe(), "flips": True, **changes}


def test_cache_holds_every_image_both_ways(tmp_path, dataset):
    build(tmp_path, dataset)
    cache = LatentCache(tmp_path, expected(dataset))
    assert cache.stored.shape == (30, 2, 1, 8, 8)
    assert cache.labels.tolist() == dataset.labels.tolist()
    for index in (0, 17):
        image = dataset[index][0][None]
        plain, mirrored = cache.read(torch.tensor([index, index]), torch.tensor([0, 1]))
        assert torch.equal(plain, prepare(image)[0].half())
        assert torch.equal(mirrored, prepare(image.flip(-1))[0].half())


def test_missing_shards_alone_are_encoded_again(tmp_path, dataset):
    build(tmp_path, dataset)
    shards = sorted(tmp_path.glob("shard*"))
    stamps = {path: path.stat().st_mtime_ns for path in shards}
    shards[1].unlink()
    (tmp_path / "manifest.json").unlink()
    build(tmp_path, dataset)
    assert [path for path in shards if path.stat().st_mtime_ns != stamps[path]] == [shards[1]]
    assert len(LatentCache(tmp_path, expected(dataset))) == 30


def test_ranks_share_the_shards(tmp_path, dataset):
    build(tmp_path / "one", dataset)
    second = partial(build, tmp_path / "two", dataset, rank=1, num_ranks=2)
    build(tmp_path / "two", dataset, num_ranks=2, wait=second)
    one, two = (LatentCache(tmp_path / name, expected(dataset)) for name in ("one", "two"))
    assert torch.equal(one.stored, two.stored)


def test_processes_that_share_no_disk_are_told(tmp_path, dataset):
    elsewhere = partial(build, tmp_path / "elsewhere", dataset, rank=1, num_ranks=2)
    with pytest.raises(DataError, match=r"shard-00001.safetensors, which another process wrote, is not here"):
        build(tmp_path, dataset, num_ranks=2, wait=elsewhere)
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": "1"}, 'sha256 is "0", the run has "1"'),
        ({"image_size": [16, 16]}, r"image_size is \[8, 8\], the run has \[16, 16\]"),
        ({"crop": "random"}, "crop is"),
        ({"source_hash": "other"}, "source_hash is"),
    ],
)
def test_cache_of_something_else_is_refused_in_words(tmp_path, dataset, changes, message):
    build(tmp_path, dataset)
    with pytest.raises(DataError, match=message):
        LatentCache(tmp_path, expected(dataset, **changes))


def test_damaged_shard_is_named(tmp_path, dataset):
    build(tmp_path, dataset)
    shard = tmp_path / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"shard-00001.safetensors is damaged"):
        LatentCache(tmp_path, expected(dataset))


@pytest.mark.parametrize("name", ["stored", "labels", "source_indices"])
def test_one_flipped_bit_of_a_shard_is_found(tmp_path, dataset, name):
    build(tmp_path, dataset)
    path = tmp_path / "shard-00002.safetensors"
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    place = json.loads(content[8 : 8 + length])[name]["data_offsets"][0]
    content[8 + length + place] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"shard-00002.safetensors is damaged \(its checksum is another\); delete it"):
        LatentCache(tmp_path, expected(dataset))


@pytest.mark.parametrize(
    "manifest", ["[]", "null", "{", '{"format": 1}', '{"format": 2}', '{"format": 2, "classes": null}', None]
)
def test_malformed_manifest_is_named(tmp_path, dataset, manifest):
    build(tmp_path, dataset)
    path = tmp_path / "manifest.json"
    if manifest is None:
        manifest = json.dumps({**json.loads(path.read_text()), "shards": [1]})
    path.write_text(manifest)
    with pytest.raises(DataError, match=r"manifest.json is missing, damaged or of another version.*delete the folder"):
        LatentCache(tmp_path, expected(dataset))


def full_disk(*arguments, **more):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_full_disk_in_a_shard_is_told_and_leaves_nothing(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr("data.latents.save_file", full_disk)
    with pytest.raises(DataError, match=r"--data.cache .*shard-00000.safetensors cannot be written .*No space left"):
        build(tmp_path, dataset)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path, dataset):
    (tmp_path / "shard-00001.123.partial").write_bytes(b"half")
    (tmp_path / "manifest.123.partial").write_text("{")
    build(tmp_path, dataset)
    assert not list(tmp_path.glob("*.partial"))


def test_shard_that_another_process_finished_first_is_no_error(tmp_path, dataset, monkeypatch):
    build(tmp_path / "other", dataset)

    def overtaken(shard, partial, **more):
        path = partial.with_name(f"{partial.name.split('.')[0]}.safetensors")
        path.write_bytes((tmp_path / "other" / path.name).read_bytes())

    monkeypatch.setattr("data.latents.save_file", overtaken)
    build(tmp_path / "ours", dataset)
    assert len(LatentCache(tmp_path / "ours", expected(dataset))) == 30


def test_full_disk_is_told_before_encoding(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr("data.latents.shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(DataError, match=r"--data.cache .*: encoding needs .* MB free"):
        build(tmp_path, dataset)
    assert not list(tmp_path.glob("*.safetensors"))


def test_names_differ_with_the_settings(dataset):
    names = {cache_name(expected(dataset)), cache_name(expected(dataset, sha256="1"))}
    assert len(names) == 2
    json.dumps(expected(dataset))


def test_what_half_precision_does_not_hold_is_refused(tmp_path, dataset):
    with pytest.raises(DataError, match="--autoencoder: what it makes of images is not finite in half precision"):
        build_cache(tmp_path, dataset, lambda images: images.float() * 1e4, {}, flips=False)
    assert not list(tmp_path.glob("*.safetensors"))
