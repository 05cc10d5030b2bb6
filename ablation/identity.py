"""What a result is a result of: a hash of the configuration, and one of the code that made it."""

import ast
import hashlib
import json
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
from machine.checkpoint_folder import CheckpointError
from machine.whole_files import sha256_of, write_whole

ROOT = Path(__file__).parents[1]
PROGRAMS = {"train": "train.py", "score": "evaluate.py", "draw": "sample.py"}
ELSEWHERE = ("ablation/", "autoencoding/")  # what evaluate.py does besides, and this package
NAMING = {"extractor", "weights_path", "network", "heads", "guidance_checkpoint", "init_from"}
NAMING |= {"spacing"}  # settings that may name files or checkpoints
ONLOOKERS = (  # of a training: they change no weight
    "experiment/cli.py",
    "evaluation/",
    *(f"training/{name}.py" for name in ("inspection", "interruption", "log", "meter")),
)


def keys_of(config: ExperimentConfig, scoring: object, pictures: object) -> dict[str, str]:
    """A key for each stage, `configuration-code`: runs that differ in how they sample or score share the training's."""
    differences = _differences(_with_contents(_of_results(config.to_dict())), _of_results(ExperimentConfig().to_dict()))
    sampled = {name: differences.pop(name, {}) for name in ("sampling", "evaluation")}
    settings = {
        "train": differences,
        "score": {**differences, **sampled, "scoring": scoring},
        "draw": {**differences, "sampling": sampled["sampling"], "pictures": pictures},
    }
    texts = {stage: json.dumps(values, sort_keys=True, default=str) for stage, values in settings.items()}
    return {stage: f"{_hash(text)[:32]}-{code_hash(stage)}" for stage, text in texts.items()}


def of_any_code(keys: dict[str, str], stored: dict[str, str], begun: Sequence[str]) -> dict[str, str]:
    """The keys, with those of results that are there, of trainings those that were `begun` in any run's folder, in the
    place of those that differ by the code alone."""

    def adopt(name: str, key: str) -> str:
        known = [stored.get(name, ""), *([stored.get("began", ""), *begun] if name == "train" else [])]
        return next((other for other in known if other.partition("-")[0] == key.partition("-")[0]), key)

    return {name: adopt(name, key) for name, key in keys.items()}


# What a run's folder holds.


def done_stages(folder: Path) -> dict[str, str]:
    """Keys of what a run's folder holds: `train`, `score`, `draw`; `began` of the training; `scores`, by content."""
    return _read_json(folder / "stages.json")


def is_scored(folder: Path, key: str) -> bool:
    """Whether the scores there are those of the stage with this key: `evaluate.py` by hand writes to the same place."""
    stored, path = done_stages(folder), folder / "scores.json"
    as_written = "scores" not in stored or (path.is_file() and sha256_of(path) == stored["scores"])
    return stored.get("score") == key and as_written


def mark(folder: Path, **keys: str) -> None:
    """Add to them; and to `code.json`, of a training that begins, the hashes of the files that it is made with."""
    if "score" in keys and (folder / "scores.json").is_file():
        keys["scores"] = sha256_of(folder / "scores.json")
    write_whole(folder / "stages.json", json.dumps({**done_stages(folder), **keys}, indent=2) + "\n")
    if keys.get("began", "").endswith(code_hash("train")):
        write_whole(folder / "code.json", json.dumps({"began": code_of("train")}, indent=1) + "\n")


def changes(folder: Path, key: str, config: ExperimentConfig) -> list[str]:
    """Files or settings that the training in the folder, if there is one, differs by from the plan's."""
    stored = done_stages(folder).get("began")
    if stored in (None, key):
        return []
    if stored.partition("-")[0] != key.partition("-")[0]:
        path = folder / "variant.yaml"
        values = yaml.safe_load(path.read_text()) if path.is_file() else {}
        return changed_settings(values, config.to_dict()) or ["settings of the ablation"]
    before, now = _read_json(folder / "code.json").get("began", {}), code_of("train")
    return sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name))


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


# Configurations.


