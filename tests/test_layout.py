"""Imports go down only: see docs/design.md."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {"models": set(), "diffusion": set(), "data": set(), "metrics": set()}
FLOORS["experiment"] = set(FLOORS)
PACKAGES = {*FLOORS, "scripts", "train", "sample", "evaluate", "tests"}


def imported_packages(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", FLOORS)
def test_packages_import_only_what_lies_below(package):
    allowed = FLOORS[package] | {package}
    for path in (ROOT / package).rglob("*.py"):
        forbidden = set(imported_packages(path)) & PACKAGES - allowed
        assert not forbidden, f"{path.relative_to(ROOT)} imports {forbidden}"


def test_nothing_imports_entry_points_or_scripts():
    for path in [*ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        forbidden = set(imported_packages(path)) & {"train", "sample", "evaluate", "scripts"}
        assert not forbidden, f"{path.name} imports {forbidden}"


def test_layers_know_no_backbone():
    for path in (ROOT / "models" / "layers").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("models"):
                assert node.module.startswith("models.layers")


def test_figures_do_not_depend_on_the_environments_backend():
    """MPLBACKEND, as notebooks set it, decides what pyplot does."""
    for path in [*ROOT.glob("*.py"), *(path for name in (*FLOORS, "scripts") for path in (ROOT / name).rglob("*.py"))]:
        assert "pyplot" not in path.read_text(), path


def test_train_reads_in_one_go():
    assert len((ROOT / "train.py").read_text().splitlines()) <= 250
