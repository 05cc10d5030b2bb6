"""Configuration of an ablation, and the runs that it expands to. Imports no torch, so that `--help` is fast."""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import yaml

from experiment.cli import parse_mapping
from experiment.config import ExperimentConfig
from experiment.inputs import check_inputs
from experiment.mappings import StrictLoader
from settings import SEEDS, within

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class MatchConfig:
    """Equal cost: all other variants are widened or narrowed until they cost as much as `to` does under the same values
    of a grid; their depth stays.

    Args:
        by: the cost to make equal: 'flops' (of a forward pass), 'params', or 'time' (of a training step, measured here)
        to: name of the variant that keeps its width, under all values of a grid
        tolerance: largest relative difference in cost
    """

    to: str
    by: Literal["flops", "params", "time"] = "flops"
    tolerance: float = within("(0, inf)", 0.03)


@dataclass(frozen=True)
class ScoringConfig:
    """Scoring of all variants, beside `evaluation` and `sampling` of their configurations.

    Args:
        trials: generation trials of each run, each with another seed
        baselines: also score training images and reconstructions, once
        per_class: also compute the Fréchet distance within each class that has at least 50 images
        memorisation: also compute how often a sample is closer to the training images than a held-out image is
    """

    trials: int = within("[1, inf)", 1)
    baselines: bool = True
    per_class: bool = True
    memorisation: bool = False


@dataclass(frozen=True)
class PicturesConfig:
    """Pictures in the report: samples of the first seed of each variant, all from the same noise.

    Args:
        classes: names of classes to draw; by default the first eight
        num_per_class: samples per class; 0: no pictures
        seed: seed of the noise
    """

    classes: list[str] = field(default_factory=list)
    num_per_class: int = within("[0, inf)", 8)
    seed: int = within(SEEDS, 0)


@dataclass(frozen=True)
class AblationConfig:
    """Variants of one experiment, and the settings that they share.

    Args:
        title: title of the report
        description: paragraph below the title
        base: configuration of train.py: a YAML file, or the mapping itself
        set: settings of all variants, with dotted keys such as train.num_steps
        variants: name of each variant, and the settings in which it differs from the base
        grid: list of values for each dotted key; each combination makes a variant of every variant above. `seed` is
            short for train.seed: runs that differ only in the seed share a row, which shows their spread
        baseline: name of the variant that the others are tested against; by default the first
        claims: for each claim, in words, two variants: the one that it says is better, and the other. The report
            answers yes, no or undecided, by p-values corrected for the number of claims
        match: equal cost of all variants; null: each has the cost that it has
        scoring: scoring of all variants
        pictures: samples of each variant in the report
        columns: columns of table.tex: parameters, GFLOPs, img/s, GB, or metrics such as fid; by default all with values
    """

    base: str | dict[str, Any]
    title: str = ""
    description: str = ""
    set: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    baseline: str | None = None
    claims: dict[str, list[str]] = field(default_factory=dict)
    match: MatchConfig | None = None
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    pictures: PicturesConfig = field(default_factory=PicturesConfig)
    columns: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """A variant under one training seed."""

    variant: str
    seed: int
    config: ExperimentConfig
    point: dict[str, Any]  # the YAML's variant (`variant`), and the grid's values by their dotted keys

    def is_of(self, name: str | None) -> bool:
        """Whether `name` is that of the variant, or of the YAML's variant that a grid has made it from."""
        return name in (self.variant, self.point["variant"])

    def is_beside(self, other: "Run") -> bool:
        """Whether a grid has made this run and another from the same values."""
        return self.point == {**other.point, "variant": self.point["variant"]}

    @property
    def folder(self) -> Path:
        """Folder of the run, with its scores and pictures, and its checkpoints where it trains."""
        return self.config.folder

    @property
    def name(self) -> str:
        return f"{self.variant}, seed {self.seed}"


