"""What a result is a result of: a hash of the configuration, and one of the code that made it."""

from __future__ import annotations

import ast
import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from experiment.config import ExperimentConfig

ROOT = Path(__file__).parents[2]
_EXPERIMENT = [f"experiment/{name}.py" for name in ("batches", "build", "config", "ema", "guard", "sharding")]
TRAINING_CODE = ("models", "diffusion", "data", *_EXPERIMENT, "train.py")
SAMPLING_CODE = (*TRAINING_CODE, "experiment/generation.py", "experiment/autoguidance.py")
SCORING_CODE = (*SAMPLING_CODE, "metrics", "experiment/evaluation.py", "experiment/sources.py", "evaluate.py")
PICTURES_CODE = (*SAMPLING_CODE, "sample.py")


def keys_of(config: ExperimentConfig, scoring: object, pictures: object) -> dict[str, str]:
    """A key for each stage, `configuration-code`: runs that differ in how they sample or score share the training's."""
    own, usual = config.to_dict(), ExperimentConfig().to_dict()
    for values in (own, usual):  # what changes no weight
        for name in ("name", "resume"):
            del values[name]
        del values["train"]["max_hours"], values["data"]["cache"]
        values["log"] = values["log"]["best"]
    differences = _differences(own, usual)
    sampled = {name: differences.pop(name, {}) for name in ("sampling", "evaluation")}
    return {
        "train": _key(TRAINING_CODE, differences),
        "score": _key(SCORING_CODE, {**differences, **sampled, "scoring": scoring}),
        "draw": _key(PICTURES_CODE, {**differences, "sampling": sampled["sampling"], "pictures": pictures}),
    }


def of_any_code(keys: dict[str, str], found: dict[str, str]) -> dict[str, str]:
    """The keys, with those of results that are there in the place of those that differ by the code alone."""

    def adopt(name: str, key: str) -> str:
        known = found.get(name) or (found.get("began") if name == "train" else None) or ""
        return known if known.partition("-")[0] == key.partition("-")[0] else key

    return {name: adopt(name, key) for name, key in keys.items()}


@lru_cache
def code_hash(places: tuple[str, ...], root: Path = ROOT) -> str:
    """Of Python files and folders, by their syntax: comments, docstrings and layout do not count."""
    digest = hashlib.sha256()
    for place in places:
        for path in [root / place] if place.endswith(".py") else sorted((root / place).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(_syntax(path.read_text()).encode())
    return digest.hexdigest()


def _key(code: tuple[str, ...], values: dict[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, default=str)
    return f"{hashlib.sha256(text.encode()).hexdigest()[:32]}-{code_hash(code)[:32]}"


def _differences(values: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    """What is not as usual, so that a setting that is new to the configuration changes no key."""
    found = {}
    for name, value in values.items():
        known = usual.get(name)
        if isinstance(value, dict) and isinstance(known, dict) and known:
            value = _differences(value, known)
        if value != known and value != {}:
            found[name] = value
    return found


def _syntax(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:]
    return ast.dump(tree)
