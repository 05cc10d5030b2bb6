"""Imports only go down: see docs/design.md."""

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BELOW = ("settings", "machine")  # for all
ALONE = ("models", "diffusion", "data", "metrics")  # the ground floor: they never import one another
ABOVE = (  # each may import those before it
    "autoencoders",
    "conversion",
    "experiment",
    "checkpoints",
    "sampling",
    "evaluation",
    "training",
    "autoencoder_training",
    "ablation",
    "sharing",
    "studies",
)
ROOMS = (*BELOW, *ALONE, *ABOVE)
PACKAGES = {*ROOMS, "scripts", "train", "sample", "evaluate", "tests"}


def imported_packages(code):
    for node in ast.walk(ast.parse(code.read_text()) if isinstance(code, Path) else code):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_lies_below(room):
    below = BELOW if room in ALONE else ROOMS[: ROOMS.index(room)]
    for path in (ROOT / room).rglob("*.py"):
        forbidden = set(imported_packages(path)) & PACKAGES - {*below, room}
        assert not forbidden, f"{path.relative_to(ROOT)} imports {forbidden}"


def test_no_two_modules_share_a_name():
    names = Counter(path.stem for room in ROOMS for path in (ROOT / room).rglob("*.py") if path.stem != "__init__")
    assert not {name for name, count in names.items() if count > 1}


def test_nothing_imports_entry_points_or_scripts():
    for path in [*ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        forbidden = set(imported_packages(path)) & {"train", "sample", "evaluate", "scripts"}
        assert not forbidden, f"{path.name} imports {forbidden}"


def test_layers_know_no_backbone():
    for path in (ROOT / "models" / "layers").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("models"):
                assert node.module.startswith("models.layers")


def test_programs_import_what_takes_seconds_only_where_they_use_it():
    slow = {"diffusers", "matplotlib", "tensorboard", "timm", "torchvision", "wandb"}
    rooms = set(ROOMS) - {"ablation", "metrics", "conversion", "sharing"}  # whose own modules wait until they are used
    paths = {*ROOT.glob("*.py"), *(path for room in rooms for path in (ROOT / room).rglob("*.py"))}
    for path in paths - {ROOT / "autoencoders" / "pooled.py"}:  # a subclass of diffusers'
        at_once = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        found = slow & set(imported_packages(ast.Module(at_once, [])))
        assert not found, f"{path.relative_to(ROOT)} imports {found}"
    for path in set((ROOT / "metrics").glob("*.py")) - {ROOT / "metrics" / "timm_models.py"}:
        at_once = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)]
        assert not {"timm", "metrics.timm_models"} & {node.module for node in at_once}, path


def test_figures_do_not_depend_on_the_environments_backend():
    """MPLBACKEND, which notebooks set, determines what pyplot does."""
    for path in [*ROOT.glob("*.py"), *(path for name in (*ROOMS, "scripts") for path in (ROOT / name).rglob("*.py"))]:
        assert "pyplot" not in path.read_text(), path


def test_train_py_stays_short():
    assert len((ROOT / "train.py").read_text().splitlines()) <= 180


def test_docstrings_say_something():
    """A name that says it all needs no docstring; a docstring has at least five words, to say more than the name."""
    short = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in [
            *ROOT.glob("*.py"),
            *(path for name in (*ROOMS, "scripts") for path in (ROOT / name).rglob("*.py")),
        ]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and 0 < len((ast.get_docstring(node) or "").split()) < 5
    ]
    assert short == [], "say more, or leave the docstring out"
