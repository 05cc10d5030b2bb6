"""Public weights and reference batches by name: downloaded once, complete and checked, or refused in one line."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mean_colour import random_images
from processes import ROOT, script
from test_reference_parity import load_fixture

from checkpoints.checkpoint import open_checkpoint
from conversion.public_files import FILES, public_file
from conversion.weights import SOURCES
from evaluation.reproduction import table_cells
from metrics import reference
from metrics.reference import read_adm

SCRIPT = script("scripts/import_checkpoint.py")


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """Empty torch-hub folder and working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Weights of a small DiT under a public name, served from a URL."""
    torch.save(load_fixture("dit")[1], tmp_path / "there.pt")
    file = replace(FILES["DiT-XL-2-256x256.pt"], url=(tmp_path / "there.pt").as_uri(), backbone="DiT", image_size=64)
    monkeypatch.setitem(FILES, "DiT-XL-2-256x256.pt", file)
    return tmp_path / "there.pt"


def import_named(name, **settings):
    settings = {"num_heads": 4, "autoencoder": "embedded", **settings}
    SCRIPT.main(SCRIPT.ImportConfig(weights=Path(name), output=Path("imported"), **settings))
    return open_checkpoint("imported")


@pytest.mark.parametrize("name", ["DiT-XL-2-256x256", "DiT-XL-2-256x256.pt"])
def test_a_public_file_is_downloaded_once_and_imported_by_its_format(hub_folder, served, name):
    checkpoint = import_named(name)
    assert checkpoint.config.sampling.num_steps == 250
    served.unlink()
    shutil.rmtree("imported")
    assert import_named(name).spec == checkpoint.spec
    assert [path.name for path in hub_folder.iterdir()] == ["DiT-XL-2-256x256.pt"]


def test_a_file_that_is_here_comes_first(hub_folder, served):
    served.rename("DiT-XL-2-256x256.pt")
    assert public_file(Path("DiT-XL-2-256x256.pt")) == (Path("DiT-XL-2-256x256.pt"), FILES["DiT-XL-2-256x256.pt"])
    assert public_file(Path("DiT-XL-2-256x256"))[0] == Path("DiT-XL-2-256x256.pt")
    assert not hub_folder.exists()
    with pytest.raises(ValueError, match=r"--source sit: DiT-XL-2-256x256\.pt is of dit; leave it out"):
        import_named("DiT-XL-2-256x256", source="sit")


def test_weights_of_another_model_by_that_name_are_refused(hub_folder, served, monkeypatch):
    monkeypatch.setitem(FILES, served.name, replace(FILES["DiT-XL-2-256x256.pt"], backbone="DiT-XL/2"))
    with pytest.raises(ValueError, match=r"--weights there\.pt: a DiT of 64 pixels, not the published DiT-XL/2 of 64"):
        import_named("there.pt")
    assert not Path("imported").exists()


def test_what_cannot_be_had_is_told_in_a_line(hub_folder, served, monkeypatch):
    served.unlink()
    with pytest.raises(
        ValueError, match=r"^--weights DiT-XL-2-256x256: file://.* cannot be downloaded \(.*\); put the"
    ):
        public_file(Path("DiT-XL-2-256x256"))
    with pytest.raises(
        ValueError, match=r"^--weights imagenet256_uvit_huge: open https://drive.*/view in a browser, and give"
    ):
        public_file(Path("imagenet256_uvit_huge"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"^--weights lightningdit-xl-imagenet256-64ep: the hub does not serve .*; give"
    ):
        public_file(Path("lightningdit-xl-imagenet256-64ep"))
    torch.save({}, "mine.pt")
    with pytest.raises(ValueError, match=r"^--source: whose format mine\.pt is in; only DiT-XL-2-256x256\.pt, "):
        import_named("mine.pt")


def test_a_download_that_was_cut_short_is_not_kept(hub_folder, served, monkeypatch):
    whole = torch.hub.download_url_to_file

    def cut(url, path):
        whole(url, path, progress=False)
        Path(path).write_bytes(Path(path).read_bytes()[:-1])

    monkeypatch.setattr("torch.hub.download_url_to_file", cut)
    with pytest.raises(ValueError, match="it was cut short"):
        public_file(Path("DiT-XL-2-256x256"))
    assert [*hub_folder.iterdir()] == []


def test_reference_batches_of_adm_come_by_their_names(hub_folder, tmp_path, monkeypatch, colour):
    images = random_images(3)
    np.savez(tmp_path / "there.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    name = "VIRTUAL_imagenet256_labeled.npz"
    monkeypatch.setitem(reference.PUBLIC, name, (tmp_path / "there.npz").as_uri())
    assert torch.equal(read_adm(Path(name), colour)[1], images)
    (hub_folder / name).unlink()
    (tmp_path / "there.npz").unlink()
    with pytest.raises(ValueError, match=rf"^--reference {name}: file://.* cannot be downloaded"):
        read_adm(Path(name), colour)
    with pytest.raises(ValueError, match="not a whole npz file"):
        read_adm(Path("mine.npz"), colour)


def test_the_zoo_lists_the_public_files():
    table = table_cells((ROOT / "docs" / "zoo.md").read_text())
    listed = {row["file"].strip("`"): row["`--source`"].strip("`") for _, row in table if "`--source`" in row}
    assert listed == {name: file.source for name, file in FILES.items()}
    assert {file.source for file in FILES.values()} <= SOURCES.keys()
