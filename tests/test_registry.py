"""Files from outside this repository: what they register, and whose consent it takes to run them."""

import json
import sys
from dataclasses import dataclass, field, fields
from functools import partial

import pytest
import torch
import yaml

from ablation.identity import code_hashes
from checkpoints.checkpoint import make_metadata, open_checkpoint, save_tensors
from diffusion.presets import DIFFUSIONS
from experiment import imports
from experiment.build import build_diffusion
from experiment.cli import parse
from experiment.config import DiffusionConfig, ExperimentConfig
from experiment.imports import load_imports
from experiment.mappings import from_dict
from experiment.open_section import open_section
from experiment.registry import TABLES, register
from metrics.scores import Metric
from models import ModelSpec
from training.resumption import resume_config


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    """Where the user's consent is stored, in a session in which nothing has been loaded yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(imports, "_loaded", {})
    monkeypatch.setattr(imports, "_given", set())
    monkeypatch.chdir(tmp_path)
    return tmp_path / "state"


def write(path, mark="ran"):
    """Write a module that leaves a mark when it runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"from pathlib import Path\nPath('{mark}').touch()  # {path}\n")
    return path


def forget(monkeypatch, name):
    """Forget a loaded module, as in a later program."""
    monkeypatch.setattr(imports, "_given", set())
    for module in [module for module in sys.modules if module.startswith(f"imported_{name}_")]:
        monkeypatch.delitem(sys.modules, module)


@pytest.mark.parametrize("kind", TABLES)
def test_what_is_registered_is_in_the_table_of_its_kind_and_a_taken_name_is_refused(kind, monkeypatch):
    module, name = TABLES[kind]
    __import__(module)
    monkeypatch.setattr(sys.modules[module], name, dict(getattr(sys.modules[module], name)))
    facts = {"better": "lower"} if kind == "metric" else {}
    thing = register(kind, "mine", **facts)(dataclass(type("Mine", (), {})))
    row = getattr(sys.modules[module], name)["mine"]
    assert row == {"backbone": (thing, {}), "metric": Metric(thing, better="lower")}.get(kind, thing)
    with pytest.raises(ValueError, match=rf"register\('{kind}', 'mine'\): the name is taken, by .*Mine; choose"):
        register(kind, "mine", **facts)(thing)


def test_registering_says_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"no such kind, choose from backbone"):
        register("model", "mine")
    with pytest.raises(ValueError, match=r"takes no arguments, leave out depth"):
        register("sampler", "mine", depth=2)
    with pytest.raises(ValueError, match=r"a metric's better is one of lower, higher, not less"):
        register("metric", "mine", better="less")(len)


def test_imports_are_loaded_when_a_configuration_is_read(tmp_path):
    write(tmp_path / "mine.py")
    assert parse(ExperimentConfig, ["--imports", "mine.py"]).imports == ["mine.py"]
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.py", "", r"--imports none.py: no such file; give --imports the path of none.py"),
        ("no_such_module", "", r"--imports no_such_module: no such module; give a .py file, or .* PYTHONPATH"),
        ("bad.py", "x = \n", r"--imports bad.py: SyntaxError: .*; TRACEBACK=1"),
        ("bad.py", "\nimport no_such_library\n", r"ModuleNotFoundError: .*no_such_library' \(bad.py, line 2\)"),
    ],
)
def test_what_cannot_be_loaded_is_told(name, text, message, tmp_path):
    if text:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_imports([name])


def test_imports_of_a_checkpoint_run_only_with_the_users_consent(tmp_path, monkeypatch):
    """Not loaded: a file that came with the run, one that has changed since, and a module of Python's own path."""
    write(tmp_path / "runs" / "theirs" / "mine.py", mark="theirs-ran")
    write(tmp_path / "library" / "in_the_way.py", mark="library-ran")
    monkeypatch.syspath_prepend(tmp_path / "library")
    for name in ("runs/theirs/mine.py", "in_the_way", "antigravity"):
        with pytest.raises(
            ValueError, match=rf"{name}: theirs names it, and its code was not given here before; if you"
        ):
            load_imports([name], stored_in="theirs")
    assert not {"theirs-ran", "library-ran"} & {path.name for path in tmp_path.iterdir()}
    assert not {"in_the_way", "antigravity"} & sys.modules.keys()

    mine = write(tmp_path / "mine.py", mark="mine")
    load_imports(["mine.py", "in_the_way"])
    monkeypatch.setattr(imports, "_given", set())  # another program, later
    load_imports(["mine.py", "in_the_way"], stored_in="theirs")
    write(mine, mark="changed")
    with pytest.raises(ValueError, match=r"was not given here before"):
        load_imports(["mine.py"], stored_in="theirs")
    assert not (tmp_path / "changed").exists()


