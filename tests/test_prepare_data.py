import importlib.util
import json
import sys
import zipfile
from types import SimpleNamespace
from typing import ClassVar

import pytest
from PIL import Image
from processes import ROOT, run

from data.images import ImageDataset


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("prepare_data", ROOT / "scripts" / "prepare_data.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["prepare_data"] = module
    spec.loader.exec_module(module)
    return module


def items():
    for split in ("train", "test"):
        for number, name in enumerate(("cat", "dog")):
            for shade in range(3):
                yield split, name, Image.new("L", (40, 30), 40 * shade + 20 * number)


def test_zip_reads_back_as_a_dataset(script, tmp_path):
    script.write_zip(items(), tmp_path / "pets.zip", 16, source="pets")
    train = ImageDataset(tmp_path / "pets.zip", split="train", image_size=16)
    assert train.classes == ["cat", "dog"]
    assert len(train) == 6
    assert train[0][0].shape == (3, 16, 16)
    manifest = json.loads((tmp_path / "pets.json").read_text())
    assert manifest["num_images"] == 12
    assert manifest["classes"] == {"cat": 6, "dog": 6}


def test_nothing_is_left_of_a_failure(script, tmp_path):
    def broken():
        yield from items()
        raise RuntimeError("lost connection")

    with pytest.raises(RuntimeError, match="lost connection"):
        script.write_zip(broken(), tmp_path / "pets.zip", None, source="pets")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_dataset_does_not_overwrite_a_zip(script, tmp_path):
    script.write_zip(items(), tmp_path / "pets.zip", 16, source="pets")
    before = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    with pytest.raises(ValueError, match=r"--dataset hf:me/pets: no images in it, or none in train, test or"):
        script.write_zip(iter(()), tmp_path / "pets.zip", 16, source="hf:me/pets")
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == before


def test_a_killed_write_leaves_no_manifest_of_another_zip(script, tmp_path, monkeypatch):
    script.write_zip(items(), tmp_path / "pets.zip", 16, source="pets")

    def killed(path, text):
        raise KeyboardInterrupt

    monkeypatch.setattr("machine.atomic_files.write_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        script.write_zip(items(), tmp_path / "pets.zip", 8, source="pets")
    assert [path.name for path in tmp_path.iterdir() if ".before-" not in path.name] == ["pets.zip"]


def test_a_manifest_does_not_overwrite_other_files(script, tmp_path):
    (tmp_path / "pets.json").write_text('{"annotations": []}')
    with pytest.raises(ValueError, match=r"its manifest would replace .*pets.json, which is none; give another name"):
        script.write_zip(items(), tmp_path / "pets.zip", 16, source="pets")
    assert [path.read_text() for path in tmp_path.iterdir()] == ['{"annotations": []}']


def test_a_zip_of_somebody_else_is_not_overwritten(script, tmp_path):
    script.write_zip(items(), tmp_path / "pets.zip", 16, source="pets")
    script.write_zip(items(), tmp_path / "pets.zip", 16, source="pets")  # of the same images
    assert {path.name for path in tmp_path.iterdir()} == {"pets.zip", "pets.json"}
    before = (tmp_path / "pets.zip").read_bytes()
    script.write_zip(items(), tmp_path / "pets.zip", 8, source="pets")
    kept, manifest = (next(tmp_path.glob(f"pets.{kind}.before-*")) for kind in ("zip", "json"))
    assert kept.read_bytes() == before
    assert json.loads(manifest.read_text())["image_size"] == 16
    (tmp_path / "mine.zip").write_bytes(b"photographs")
    (tmp_path / "pets.zip").rename(tmp_path / "kept.zip")
    (tmp_path / "pets.zip").write_bytes(b"others")  # beside the manifest of one that was moved
    for name, content in {"mine": b"photographs", "pets": b"others"}.items():
        with pytest.raises(ValueError, match=f"{name}.zip: is there, and {name}.json is not its manifest; move it"):
            script.write_zip(items(), tmp_path / f"{name}.zip", 16, source="pets")
        assert (tmp_path / f"{name}.zip").read_bytes() == content


@pytest.mark.parametrize("name", ["pets", "pets.v2", "pets.json"])
def test_a_manifest_is_of_one_zip(script, tmp_path, name):
    script.write_zip(items(), tmp_path / "pets.zip", 16, source="pets")
    before = (tmp_path / "pets.json").read_bytes()
    with pytest.raises(ValueError, match=f"--output .*{name}: give FILE.zip"):
        script.write_zip(items(), tmp_path / name, 8, source="others")
    assert (tmp_path / "pets.json").read_bytes() == before


def test_errors_of_fetching_and_of_writing_are_told_apart(script, tmp_path, monkeypatch):
    def lost():
        yield from items()
        raise RuntimeError("lost connection")

    config = script.PrepareConfig("pets", tmp_path / "pets.zip")
    with pytest.raises(OSError, match=r"--dataset pets could not be fetched \(lost connection\)"):
        list(script.with_download_errors(lost(), config))
    monkeypatch.setattr(zipfile.ZipFile, "writestr", lambda *given: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(OSError, match=r"\[Errno 28\] disk full"):
        script.write_zip(script.with_download_errors(items(), config), tmp_path / "pets.zip", None, source="pets")


class HubSplit(list):
    """Rows of a hub dataset as `datasets` returns them, undecoded."""

    features: ClassVar = {"image": None, "label": SimpleNamespace(names=["cat", "dog"])}

    def cast_column(self, name, kind):
        assert (name, kind) == ("image", {"decode": False})
        return self


def test_hub_images_are_decoded_by_our_own_reader(script, tmp_path, monkeypatch):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.eps")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *arguments, **more: pytest.fail("was run"))
    stored = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}, {"bytes": None, "path": tmp_path / "b.eps"}
    rows = HubSplit({"image": image, "label": 1 - number} for number, image in enumerate(stored))
    hub = SimpleNamespace(load_dataset=lambda name, cache_dir: {"train": rows}, Image=dict)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    found = script.hub_items(script.PrepareConfig("hf:me/pets", tmp_path / "pets.zip"))
    split, name, image = next(found)
    assert (split, name, image.getpixel((0, 0))) == ("", "dog", (255, 0, 0))
    with pytest.raises(OSError, match="cannot identify image file"):
        next(found)


def test_withheld_labels_are_no_last_class(script, tmp_path, monkeypatch):
    """The hub has label -1 for them, which Python would read as the last class."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    stored = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    rows = {label: HubSplit([{"image": stored, "label": label}]) for label in (0, 1, -1)}
    config = script.PrepareConfig("hf:me/pets", tmp_path / "pets.zip")

    def found(**splits):
        hub = SimpleNamespace(load_dataset=lambda name, cache_dir: splits, Image=dict)
        monkeypatch.setitem(sys.modules, "datasets", hub)
        return [(split, name) for split, name, _ in script.hub_items(config)]

    trained = ("train", "cat")
    assert found(train=rows[0], validation=rows[1], test=rows[-1]) == [trained, ("test", "dog")]
    assert found(train=rows[0], validation=rows[0], test=rows[1]) == [trained, ("test", "dog")]
    with pytest.raises(ValueError, match="the test split has a row without label"):
        found(train=rows[0], test=rows[-1])


@pytest.mark.parametrize(
    ("names", "message"), [(("a/b", "a_b"), "'a_b' would lie in one folder with 'a/b'"), (("",), "''")]
)
def test_classes_are_not_merged(script, tmp_path, names, message):
    with pytest.raises(ValueError, match=message):
        script.write_zip((("", name, Image.new("RGB", (8, 8))) for name in names), tmp_path / "x.zip", None, source="x")
    assert list(tmp_path.iterdir()) == []


def test_class_names_stay_inside_the_zip(script, tmp_path):
    named = [("", name, Image.new("RGB", (8, 8))) for name in ("../../up", ".hidden", "a/b", "c\\d")]
    script.write_zip(iter(named), tmp_path / "names.zip", None, source="names")
    assert ImageDataset(tmp_path / "names.zip").classes == ["_._.._up", "_hidden", "a_b", "c_d"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["mnist"], "could not be fetched"), (["imagenet"], "choose from caltech101, cifar10, mnist")],
)
def test_mistakes_and_no_network_end_in_one_line(tmp_path, arguments, message):
    no_network = dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = run("scripts/prepare_data.py", *arguments, "--output", "out.zip", cwd=tmp_path, check=False, **no_network)
    assert done.returncode == 2
    assert message in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.zip").exists()
