"""Identity of an ablation's results: a hash of the configuration and a hash of the code that made them."""

import ast
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from checkpoints.checkpoint import find_weights, read_metadata
from experiment.config import ExperimentConfig
from experiment.imports import imported_files
from experiment.mappings import flatten
from machine.atomic_files import sha256_of, write_atomic
from machine.checkpoint_folder import CheckpointError

ROOT = Path(__file__).parents[1]
PROGRAMS = {"train": "train.py", "score": "evaluate.py", "draw": "sample.py"}
# Settings that may name files or checkpoints.
FILE_SETTINGS = {"extractor", "weights_path", "network", "heads", "guidance_checkpoint", "init_from", "spacing"}
NO_EFFECT_ON_SCORES = ("evaluation/autoencoder_scores.py",)  # imported by evaluate.py, but not to score samples
NO_EFFECT_ON_WEIGHTS = (  # imported by train.py, but only to observe the training
    "experiment/cli.py",
    "evaluation/",
    "metrics/scores.py",
    *(f"training/{name}.py" for name in ("curves", "inspection", "interruption", "log", "meter")),
)


def stage_keys(config: ExperimentConfig, scoring: object, pictures: object) -> dict[str, str]:
    """Return a key `<hash of configuration>-<hash of code>` per stage; runs of one training share its key."""
    values, defaults = _drop_irrelevant(config.to_dict()), _drop_irrelevant(ExperimentConfig().to_dict())
    differences = _differences(_add_file_hashes(values), defaults)
    after_training = {name: differences.pop(name, {}) for name in ("sampling", "evaluation")}
    settings = {
        "train": differences,
        "score": {**differences, **after_training, "scoring": scoring},
        "draw": {**differences, "sampling": after_training["sampling"], "pictures": pictures},
    }
    texts = {stage: json.dumps(values, sort_keys=True, default=str) for stage, values in settings.items()}
    return {stage: f"{_hash(text)[:32]}-{code_hash(stage)}" for stage, text in texts.items()}


def accept_other_code(keys: dict[str, str], stored: dict[str, str], begun: Sequence[str]) -> dict[str, str]:
    """Replace each key by that of an existing result with the same configuration, whatever code made it. `stored` are
    the keys in the run's folder; `begun` those of the trainings begun in the folders of all runs, since runs may share
    one."""

    def accept(stage: str, key: str) -> str:
        existing = [stored.get(stage, ""), *([stored.get("began", ""), *begun] if stage == "train" else [])]
        return next((other for other in existing if other.partition("-")[0] == key.partition("-")[0]), key)

    return {stage: accept(stage, key) for stage, key in keys.items()}


# Results in a run's folder.


def done_stages(folder: Path) -> dict[str, str]:
    """Read `stages.json` of a run's folder. It holds the keys of the finished stages (`train`, `score`, `draw`), the
    key of the training that has begun (`began`), and the SHA-256 of `scores.json` (`scores`)."""
    return _read_json(folder / "stages.json")


def is_scored(folder: Path, key: str) -> bool:
    """Whether the folder's scores are those of the stage with this key. The file is compared by content because
    `evaluate.py`, run by hand, writes to the same place."""
    stored, path = done_stages(folder), folder / "scores.json"
    is_unchanged = "scores" not in stored or (path.is_file() and sha256_of(path) == stored["scores"])
    return stored.get("score") == key and is_unchanged


def mark_done(folder: Path, **keys: str) -> None:
    """Add keys to `stages.json`; when a training begins, also write the hashes of its code to `code.json`."""
    if "score" in keys and (folder / "scores.json").is_file():
        keys["scores"] = sha256_of(folder / "scores.json")
    write_atomic(folder / "stages.json", json.dumps({**done_stages(folder), **keys}, indent=2) + "\n")
    if keys.get("began", "").endswith(code_hash("train")):
        write_atomic(folder / "code.json", json.dumps({"began": code_hashes("train")}, indent=1) + "\n")


def find_changes(folder: Path, key: str, config: ExperimentConfig) -> list[str]:
    """List the settings, or else the files of code, by which a training in the folder differs from the planned one."""
    stored = done_stages(folder).get("began")
    if stored in (None, key):
        return []
    if stored.partition("-")[0] != key.partition("-")[0]:
        path = folder / "variant.yaml"
        values = yaml.safe_load(path.read_text()) if path.is_file() else {}
        return changed_settings(values, config.to_dict()) or ["settings of the ablation"]
    before, now = _read_json(folder / "code.json").get("began", {}), code_hashes("train")
    return sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name))


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


# Configurations.