def test_bytecode_beside_a_file_is_not_run(tmp_path):
    """Python would use it if size and time of the source are equal."""
    import importlib.util
    import py_compile

    mine, other = write(tmp_path / "mine.py", mark="good"), write(tmp_path / "other.py", mark="evil")
    cached = importlib.util.cache_from_source(str(mine))
    py_compile.compile(str(other), cfile=cached, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    load_imports(["mine.py"])
    assert (tmp_path / "good").exists()
    assert not (tmp_path / "evil").exists()


def test_a_file_that_has_moved_is_given_anew(tmp_path):
    write(tmp_path / "elsewhere" / "mine.py")
    with pytest.raises(ValueError, match=r"theirs names it, and it is not here; give --imports the path of mine.py"):
        load_imports(["mine.py"], stored_in="theirs")
    load_imports(["elsewhere/mine.py"])
    load_imports(["mine.py"], stored_in="theirs")


def test_of_two_files_of_one_name_each_checkpoint_runs_its_own(tmp_path, monkeypatch):
    files = [str(write(tmp_path / mark / "mine.py", mark=f"{mark}-ran")) for mark in ("one", "two")]
    load_imports(files)
    forget(monkeypatch, "mine")  # the page, with a checkpoint of each
    for mark in ("one-ran", "two-ran"):
        (tmp_path / mark).unlink()
    for file in files:
        load_imports([file], stored_in="theirs")
    assert {"one-ran", "two-ran"} <= {path.name for path in tmp_path.iterdir()}


def test_without_a_place_to_remember_trust_the_flag_suffices(tmp_path, state):
    state.write_text("a file")
    load_imports([write(tmp_path / "mine.py").name])
    assert (tmp_path / "ran").exists()


def test_an_ablations_code_is_that_of_its_imports_too(tmp_path, monkeypatch):
    """All files of a package count, by their code, wherever they lie."""
    write(tmp_path / "package_of_mine" / "__init__.py")
    head = write(tmp_path / "package_of_mine" / "parts" / "head.py")
    write(tmp_path / "module_of_mine.py")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "train.py").touch()
    load_imports(["package_of_mine.parts", "module_of_mine", write(tmp_path / "elsewhere" / "mine.py").as_posix()])
    before = code_hashes.__wrapped__("train", tmp_path)
    files = ("mine.py", "module_of_mine.py", "package_of_mine/__init__.py", "package_of_mine/parts/head.py")
    assert set(before) == {"train.py", *(f"--imports {name}" for name in files)}
    head.write_text(f"# A comment.\n{head.read_text()}")
    assert code_hashes.__wrapped__("train", tmp_path) == before
    head.write_text("import machine.lock\n\nx = 1\n")
    changed = code_hashes.__wrapped__("train", tmp_path)
    assert {name for name in before if before[name] != changed[name]} == {"--imports package_of_mine/parts/head.py"}


@dataclass(frozen=True)
class Plain:
    """A configuration without `imports`."""

    names: list[str] = field(default_factory=list)


def test_configurations_without_imports_load_none():
    assert parse(Plain, ["--names", json.dumps(["a.py"])]) == Plain(["a.py"])


BENT = '''
from typing import Annotated

from diffusion import FlowMatching
from experiment.registry import register


@register("diffusion", "bent")
def bent(bend: Annotated[float, "(0, 1]"] = 0.5, shift: float = 2.0):
    """a flow that bends

    Args:
        bend: how far
    """
    return FlowMatching(shift=shift * bend)
'''


@pytest.fixture
def bent(tmp_path, monkeypatch):
    (tmp_path / "bent.py").write_text(BENT)
    forget(monkeypatch, "bent")
    yield ["--imports", "bent.py", "--diffusion.kind", "bent"]
    DIFFUSIONS.pop("bent", None)
    open_section(DiffusionConfig, DIFFUSIONS)


