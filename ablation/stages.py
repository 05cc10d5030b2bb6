"""A run is three commands, as a user would type them: train.py, evaluate.py, sample.py. What each has left is marked in
`stages.json` with the hash of what it is a result of.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ablation.identity import changed_files, changed_settings, code_hash, code_of
from ablation.study import AblationConfig, ScoringConfig
from experiment.config import ExperimentConfig
from experiment.diffusions import build_diffusion
from machine.whole_files import write_whole
from sampling.checks import resolve_sampling

if TYPE_CHECKING:
    from ablation.plan import Planned

FRECHET_ONLY = {"fid", "sfid"}  # for these alone, features are not kept


def done_stages(folder: Path) -> dict[str, str]:
    """Hashes of what a run's folder holds: `train`, `score`, `draw`, and `began` of the training in it."""
    path = folder / "stages.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def mark(folder: Path, **keys: str) -> None:
    """Add to them, and to `code.json` the hashes of the files that each was made with."""
    write_whole(folder / "stages.json", json.dumps({**done_stages(folder), **keys}, indent=2) + "\n")
    made = {name: STAGE_OF.get(name, name) for name in keys}
    code = {name: code_of(stage) for name, stage in made.items() if keys[name].endswith(code_hash(stage))}
    write_whole(folder / "code.json", json.dumps({**_code(folder), **code}, indent=1) + "\n")


def changes(folder: Path, name: str, key: str, config: ExperimentConfig) -> list[str]:
    """Files or settings that what the folder holds of a stage (or `began`) differs by from the plan's."""
    stored = done_stages(folder).get(name)
    if stored in (None, key):
        return []
    before = folder / "variant.yaml"
    if stored.partition("-")[0] != key.partition("-")[0]:
        values = yaml.safe_load(before.read_text()) if before.is_file() else {}
        return changed_settings(values, config.to_dict()) or ["settings of the ablation"]
    return changed_files(STAGE_OF.get(name, name), _code(folder).get(name, {}))


STAGE_OF = {"began": "train"}


def _code(folder: Path) -> dict[str, dict[str, str]]:
    path = folder / "code.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def train(planned: Planned, ablation: AblationConfig) -> list[str]:
    """Starts, or goes on where it was."""
    return ["train.py", "--config", str(planned.run.folder / "variant.yaml"), "--resume", "auto"]


def score(planned: Planned, ablation: AblationConfig) -> list[str]:
    """Scores of the averaged weights' samples."""
    config, folder = planned.run.config, planned.run.folder
    flags = {"samples": planned.trained_in, "output": folder / "scores.json", "precision": config.train.precision}
    flags |= {name: value for name, value in asdict(config.evaluation).items() if value is not None}
    flags |= {"num_samples": planned.num_samples, "sampling": _sampling(planned)}
    flags |= scoring_flags(config, ablation.scoring, planned.spec.num_classes, baselines=planned.first)
    return ["evaluate.py", *_as_flags(flags)]


def scoring_flags(
    config: ExperimentConfig, scoring: ScoringConfig, num_classes: int, *, baselines: bool
) -> dict[str, Any]:
    """Of evaluate.py: distances within classes where there are classes and features."""
    per_class = scoring.per_class and num_classes > 0 and not set(config.evaluation.metrics) <= FRECHET_ONLY
    return {"trials": scoring.trials, "baselines": scoring.baselines and baselines, "per_class": per_class}


def draw(planned: Planned, ablation: AblationConfig) -> list[str]:
    """Pictures of chosen classes, from noise that all variants share."""
    config, pictures = planned.run.config, ablation.pictures
    flags = {"checkpoint": planned.trained_in, "output": planned.run.folder / "pictures.npz", "seed": pictures.seed}
    flags |= {"num_per_class": pictures.num_per_class, "precision": config.train.precision}
    flags |= {"sampling": _sampling(planned)}
    flags |= {"classes": pictured(pictures.classes, planned.classes)} if planned.classes else {}
    return ["sample.py", *_as_flags(flags)]


def pictured(asked: list[str], classes: Sequence[str]) -> list[str]:
    """The classes in the pictures."""
    return list(asked or classes[:8])


def _sampling(planned: Planned) -> str:
    """All of it, what is null too: the training's own may be another by now."""
    config = planned.run.config
    num_guided = config.guided_classes(planned.spec.num_classes)
    sampling = resolve_sampling(config.sampling, build_diffusion(config.diffusion), num_guided)
    return yaml.safe_dump(asdict(sampling), default_flow_style=True, width=math.inf).strip()


def _as_flags(values: dict[str, Any]) -> list[str]:
    """`--name value`; lists and mappings as JSON, which is YAML."""
    words = []
    for name, value in values.items():
        text = str(value) if isinstance(value, str | Path) else json.dumps(value)
        words += [f"--{name}", text]
    return words


STAGES = {"train": train, "score": score, "draw": draw}
