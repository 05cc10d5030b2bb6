"""The zoo's index and table match its files, and its folders are ready for the hub."""

import shutil

import pytest
import yaml
from processes import ROOT, script

from checkpoints.checkpoint import open_checkpoint, read_tensors

ZOO = script("scripts/zoo.py")
BY_HAND, DOCUMENT, entry, filled_in = ZOO.BY_HAND, ZOO.DOCUMENT, ZOO.entry, ZOO.filled_in
INDEXED = yaml.safe_load(ZOO.INDEX.read_text())
PUSH = script("scripts/push_to_hub.py")


@pytest.mark.parametrize("name", INDEXED)
def test_a_row_of_the_zoo_matches_its_files(name):
    row = INDEXED[name]
    assert row == entry(row), "run python scripts/zoo.py, and say images and images_per_second of the new weights"
    assert row["bytes"] < 100e6
    assert row["precision"] in (["F16"], ["F16", "I64"])
    assert row["scores"]
    assert row["commands"]
    assert row["cost"] != "not said"


def test_the_documents_table_is_the_indexs():
    text = DOCUMENT.read_text()
    assert filled_in(text, INDEXED) == text, "run python scripts/zoo.py"
    assert text.count("...") >= len(INDEXED)


def test_the_zoos_row_of_the_embedded_checkpoint_matches_it():
    checkpoint = open_checkpoint("embedded")
    row = INDEXED["embedded"]
    assert (row["steps"], row["commit"]) == (checkpoint.step, checkpoint.commit)
    assert row["parameters"] >= sum(weight.numel() for weight in read_tensors(checkpoint.path).values() if weight.ndim)
    assert row["images"] >= checkpoint.step * checkpoint.config.train.batch_size


def test_push_to_hub_prepares_the_embedded_checkpoint(tmp_path):
    PUSH.main(PUSH.PushConfig(checkpoint="embedded", repo="me/ten", half=True, dry_run=tmp_path / "ready"))
    folder = tmp_path / "ready"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 100e6
    assert "license:" in (folder / "README.md").read_text()
    assert open_checkpoint(folder).step == INDEXED["embedded"]["steps"]


def test_other_weights_give_another_hash(tmp_path):
    by_hand = {name: INDEXED["autoencoder embedded"][name] for name in BY_HAND}
    for name in ("folder", "config"):
        (tmp_path / by_hand[name]).parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / by_hand["folder"], tmp_path / by_hand["folder"])
    shutil.copy(ROOT / by_hand["config"], tmp_path / by_hand["config"])
    weights = tmp_path / by_hand["folder"] / INDEXED["autoencoder embedded"]["file"]
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert entry(by_hand, tmp_path)["sha256"] != INDEXED["autoencoder embedded"]["sha256"]