def changed_settings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """List the dotted names of settings that differ between two configurations and may change a result."""
    old, new = flatten(_drop_irrelevant(before)), flatten(_drop_irrelevant(now))
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def _differences(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Keep the values that differ from the defaults, so that adding a setting to the configuration changes no key."""
    differences = {}
    for name, value in values.items():
        default = defaults.get(name)
        if isinstance(value, dict) and isinstance(default, dict) and default:
            value = _differences(value, default)
        if value != default and value != {}:
            differences[name] = value
    return differences


def _add_file_hashes(values: Any) -> Any:
    """Add the hashes of the files and weights that settings name, as a file may be replaced by another."""
    if isinstance(values, list):
        return [_add_file_hashes(value) for value in values]
    if not isinstance(values, dict):
        return values
    paths = {name: value for name, value in values.items() if name in FILE_SETTINGS and isinstance(value, str)}
    hashes = {f"{name} by content": content for name, path in paths.items() if (content := _content_hash(path))}
    return {name: _add_file_hashes(value) for name, value in values.items()} | hashes


def _content_hash(path: str) -> str | None:
    """SHA-256 of a file, or of a checkpoint's averaged weights; None where the setting is neither, such as a name."""
    if Path(path).is_file():
        return sha256_of(Path(path))
    with suppress(CheckpointError, OSError):
        return read_metadata(find_weights(path)).get("weights_sha256")
    return None


def _drop_irrelevant(values: dict[str, Any]) -> dict[str, Any]:
    """Drop the settings of a configuration that cannot change a result."""
    ignored = {"name", "resume", "imports"}  # the files that `imports` names are hashed as code
    values = {name: value for name, value in values.items() if name not in ignored}
    for group, name in (("train", "max_hours"), ("data", "cache")):
        values[group] = {key: value for key, value in values.get(group, {}).items() if key != name}
    return {**values, "log": values.get("log", {}).get("best")}


# Code.


def code_hash(stage: str, *, afresh: bool = False) -> str:
    """Hash of a stage's code, as it was at the first call in this process; `afresh`: as it is now."""
    return _hash(json.dumps(code_hashes.__wrapped__(stage) if afresh else code_hashes(stage)))[:32]


@cache
def code_hashes(stage: str, root: Path = ROOT) -> dict[str, str]:
    """Hash each file that the training, this stage and `--imports` import, by its syntax without docstrings."""
    files = _imported(PROGRAMS["train"], root, NO_EFFECT_ON_WEIGHTS)
    files |= _imported(PROGRAMS[stage], root, NO_EFFECT_ON_WEIGHTS if stage == "train" else NO_EFFECT_ON_SCORES)
    paths = {name: root / name for name in files} | {f"--imports {name}": f for name, f in imported_files().items()}
    return {name: _read(path.read_text())[1] for name, path in sorted(paths.items())}


def code_hashes_of_command(words: Sequence[str]) -> dict[str, str]:
    """Hash the code and the YAML files of a command, given as words with absolute paths. Covers the programs of this
    repository that the command names, the programs that those may start, and the configurations that it names."""
    paths = {Path(word).resolve() for word in words if Path(word).is_absolute() and Path(word).is_file()}
    inside = sorted(path.relative_to(ROOT).as_posix() for path in paths if path.is_relative_to(ROOT))
    programs = [name for name in inside if name.endswith(".py")]
    files = {file for name in [*programs, *(programs and PROGRAMS.values())] for file in _imported(name, ROOT, ())}
    hashes = {name: _read((ROOT / name).read_text())[1] for name in sorted(files)}
    return hashes | {name: sha256_of(ROOT / name) for name in inside if name.endswith(".yaml")}


def _imported(program: str, root: Path, ignored: tuple[str, ...]) -> set[str]:
    """Collect a program and the project's files that it imports, directly or not; paths in `ignored` are skipped."""
    files: set[str] = set()
    waiting = [program]
    while waiting:
        name = waiting.pop()
        if name in files or name.startswith(ignored) or not (root / name).is_file():
            continue
        files.add(name)
        for module in _read((root / name).read_text())[0]:
            parts = module.split(".")
            packages = ["/".join(parts[:length]) for length in range(1, len(parts) + 1)]  # importing a.b runs a, too
            waiting += [*(f"{package}/__init__.py" for package in packages), f"{packages[-1]}.py"]
    return files


@cache
def _read(source: str) -> tuple[list[str], str]:
    """Return the modules that a file imports, and the hash of its syntax without docstrings."""
    tree = ast.parse(source)
    modules = list(_modules(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:]
    return modules, _hash(ast.dump(tree))[:12]


def _modules(node: ast.AST) -> Iterator[str]:
    """Yield the modules imported below a node, also by `import_module` and as "module:function", but not under `if
    TYPE_CHECKING`."""
    if isinstance(node, ast.If) and any(_name(part) == "TYPE_CHECKING" for part in ast.walk(node.test)):
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom) and node.module:
        yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
    if isinstance(node, ast.Call) and _name(node.func) == "import_module":
        yield from (str(name.value) for name in node.args if isinstance(name, ast.Constant))
    if isinstance(node, ast.Constant) and (place := re.fullmatch(r"([\w.]+):\w+", str(node.value))):
        yield place[1]
    for child in ast.iter_child_nodes(node):
        yield from _modules(child)


def _name(node: ast.AST) -> str:
    """Last part of a dotted name: `c` of `a.b.c`."""
    return getattr(node, "attr", getattr(node, "id", ""))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
