import json
import os
import re
import socket
import subprocess
import sys
import threading
from functools import partial
from textwrap import dedent
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from data.encoding import build_cache
from data.images import DataError
from data.latents import LatentCache, cache_name
from data.shapes import ShapesDataset
from data.shards import CHECKED, Rows, write_shard
from training.speed import sparse_cache

IDENTITY = {"autoencoder": "toy", "sha256": "0", "input_range": "[-1, 1]", "scale": 1.0, "shift": 0.0}


def prepare(images):
    return images.float().mean(dim=1, keepdim=True)


@pytest.fixture
def dataset(monkeypatch):
    monkeypatch.setattr("data.encoding.IMAGES_PER_SHARD", 8)
    return ShapesDataset(30, image_size=8)


def build(folder, dataset, **arguments):
    build_cache(folder, dataset, prepare, IDENTITY, **{"flips": True, "batch_size": 3, **arguments})


def of_two(rank, wait=lambda: None):
    return SimpleNamespace(process_index=rank, num_processes=2, wait_for_everyone=wait)


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
    second = partial(build, tmp_path / "two", dataset, accelerator=of_two(1))
    build(tmp_path / "two", dataset, accelerator=of_two(0, wait=second))
    one, two = (LatentCache(tmp_path / name, expected(dataset)) for name in ("one", "two"))
    assert torch.equal(one.stored, two.stored)


def test_processes_without_a_shared_disk_are_refused(tmp_path, dataset):
    elsewhere = partial(build, tmp_path / "elsewhere", dataset, accelerator=of_two(1))
    with pytest.raises(DataError, match=r"shard-00001.safetensors, which another process wrote, is not here"):
        build(tmp_path, dataset, accelerator=of_two(0, wait=elsewhere))
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


@pytest.mark.parametrize("device", ["cpu", None])
@pytest.mark.parametrize("name", ["stored", "labels", "source_indices"])
def test_one_flipped_bit_of_a_shard_is_found(tmp_path, dataset, name, device):
    build(tmp_path, dataset)
    flip(tmp_path / "shard-00002.safetensors", name)
    with pytest.raises(DataError, match=r"shard-00002.safetensors is damaged \(its checksum is another\); delete it"):
        LatentCache(tmp_path, expected(dataset), device)


def flip(path, name):
    """Flip one bit of this tensor."""
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    place = json.loads(content[8 : 8 + length])[name]["data_offsets"][0]
    content[8 + length + place] ^= 1
    path.write_bytes(content)


def test_shards_in_their_files_are_checked_once_and_again_when_one_is_touched(tmp_path, dataset, monkeypatch):
    """Shards that are so new that they may change within the same timestamp are checked at every start."""
    build(tmp_path, dataset)
    open_in_files = partial(LatentCache, tmp_path, expected(dataset), None)
    open_in_files()
    assert not (tmp_path / CHECKED).exists()
    monkeypatch.setattr("data.files.SETTLED", 0)
    open_in_files()
    with monkeypatch.context() as patch:
        patch.delattr("data.shards.read_shard")
        assert len(open_in_files()) == 30
    path = tmp_path / "shard-00001.safetensors"
    before = path.stat()
    flip(path, "stored")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DataError, match=r"shard-00001.safetensors is damaged"):
        open_in_files()


def test_a_cache_that_cannot_be_marked_is_checked_at_every_start(tmp_path, dataset, monkeypatch):
    build(tmp_path, dataset)
    monkeypatch.setattr("data.files.SETTLED", 0)
    (tmp_path / CHECKED).mkdir()
    for _ in range(2):
        LatentCache(tmp_path, expected(dataset), None)
    flip(tmp_path / "shard-00000.safetensors", "labels")
    with pytest.raises(DataError, match=r"shard-00000.safetensors is damaged"):
        LatentCache(tmp_path, expected(dataset), None)


def test_images_are_read_from_their_files_as_from_memory(tmp_path, dataset):
    build(tmp_path, dataset)
    files, memory = (LatentCache(tmp_path, expected(dataset), device) for device in (None, "cpu"))
    assert (files.stored.shape, files.num_views, len(files)) == (memory.stored.shape, 2, 30)
    for name in ("labels", "source_indices"):
        assert torch.equal(getattr(files, name), getattr(memory, name))
    index = torch.tensor([29, 0, 7, 8, 8, 23, 15, 16])
    assert torch.equal(files.stored.read(index), memory.stored[index])
    assert files.stored.read(index[:0]).shape == (0, 2, 1, 8, 8)
    view = torch.arange(8) % 2
    assert torch.equal(files.read(index, view), memory.read(index, view))


def test_a_shard_truncated_during_reading_is_reported(tmp_path, dataset):
    build(tmp_path, dataset)
    rows = LatentCache(tmp_path, expected(dataset), None).stored
    os.truncate(tmp_path / "shard-00003.safetensors", 600)
    with pytest.raises(DataError, match=r"shard-00003.safetensors is damaged \(it has become shorter\); delete it"):
        rows.read(torch.tensor([1, 29]))


def test_shards_of_another_shape_are_reported_as_damaged(tmp_path, dataset):
    build(tmp_path, dataset)
    path = tmp_path / "shard-00001.safetensors"
    write_shard(path, {**load_file(path), "stored": torch.zeros(8, 2, 1, 4, 4)})
    with pytest.raises(DataError, match=r"shard-00001.safetensors is damaged \(it stores torch.float32 \[2, 1, 4, 4\]"):
        LatentCache(tmp_path, expected(dataset), None)