def changed_settings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Dotted names of what differs between two configurations and may change a result."""
    old, new = flatten(_of_results(before)), flatten(_of_results(now))
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def _differences(values: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    """What is not as usual, so that a setting that is new to the configuration changes no key."""
    differences = {}
    for name, value in values.items():
        known = usual.get(name)
        if isinstance(value, dict) and isinstance(known, dict) and known:
            value = _differences(value, known)
        if value != known and value != {}:
            differences[name] = value
    return differences


def _with_contents(values: Any) -> Any:
    """With the hashes of the files and weights that settings name: others may lie there tomorrow."""
    if isinstance(values, list):
        return [_with_contents(value) for value in values]
    if not isinstance(values, dict):
        return values
    named = {name: _content(value) for name, value in values.items() if name in NAMING and isinstance(value, str)}
    contents = {f"{name} by content": content for name, content in named.items() if content}
    return {name: _with_contents(value) for name, value in values.items()} | contents


def _content(path: str) -> str | None:
    """Of a file, or of the averaged weights of a checkpoint; of what has none here, such as a name, nothing."""
    if Path(path).is_file():
        return sha256_of(Path(path))
    with suppress(CheckpointError, OSError):
        return read_metadata(find_weights(path)).get("weights_sha256")
    return None


def _of_results(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what changes no result."""
    idle = {"name", "resume", "imports"}  # whose files are code
    values = {name: value for name, value in values.items() if name not in idle}
    for group, name in (("train", "max_hours"), ("data", "cache")):
        values[group] = {key: value for key, value in values.get(group, {}).items() if key != name}
    return {**values, "log": values.get("log", {}).get("best")}


# Code.


def code_hash(stage: str, *, afresh: bool = False) -> str:
    """Of all files of a stage's code: as they were when first asked for, or `afresh` as they are."""
    return _hash(json.dumps(code_of.__wrapped__(stage) if afresh else code_of(stage)))[:32]


@cache
def code_of(stage: str, root: Path = ROOT) -> dict[str, str]:
    """Hashes of the syntax, without docstrings, of all files that the training, this stage and `--imports` import."""
    files = _imported(PROGRAMS["train"], root, ONLOOKERS)
    files |= _imported(PROGRAMS[stage], root, ONLOOKERS if stage == "train" else ELSEWHERE)
    paths = {name: root / name for name in files} | {f"--imports {name}": f for name, f in imported_files().items()}
    return {name: _read(path.read_text())[1] for name, path in sorted(paths.items())}


def code_of_command(words: Sequence[str], root: Path = ROOT) -> dict[str, str]:
    """Hashes of the code of a command that names a program of this repository, and of the programs that it may start;
    and of the configurations that it names."""
    known = {Path(word).resolve() for word in words if Path(word).is_absolute() and Path(word).is_file()}
    inside = sorted(path.relative_to(root).as_posix() for path in known if path.is_relative_to(root))
    programs = [name for name in inside if name.endswith(".py")]
    files = {file for name in [*programs, *(programs and PROGRAMS.values())] for file in _imported(name, root, ())}
    hashes = {name: _read((root / name).read_text())[1] for name in sorted(files)}
    return hashes | {name: sha256_of(root / name) for name in inside if name.endswith(".yaml")}


def _imported(program: str, root: Path, without: tuple[str, ...]) -> set[str]:
    """The program and the project's files that it imports, those that they import, and so on; not through `without`."""
    files: set[str] = set()
    waiting = [program]
    while waiting:
        name = waiting.pop()
        if name in files or name.startswith(without) or not (root / name).is_file():
            continue
        files.add(name)
        for module in _read((root / name).read_text())[0]:
            parts = module.split(".")
            places = ["/".join(parts[:length]) for length in range(1, len(parts) + 1)]  # packages are run on the way
            waiting += [*(f"{place}/__init__.py" for place in places), f"{places[-1]}.py"]
    return files


@cache
def _read(source: str) -> tuple[list[str], str]:
    """What a file imports, and the hash of its syntax without docstrings."""
    tree = ast.parse(source)
    modules = list(_modules(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:]
    return modules, _hash(ast.dump(tree))[:12]


def _modules(node: ast.AST) -> Iterator[str]:
    """What is imported below, by `import_module` too; of `from a import b` both, as b may be a module. Not what is
    there for types alone."""
    if isinstance(node, ast.If) and any(_name(part) == "TYPE_CHECKING" for part in ast.walk(node.test)):
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom) and node.module:
        yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
    if isinstance(node, ast.Call) and _name(node.func) == "import_module":
        yield from (str(name.value) for name in node.args if isinstance(name, ast.Constant))
    for child in ast.iter_child_nodes(node):
        yield from _modules(child)


def _name(node: ast.AST) -> str:
    """The last of a name's words, `c` of `a.b.c`."""
    return getattr(node, "attr", getattr(node, "id", ""))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