def read_ablation(path: Path, overrides: dict[str, Any]) -> AblationConfig:
    """Read an ablation's YAML; `overrides` are added to the settings of all variants. Raises ValueError if invalid."""
    try:
        config = parse_mapping(AblationConfig, _read_yaml(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from error
    return replace(config, set={**config.set, **overrides})


def expand_runs(ablation: AblationConfig, name: str) -> list[Run]:
    """Make the runs, every variant under every seed; raise ValueError naming a variant with invalid settings."""
    base = deep_merge(_read_base(ablation.base), ablation.set)
    axes = {key: values for key, values in ablation.grid.items() if key != "seed"}
    seeds = ablation.grid.get("seed") or [base.get("train", {}).get("seed", 0)]

    runs: dict[Path, Run] = {}
    for (variant, settings), values in product((ablation.variants or {"": {}}).items(), product(*axes.values())):
        point = dict(zip(axes, values, strict=True))
        title = " ".join(filter(None, [variant, *(_label(key, value) for key, value in point.items())]))
        if "seed" in (deep_merge({}, {**settings, **point}).get("train") or {}):
            raise ValueError(f"variant {title}: train.seed: every variant has the same; name them in grid: seed")
        if not title:
            raise ValueError("variants and grid are empty: there is nothing to compare")
        folder = re.sub(r"[^\w.=+-]+", "-", title).strip("-.")
        for seed in seeds:
            identity = {"name": f"{name}/{folder}/seed{seed}", "train.seed": seed}
            with naming_variant(title):
                config = parse_mapping(ExperimentConfig, deep_merge(base, {**settings, **point, **identity}))
            run = Run(title, seed, config, {"variant": variant, **point})
            if run.folder in runs:
                raise ValueError(f"variants {runs[run.folder].name} and {run.name} have the same name; rename one")
            runs[run.folder] = run
    _check_names(ablation, runs.values())
    return list(runs.values())


def _check_names(ablation: AblationConfig, runs: Collection[Run]) -> None:
    """Raise ValueError where baseline, match or a claim names a variant that is none."""
    names = dict.fromkeys(run.variant for run in runs)
    for key, variant in (("baseline", ablation.baseline), ("match.to", ablation.match and ablation.match.to)):
        if variant is not None and not any(run.is_of(variant) for run in runs):
            raise ValueError(f"{key} {variant}: no such variant; there are {', '.join(names)}")
    for claim, variants in ablation.claims.items():
        if len(set(variants)) != 2 or len(variants) != 2:
            raise ValueError(f"claims, {claim}: name two variants, the one claimed to be better first")
        for variant in variants:
            if variant not in names:
                raise ValueError(f"claims, {claim}: no variant {variant}; there are {', '.join(names)}")


def check_inputs_of(runs: list[Run], *, scores: bool) -> None:
    """Raise ValueError, naming the variant, if a setting names a file or folder that does not exist; those of the
    section `evaluation`, which trainings need for scores alone, only with `scores`."""
    for run in runs:
        with naming_variant(run.variant):
            check_inputs(run.config)
            if scores:
                check_inputs(run.config.evaluation, "--evaluation.")


@contextmanager
def naming_variant(name: str) -> Iterator[None]:
    """Prefix errors with the name of a variant."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"variant {name}: {error}") from error


def classes_to_draw(chosen: list[str], classes: list[str]) -> list[str]:
    """Classes to draw pictures of: the chosen ones, or else the first eight."""
    return list(chosen or classes[:8])


def deep_merge(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Merge nested mappings; `overrides` win, and their keys may be dotted."""
    result = dict(values)
    for key, value in overrides.items():
        first, _, rest = str(key).partition(".")
        value = {rest: value} if rest else value
        nested = result.get(first)
        result[first] = (
            deep_merge(nested if isinstance(nested, dict) else {}, value) if isinstance(value, dict) else value
        )
    return result


def _label(key: str, value: Any) -> str:
    """Part of a variant's name that a value of the grid adds: `lr=0.001`, and of a model its name alone."""
    return str(value) if key == "model" else f"{key.rpartition('.')[-1]}={value}"


def _read_base(base: str | dict[str, Any]) -> dict[str, Any]:
    """Return a mapping as it is, or read it from a YAML file in the working folder or else the project's root."""
    if not isinstance(base, str):
        return base
    path = Path(base) if Path(base).is_file() else ROOT / base
    if not path.is_file():
        raise ValueError(f"base {base}: no such file")
    return _read_yaml(path)


def _read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping, without duplicate keys."""
    try:
        values = yaml.load(path.read_text(), StrictLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a YAML mapping")
    return values