def test_more_files_than_a_process_may_have_open_are_opened_or_told_of(tmp_path, dataset):
    """Runs in a process of its own, as the limit counts every file that a process has open."""
    build(tmp_path, dataset)
    script = """
        import os, resource, sys
        from pathlib import Path
        import torch
        from data.layout import DataError
        from data.shards import Rows

        paths = sorted(Path(sys.argv[1]).glob("shard*"))
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        while (last := os.dup(0)) <= highest:  # so that no number below the limit is free
            pass
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]

        def opened():
            names = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
            return sum(os.readlink(name).startswith(sys.argv[1]) for name in names if os.path.islink(name))

        resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1 + 3, hard))
        rows = Rows(paths)
        assert rows.read(torch.arange(30)).shape == rows.shape
        assert opened() == len(paths) == 4
        del rows
        assert opened() == 0
        resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1 + 3, last + 1 + 3))
        try:
            Rows(paths)
        except DataError as error:
            assert opened() == 0
            print(error)
        """
    run = subprocess.run(
        [sys.executable, "-c", dedent(script), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert not run.returncode, run.stderr
    assert re.search(r"of 4 shards \d could be opened .*more files \(`ulimit -n`\)", run.stdout)


def test_a_cache_of_a_gigabyte_is_read_in_a_few_megabytes(tmp_path):
    """A GB of zeros, sparse on disk; nothing of it stays in memory."""
    sparse_cache(tmp_path / "sparse", 31_000)
    rows = Rows(sorted((tmp_path / "sparse").glob("*-*.safetensors")))
    assert rows.shape == (31_000, 2, 8, 32, 32)
    held = psutil.Process().memory_info().rss
    for index in torch.randperm(31_000, generator=torch.Generator().manual_seed(0)).split(256):
        assert not rows.read(index).any()
    assert psutil.Process().memory_info().rss - held < 100e6


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
    monkeypatch.setattr("data.shards.save_file", full_disk)
    with pytest.raises(DataError, match=r"--data.cache .*shard-00000.safetensors cannot be written .*No space left"):
        build(tmp_path, dataset)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path, dataset):
    host = re.sub(r"[^\w-]", "-", socket.gethostname())
    for name in ("shard-00000.safetensors", "manifest.json"):
        (tmp_path / f".{name}.{host}.{2**22 + 1}.0123abcd.partial").write_bytes(b"half")
    build(tmp_path, dataset)
    assert not list(tmp_path.glob("*.partial"))


def test_shard_that_another_process_finished_first_is_no_error(tmp_path, dataset, monkeypatch):
    build(tmp_path / "other", dataset)

    def overtaken(shard, partial, **more):
        (tmp_path / "ours" / partial.name).write_bytes((tmp_path / "other" / partial.name).read_bytes())

    monkeypatch.setattr("data.shards.save_file", overtaken)
    build(tmp_path / "ours", dataset)
    assert len(LatentCache(tmp_path / "ours", expected(dataset))) == 30


def test_full_disk_is_told_before_encoding(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr("data.encoding.shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(DataError, match=r"--data.cache .*: encoding needs .* MB free"):
        build(tmp_path, dataset)
    assert not list(tmp_path.glob("*.safetensors"))


def test_names_differ_with_the_settings(dataset):
    names = {cache_name(expected(dataset)), cache_name(expected(dataset, sha256="1"))}
    assert len(names) == 2
    json.dumps(expected(dataset))


def test_latents_that_overflow_half_precision_are_refused(tmp_path, dataset):
    with pytest.raises(DataError, match="--autoencoder: what it makes of images is not finite in half precision"):
        build_cache(tmp_path, dataset, lambda images: images.float() * 1e4, {}, flips=False)
    assert not list(tmp_path.glob("*.safetensors"))


def test_threads_and_processes_change_no_bit_of_what_is_encoded(tmp_path, dataset):
    """The encoder never gets more images at once than asked for, mirrored ones included."""
    sizes = set()

    def normalised(images):  # differs with what comes together
        sizes.add(len(images))
        return prepare(images) / images.float().mean()

    for name, settings in {"one": {}, "five": {"num_threads": 5}}.items():
        build_cache(tmp_path / name, dataset, normalised, IDENTITY, flips=True, batch_size=6, **settings)
    assert sizes <= {1, 2, 4, 6}
    for path in sorted((tmp_path / "one").iterdir()):
        assert path.read_bytes() == (tmp_path / "five" / path.name).read_bytes()


def test_images_are_decoded_while_those_before_are_encoded(tmp_path, dataset, monkeypatch):
    decoded, last = threading.Event(), 29
    read = type(dataset).read

    def reads(self, index):
        if index == last:
            decoded.set()
        return read(self, index)

    def waits(images):
        seen.append(len(images))
        assert len(seen) != 5 or decoded.wait(60)  # the last batch but one, after one for the room on the disk
        return prepare(images)

    seen = []
    monkeypatch.setattr(type(dataset), "read", reads)
    monkeypatch.setattr("data.encoding.IMAGES_PER_SHARD", 30)
    build_cache(tmp_path, dataset, waits, IDENTITY, flips=False, batch_size=6)
    assert seen == [1, 6, 6, 6, 6, 6]


def test_an_image_that_cannot_be_decoded_is_told_of_as_without_threads(tmp_path, dataset, monkeypatch):
    read = type(dataset).read

    def damaged(self, index):
        if index == 17:
            raise DataError("--data.path shapes: 17 is damaged")
        return read(self, index)

    monkeypatch.setattr(type(dataset), "read", damaged)
    with pytest.raises(DataError, match=r"^--data.path shapes: 17 is damaged$"):
        build(tmp_path, dataset, num_threads=3)
    assert not list(tmp_path.rglob("manifest.json"))
