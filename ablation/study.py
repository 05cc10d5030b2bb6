"""What an ablation's YAML may say, and the runs that it makes. Nothing heavy is imported here."""

import re
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import yaml

from experiment.cli import parse_mapping
from experiment.config import ExperimentConfig
from experiment.mappings import StrictLoader
from settings import SEEDS, within

ROOT = Path(__file__).parents[1]


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
        baseline: name of the variant that the others are tested against; by default the first
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


@dataclass(frozen=True)
class Run:
    """A variant under one seed."""

    variant: str
    seed: int
    config: ExperimentConfig
    point: dict[str, Any]  # its variant in the YAML and its values in the grid, by their keys

    def is_of(self, name: str | None) -> bool:
        """Whether a name, of the variant or, where a grid has made several of it, of the YAML's variant, means it."""
        return name in (self.variant, self.point["variant"])

    @property
    def folder(self) -> Path:
        """Of the run: checkpoints where it trains, scores and pictures in any case."""
        return self.config.folder

    @property
    def name(self) -> str:
        return f"{self.variant}, seed {self.seed}"


def read_ablation(path: Path, overrides: dict[str, Any]) -> AblationConfig:
    """An ablation's YAML, with more settings for all variants. Raises ValueError for what does not fit."""
    try:
        config = parse_mapping(AblationConfig, _read_yaml(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from error
    return replace(config, set={**config.set, **overrides})


def expand(ablation: AblationConfig, name: str) -> list[Run]:
    """Every variant under every seed, in `runs/<name>/<variant>/seed<n>`. A ValueError names what is wrong with one."""
    base = merged(_read_base(ablation.base), ablation.set)
    axes = {key: values for key, values in ablation.grid.items() if key != "seed"}
    seeds = ablation.grid.get("seed") or [base.get("train", {}).get("seed", 0)]

    runs: dict[Path, Run] = {}
    for (variant, settings), values in product((ablation.variants or {"": {}}).items(), product(*axes.values())):
        point = dict(zip(axes, values, strict=True))
        title = " ".join(filter(None, [variant, *(_word(key, value) for key, value in point.items())]))
        if (own := merged({}, {**settings, **point}).get("train", {})) and "seed" in own:
            raise ValueError(f"variant {title}: train.seed: every variant has the same; name them in grid: seed")
        if not title:
            raise ValueError("variants and grid are empty: there is nothing to compare")
        folder = re.sub(r"[^\w.=+-]+", "-", title).strip("-.")
        for seed in seeds:
            identity = {"name": f"{name}/{folder}/seed{seed}", "train.seed": seed}
            try:
                config = parse_mapping(ExperimentConfig, merged(base, {**settings, **point, **identity}))
            except ValueError as error:
                raise ValueError(f"variant {title}: {error}") from error
            run = Run(title, seed, config, {"variant": variant, **point})
            if run.folder in runs:
                raise ValueError(f"variants {runs[run.folder].name} and {run.name} are of one name; rename one")
            runs[run.folder] = run
    for flag, asked in (("baseline", ablation.baseline), ("match.to", ablation.match and ablation.match.to)):
        if asked is not None and not any(run.is_of(asked) for run in runs.values()):
            names = dict.fromkeys(run.variant for run in runs.values())
            raise ValueError(f"{flag} {asked}: no such variant; there are {', '.join(names)}")
    return list(runs.values())


def pictured(asked: list[str], classes: list[str]) -> list[str]:
    return list(asked or classes[:8])


def merged(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings with others on top; keys of the latter may be dotted."""
    result = dict(values)
    for key, value in overrides.items():
        first, _, rest = str(key).partition(".")
        value = {rest: value} if rest else value
        below = result.get(first)
        result[first] = merged(below if isinstance(below, dict) else {}, value) if isinstance(value, dict) else value
    return result


def _word(key: str, value: Any) -> str:
    return str(value) if key == "model" else f"{key.rpartition('.')[-1]}={value}"


def _read_base(base: str | dict[str, Any]) -> dict[str, Any]:
    """A mapping, or a YAML file of one, from here or from the project's root."""
    if not isinstance(base, str):
        return base
    path = Path(base) if Path(base).is_file() else ROOT / base
    if not path.is_file():
        raise ValueError(f"base {base}: no such file")
    return _read_yaml(path)


def _read_yaml(path: Path) -> dict[str, Any]:
    """A mapping, in which nothing is named twice."""
    try:
        values = yaml.load(path.read_text(), StrictLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a YAML mapping")
    return values
