"""The zoo's index and table match its files, and its folders are ready for the hub."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from processes import ROOT, script

from checkpoints.checkpoint import open_checkpoint, read_metadata, read_tensors, save_tensors
from experiment.cli import run_program
from machine.atomic_files import sha256_of

ZOO = script("scripts/zoo.py")
BY_HAND, DOCUMENT, entry, filled_in = ZOO.BY_HAND, ZOO.DOCUMENT, ZOO.entry, ZOO.filled_in
INDEXED = yaml.safe_load(ZOO.INDEX.read_text())
PUSH = script("scripts/push_to_hub.py")


@pytest.mark.parametrize("name", INDEXED)
def test_a_row_of_the_zoo_matches_its_files(name):
    row = INDEXED[name]
    assert row == ZOO.current(row), "python scripts/zoo.py update; say images and images_per_second of new weights"
    assert row["bytes"] < 100e6
    assert row["precision"] in (["F16"], ["F16", "I64"])
    assert row["scores"]
    assert row["commands"]
    assert row["cost"] != "not said"
    assert "folder" in row or row["within"].keys() <= row["scores"].keys()


def test_the_documents_table_is_the_indexs():
    text = DOCUMENT.read_text()
    assert filled_in(text, INDEXED) == text, "run python scripts/zoo.py update"
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
    by_hand = {name: value for name, value in INDEXED["autoencoder embedded"].items() if name in BY_HAND}
    for name in ("folder", "config"):
        (tmp_path / by_hand[name]).parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / by_hand["folder"], tmp_path / by_hand["folder"])
    shutil.copy(ROOT / by_hand["config"], tmp_path / by_hand["config"])
    weights = tmp_path / by_hand["folder"] / INDEXED["autoencoder embedded"]["file"]
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert entry(by_hand, tmp_path)["sha256"] != INDEXED["autoencoder embedded"]["sha256"]


@pytest.fixture
def index(tmp_path, monkeypatch):
    """An index of its own, with the document of the repository."""
    monkeypatch.setattr(ZOO, "INDEX", tmp_path / "zoo.yaml")
    monkeypatch.setattr(ZOO, "DOCUMENT", tmp_path / "zoo.md")
    shutil.copy(ROOT / "docs" / "zoo.yaml", tmp_path)
    shutil.copy(ROOT / "docs" / "zoo.md", tmp_path)
    return tmp_path


def recognised(folder, share, **others):
    """A file like recognise.py's."""
    path = folder / f"{share}.json"
    path.write_text(json.dumps({"class_agreement": share, "num_samples": 50, **others}))
    return [path]


def test_a_run_becomes_a_row_by_which_others_are_checked(folder, index, capsys, monkeypatch):
    run, before = folder / "runs" / "tiny", yaml.safe_load((index / "zoo.yaml").read_text())
    flags = {
        "name": "mine",
        "run": str(run),
        "configuration": str(ROOT / "configs" / "quickstart.yaml"),
        "scores": json.dumps([str(path) for path in recognised(index, 0.9)]),
        "within": '{"class_agreement": 0.05}',
    }
    monkeypatch.setattr("sys.argv", ["zoo.py", "add", *(f"--{flag}={value}" for flag, value in flags.items())])
    run_program([ZOO.add, ZOO.check, ZOO.update])
    rows = yaml.safe_load((index / "zoo.yaml").read_text())
    row = rows.pop("mine")
    assert rows == before
    checkpoint = open_checkpoint(run)
    assert (row["images"], row["steps"]) == (checkpoint.step * checkpoint.config.train.batch_size, checkpoint.step)
    assert row["images_per_second"] > 0
    assert row["scores"] == {"class_agreement": "0.900 of 50 samples"}
    assert f"{row['sha256'][:12]}..." in (index / "zoo.md").read_text()
    PUSH.main(PUSH.PushConfig(checkpoint=str(run), repo="me/mine", half=True, dry_run=index / "ready"))
    assert sha256_of(index / "ready" / "ema.safetensors") == row["sha256"]
    for same in (run, index / "ready"):
        ZOO.check("mine", same)
        assert "the same file" in capsys.readouterr().out
    weights = run / "checkpoints" / "00000004" / "ema.safetensors"
    other = index / "ema.safetensors"
    save_tensors(read_tensors(weights), other, {**read_metadata(weights), "commit": "another"})
    ZOO.check("mine", other)
    assert "the same weights" in capsys.readouterr().out
    other = run / "checkpoints" / "00000002"
    ZOO.check("mine", other, recognised(index, 0.86))
    assert "other weights" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        ZOO.check("mine", other, recognised(index, 0.84))
    assert ended.value.code == 1
    assert "differs" in capsys.readouterr().out


