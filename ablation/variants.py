"""From names and grids to whole configurations of train.py."""

import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ablation.identity import ROOT
from ablation.study import AblationConfig, read_yaml
from experiment.cli import parse_mapping
from experiment.config import ExperimentConfig


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
        """Variant and seed, to be read."""
        return f"{self.variant}, seed {self.seed}"


def expand(ablation: AblationConfig, name: str) -> list[Run]:
    """Every variant under every seed, in the order of the YAML; folders are `runs/<name>/<variant>/seed<n>`.

    Raises:
        ValueError: for an unknown key, a name or folder that two variants share, or no variant.
    """
    base = merged(_read_base(ablation.base), ablation.set)
    axes = {key: values for key, values in ablation.grid.items() if key != "seed"}
    seeds = ablation.grid.get("seed") or [base.get("train", {}).get("seed", 0)]

    runs: dict[Path, Run] = {}
    for variant, settings in (ablation.variants or {"": {}}).items():
        for values in product(*axes.values()):
            point = dict(zip(axes, values, strict=True))
            title = " ".join(filter(None, [variant, *(_word(key, value) for key, value in point.items())]))
            if not title:
                raise ValueError("variants and grid are empty: there is nothing to compare")
            for seed in seeds:
                identity = {"name": f"{name}/{_slug(title)}/seed{seed}", "train.seed": seed}
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


def _read_base(base: str | dict[str, Any]) -> dict[str, Any]:
    """A mapping, or a YAML file of one, from here or from the project's root."""
    if not isinstance(base, str):
        return base
    path = Path(base) if Path(base).is_file() else ROOT / base
    if not path.is_file():
        raise ValueError(f"base {base}: no such file")
    return read_yaml(path)


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


def _slug(title: str) -> str:
    """The title as a folder may be called."""
    return re.sub(r"[^\w.=+-]+", "-", title).strip("-.")