def test_settings_of_a_registered_diffusion_become_flags(bent, tmp_path, capsys):
    config = parse(ExperimentConfig, [*bent, "--diffusion.bend", "0.25"])
    assert build_diffusion(config.diffusion).path.shift == 0.5
    assert "    bend: [bent; default 0.5] how far" in DiffusionConfig.__doc__
    assert "'bent' (a flow that bends)" in DiffusionConfig.__doc__
    assert from_dict(ExperimentConfig, config.to_dict()) == config
    (tmp_path / "run.yaml").write_text("imports: [bent.py]\ndiffusion: {kind: bent, bend: 0.75}\n")
    assert parse(ExperimentConfig, ["--config", "run.yaml"]).diffusion.bend == 0.75
    with pytest.raises(ValueError, match=r"--diffusion.bend 2.0: must lie in \(0, 1\]"):
        parse(ExperimentConfig, [*bent, "--diffusion.bend", "2"])
    with pytest.raises(ValueError, match=r"--diffusion.bend belongs to kind bent, not to flow; leave it out or null"):
        build_diffusion(parse(ExperimentConfig, [*bent[:-1], "flow", "--diffusion.bend", "1"]).diffusion)
    with pytest.raises(ValueError, match=r"--diffusion.path belongs to kind flow, not to bent"):
        build_diffusion(DiffusionConfig(kind="bent", path="linear"))
    with pytest.raises(SystemExit):
        parse(ExperimentConfig, ["--diffusion.bent", "1"])
    assert "did you mean --diffusion.bend?" in capsys.readouterr().err


def test_a_checkpoint_is_opened_with_the_settings_that_its_imports_bring(bent, tmp_path, monkeypatch):
    config = parse(ExperimentConfig, [*bent, "--diffusion.bend", "0.25"])
    spec = ModelSpec("DiT", {"dim": 16, "depth": 2, "num_heads": 2}, (4, 4), 4, 4, 0)
    save_tensors({"x": torch.zeros(1)}, tmp_path / "ema.safetensors", make_metadata(config, 1, spec=spec, classes=[]))
    DIFFUSIONS.pop("bent")  # another program, later
    open_section(DiffusionConfig, DIFFUSIONS)
    forget(monkeypatch, "bent")
    assert open_checkpoint(tmp_path).config == config


def test_a_checkpoint_does_not_run_by_what_has_become_of_its_code(tmp_path, monkeypatch):
    """Neither an edited file runs, nor another file of that name in the folder, but the one that is given."""
    config = parse(ExperimentConfig, ["--imports", write(tmp_path / "mine.py").name])
    spec = ModelSpec("DiT", {"dim": 16, "depth": 2, "num_heads": 2}, (4, 4), 4, 4, 0)
    checkpoint = tmp_path / "runs" / "x" / "checkpoints" / "00000001"
    checkpoint.mkdir(parents=True)
    (tmp_path / "runs" / "x" / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    save_tensors({"x": torch.zeros(1)}, checkpoint / "ema.safetensors", make_metadata(config, 1, spec=spec, classes=[]))
    ways = (partial(open_checkpoint, checkpoint), partial(resume_config, config, checkpoint, print))
    for way in ways:
        forget(monkeypatch, "mine")
        way()
    write(tmp_path / "mine.py", mark="another")
    load_imports(["mine.py"])  # for another training
    for way in ways:
        forget(monkeypatch, "mine")
        with pytest.raises(ValueError, match=r"--imports mine.py: \S+ was made with other code of that name; give"):
            way()
    load_imports(["mine.py"])
    for way in ways:
        way()


def test_what_a_file_of_imports_imports_itself_counts_as_its_code(tmp_path, monkeypatch):
    """Except for installed packages, Python's own modules and this repository's."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text("import json\n\nimport users_first\n")
    (tmp_path / "users_first.py").write_text("import torch\n\nimport models\nfrom users_second import x\n")
    (tmp_path / "users_second.py").write_text("import machine.lock\n\nx = 1\n")
    load_imports(["mine.py"])
    contents = imports.contents_of(["mine.py"])
    assert {"mine.py", "users_first.py", "users_second.py"} <= imports.imported_files().keys()
    assert not any(name.startswith(("json", "torch", "models", "machine")) for name in imports.imported_files())
    monkeypatch.setattr(imports, "_given", set())  # another program, later
    load_imports(["mine.py"], stored_in="theirs", contents=contents)
    (tmp_path / "users_second.py").write_text("x = 2\n")
    with pytest.raises(ValueError, match=r"--imports mine.py: theirs was made with other code of that name"):
        load_imports(["mine.py"], stored_in="theirs", contents=contents)


def test_older_configurations_with_nulls_for_other_kinds_are_read():
    nulls = dict.fromkeys([each.name for each in fields(DiffusionConfig)])
    old = ExperimentConfig().to_dict() | {"diffusion": {**nulls, "kind": "flow", "shift": 3.0}}
    assert from_dict(ExperimentConfig, old).diffusion == DiffusionConfig(kind="flow", shift=3.0)
    assert from_dict(ExperimentConfig, old).to_dict()["diffusion"] == {"kind": "flow", "shift": 3.0}