def test_images_of_steps_with_another_batch_size_are_counted_as_they_were(folder, index, tmp_path):
    run = tmp_path / "runs" / "tiny"
    shutil.copytree(folder / "runs" / "tiny", run)
    weights = run / "checkpoints" / "00000004" / "ema.safetensors"
    history = [{"until": 1, "settings": {"train.batch_size": 100}}, {"until": 3, "settings": {"optim.lr": 1.0}}]
    save_tensors(read_tensors(weights), weights, {**read_metadata(weights), "history": json.dumps(history)})
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "lo')  # the last line of a training that was killed
    ZOO.add("mine", run, ROOT / "configs" / "quickstart.yaml", recognised(index, 0.9), {})
    batch_size = open_checkpoint(run).config.train.batch_size
    assert yaml.safe_load((index / "zoo.yaml").read_text())["mine"]["images"] == 100 + 3 * batch_size


def test_what_the_zoo_cannot_index_or_compare_is_said(folder, index):
    run, config = folder / "runs" / "tiny", ROOT / "configs" / "quickstart.yaml"
    silent = shutil.copytree(run, index / "silent")
    (silent / "log.jsonl").write_text('{"step": 1, "validation_loss": 1.0}\n')
    with pytest.raises(
        ValueError, match=r"--run .*silent: .*log\.jsonl has no speeds; train with --log\.every above 0"
    ):
        ZOO.add("mine", silent, config, recognised(index, 0.9), {})
    with pytest.raises(ValueError, match="--within: fid is not in --scores, which have class_agreement"):
        ZOO.add("mine", run, config, recognised(index, 0.9), {"fid": 1.0})
    with pytest.raises(ValueError, match=r"--within, --images: .* -1.* at least 0, images at least 1"):
        ZOO.add("mine", run, config, recognised(index, 0.9), {"class_agreement": -1.0})
    with pytest.raises(ValueError, match=r"--within, --images: .*, 0; "):
        ZOO.add("mine", run, config, recognised(index, 0.9), {}, images=0)
    with pytest.raises(ValueError, match="of other weights than"):
        ZOO.add("mine", run, config, recognised(index, 0.9, samples={"weights_sha256": "0"}), {})
    first, second = (recognised(index, scale / 10, samples={"guidance_scale": scale}) for scale in (1, 3))
    with pytest.raises(ValueError, match=r"0\.3\.json: its samples were drawn otherwise: guidance_scale 3, not .* 1"):
        ZOO.add("mine", run, config, [*first, *second], {})
    with pytest.raises(ValueError, match=r"--name mine: not in zoo\.yaml, which has embedded"):
        ZOO.check("mine", run)
    with pytest.raises(ValueError, match=r"--scores none\.json: no file of evaluate\.py's or recognise\.py's --output"):
        ZOO.add("mine", run, config, [Path("none.json")], {})
    with pytest.raises(ValueError, match=r"--configuration none\.yaml: not a file of this repository"):
        ZOO.add("mine", run, Path("none.yaml"), recognised(index, 0.9), {})
    with pytest.raises(ValueError, match="--run runs/none does not exist; give a run's folder"):
        ZOO.check("quickstart", Path("runs/none"))
    with pytest.raises(ValueError, match=r"--run embedded: .*log\.jsonl does not exist; give the folder of a training"):
        ZOO.add("mine", Path("embedded"), config, [], {}, images=1)
    ZOO.add("mine", run, config, recognised(index, 0.9), {"class_agreement": 0.05})
    with pytest.raises(ValueError, match="other weights; give --scores with class_agreement to compare"):
        ZOO.check("mine", run / "checkpoints" / "00000002")
