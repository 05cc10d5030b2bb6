"""What an ablation's YAML may say. Nothing heavy is imported here."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from experiment.cli import keep_names, parse_mapping
from experiment.settings import SEEDS, within
from experiment.strict_yaml import StrictLoader


@dataclass(frozen=True)
class MatchConfig:
    """Equal cost: the other variants' width is changed until they cost what `to` costs; depth stays, heads stay legal.

    Args:
        by: what is equal: 'flops' (of a forward pass), 'params', or 'time' (of a training step, measured here)
        to: name of the variant that stays as it is, with all values of a grid
        tolerance: largest relative difference
    """

    to: str
    by: Literal["flops", "params", "time"] = "flops"
    tolerance: float = within("(0, inf)", 0.03)


@dataclass(frozen=True)
class ScoringConfig:
    """The one scoring of all variants; what is scored and how is `evaluation` and `sampling` of their configurations.

    Args:
        trials: generation trials of each run, with seeds of their own
        baselines: score training images and reconstructions too, once
        per_class: Fréchet distances within each class that has 50 images or more
    """

    trials: int = within("[1, inf)", 1)
    baselines: bool = True
    per_class: bool = True


@dataclass(frozen=True)
class PicturesConfig:
    """Samples of the first seed of each variant, from the same noise.

    Args:
        classes: their names; by default the first eight
        num_per_class: samples of each; 0: no pictures
        seed: of the noise
    """

    classes: list[str] = field(default_factory=list)
    num_per_class: int = within("[0, inf)", 8)
    seed: int = within(SEEDS, 0)


@dataclass(frozen=True)
class AblationConfig:
    """Variants of one experiment, and what they share.

    Args:
        title: of the report
        description: a paragraph below it
        base: a configuration of train.py: a YAML file, or the mapping itself
        set: settings of all variants, with dotted keys such as train.num_steps
        variants: a name each, and the settings that it differs by
        grid: a list of values for each dotted key; every combination, of every variant, is a variant. `seed` is short
            for train.seed: runs that differ by it alone are one row, with its spread
        baseline: name of the variant that the others are tested against, of several by a grid the first; by default the
            first
        match: equal cost, if asked for
        scoring: the one scoring of all variants
        pictures: samples of each variant
        columns: of table.tex: parameters, GFLOPs, img/s, GB, or metrics such as fid; by default all that have values
    """

    base: str | dict[str, Any]
    title: str = ""
    description: str = ""
    set: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    baseline: str | None = None
    match: MatchConfig | None = None
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    pictures: PicturesConfig = field(default_factory=PicturesConfig)
    columns: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ClusterConfig:
    """What a SLURM job is given.

    Args:
        gpus: of a run
        hours: time limit; the job is requeued when it is over
        cpus_per_gpu: cores for each
        memory_gb: main memory of a run
        partition: of the cluster
    """

    gpus: int = within("[0, inf)", 1)
    hours: float = within("(0, inf)", 12.0)
    cpus_per_gpu: int = within("[1, inf)", 8)
    memory_gb: int = within("[1, inf)", 64)
    partition: str | None = None


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping from a file.

    Raises:
        ValueError: for what is no YAML mapping, or names something twice.
    """
    try:
        text = path.read_text()
        values = keep_names(yaml.load(text, StrictLoader), text)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a YAML mapping")
    return values


def read_ablation(path: Path, overrides: dict[str, Any]) -> AblationConfig:
    """An ablation's YAML, with more settings for all variants.

    Raises:
        ValueError: for unknown keys and values that do not fit.
    """
    try:
        config = parse_mapping(AblationConfig, read_yaml(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from error
    return AblationConfig(**{**config.__dict__, "set": {**config.set, **overrides}})
