"""A run is three commands, as a user would type them: train.py, evaluate.py, sample.py."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ablation.plan import Planned

FRECHET_ONLY = {"fid", "sfid"}  # for these alone, features are not kept, and there is no distance within classes


def train(planned: Planned) -> list[str]:
    """Starts, or goes on where it was."""
    return ["train.py", "--config", str(planned.run.folder / "variant.yaml"), "--resume", "auto"]


def score(planned: Planned) -> list[str]:
    """Scores of the averaged weights' samples."""
    evaluation, scoring = planned.run.config.evaluation, planned.ablation.scoring
    flags = {name: value for name, value in asdict(evaluation).items() if value is not None}
    flags |= {"samples": planned.trained_in, "output": planned.run.folder / "scores.json"}
    flags |= {"num_samples": planned.num_samples, "trials": scoring.trials}
    flags |= {"baselines": scoring.baselines and planned.first}
    has_features = not set(evaluation.metrics) <= FRECHET_ONLY
    flags |= {"per_class": scoring.per_class and planned.spec.num_classes > 0 and has_features}
    return ["evaluate.py", *_as_flags(planned, flags)]


def draw(planned: Planned) -> list[str]:
    """Pictures of chosen classes, from noise that all variants share."""
    pictures = planned.ablation.pictures
    flags = {"checkpoint": planned.trained_in, "output": planned.run.folder / "pictures.npz"}
    flags |= {"seed": pictures.seed, "num_per_class": pictures.num_per_class}
    flags |= {"classes": planned.pictured} if planned.classes else {}
    return ["sample.py", *_as_flags(planned, flags)]


def _as_flags(planned: Planned, values: dict[str, Any]) -> list[str]:
    """`--name value`, lists and mappings as JSON. All of the sampling is given: the training's own may be another by
    now."""
    sampling = yaml.safe_dump(asdict(planned.sampling), default_flow_style=True, width=math.inf).strip()
    values = {**values, "precision": planned.run.config.train.precision, "sampling": sampling}
    values |= {"imports": planned.run.config.imports} if planned.run.config.imports else {}  # whose syntax counts
    words = []
    for name, value in values.items():
        words += [f"--{name}", str(value) if isinstance(value, str | Path) else json.dumps(value)]
    return words


STAGES = {"train": train, "score": score, "draw": draw}
