import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from data.images import ImageDataset

ROOT = Path(__file__).parent.parent


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["mnist"], "could not be fetched"), (["imagenet"], "choose from caltech101, cifar10, mnist")],
)
def test_mistakes_and_no_network_end_in_one_line(tmp_path, arguments, message):
    command = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), *arguments, "--output", "out.zip"]
    no_network = {**os.environ, **dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9")}
    done = subprocess.run(command, cwd=tmp_path, env=no_network, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.zip").exists()
