"""Licence, citation, and the origin of the weights that are part of the repository."""

import hashlib
import re
import tomllib

import pytest
import yaml

WEIGHTS = {".safetensors", ".pt", ".pt2", ".pth", ".bin", ".ckpt", ".npz"}


@pytest.fixture
def project(root):
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


@pytest.fixture
def citation(root):
    return yaml.safe_load((root / "CITATION.cff").read_text())


def test_the_licence_is_apache_2_wherever_it_is_named(root, project, citation):
    text = (root / "LICENSE").read_bytes()
    # the published text, to the byte
    assert hashlib.sha256(text).hexdigest() == "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4"
    assert project["license"] == citation["license"] == "Apache-2.0"
    assert "Licensed under the Apache License, Version 2.0" in (root / "NOTICE").read_text()
    assert "Apache-2.0" in (root / "README.md").read_text()
    for name in project["license-files"]:
        assert (root / name).is_file()


def test_the_citation_is_of_this_version(project, citation):
    assert {"cff-version", "message", "title", "type", "authors"} <= citation.keys()
    assert str(citation["version"]) == project["version"]


def test_every_reference_can_be_found(citation):
    titles = [reference["title"] for reference in citation["references"]]
    assert len(titles) == len(set(titles))
    for reference in citation["references"]:
        assert {"authors", "type"} <= reference.keys()
        if "XSwin" not in reference["title"]:  # known here by its title alone
            assert reference["year"]
            assert re.match(r"https://|10\.", reference.get("url") or reference["doi"])


@pytest.mark.parametrize(
    "name", ["XSwin", "DiT", "U-ViT", "Swin", "EDM2", "DPM-Solver++", "UniPC", "FID", "KID", "Muon"]
)
def test_what_the_code_stands_on_is_cited(citation, name):
    assert any(name in reference["title"] for reference in citation["references"])


def test_weights_that_come_with_it_are_in_the_notice(root):
    notice = (root / "NOTICE").read_text()
    weights = [path for path in (root / "assets").rglob("*") if path.suffix in WEIGHTS]
    assert weights
    for path in weights:
        assert str(path.relative_to(root)) in notice
    fixtures = [path for path in (root / "tests").rglob("*") if path.suffix in WEIGHTS]
    assert {str(path.parent.relative_to(root)) for path in fixtures} == {"tests/fixtures"}
    assert "tests/fixtures/*.safetensors" in notice
    for name in re.findall(r"[\w-]+\.png", notice):
        assert (root / "docs/pictures" / name).is_file()
