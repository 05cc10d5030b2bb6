"""What the runs of an ablation left, read from their own JSON, and what it amounts to."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import numpy as np

from ablation.stages import done_stages
from evaluation.table import number
from metrics.fidelity import is_lower_better

TITLES = {
    "fid": "FID",
    "sfid": "sFID",
    "is": "IS",
    "kid": "KID",
    "frechet_distance": "Fréchet",
    "spatial_frechet_distance": "spatial Fréchet",
    "classifier_score": "classifier score",
    "kernel_distance": "kernel distance",
}


@dataclass(frozen=True)
class RunResult:
    """A run that has been scored: what was planned of it, its scores and its log."""

    plan: dict[str, Any]
    record: dict[str, Any]  # scores.json
    events: list[dict[str, Any]]  # log.jsonl

    @property
    def variant(self) -> str:
        """Name of the variant that was trained."""
        return self.plan["variant"]

    @property
    def seed(self) -> int:
        """Seed that it was trained with."""
        return self.plan["seed"]

    @property
    def folder(self) -> Path:
        """Of its scores and pictures."""
        return Path(self.plan["folder"])

    @property
    def scored_as(self) -> str:
        """What scores have to share with others to be held against one floor and one ceiling."""
        samples = self.record["samples"]
        parts = [self.record[name] for name in ("num_samples", "reference", "extractor_sha256")]
        return json.dumps([*parts, samples["labels"], samples.get("autoencoder")], sort_keys=True)

    @property
    def trials(self) -> list[dict[str, float | None]]:
        """The scores of each, by metric; distances of halves are left out."""
        trials = self.record["rows"][0]["trials"]
        return [{name: one["value"] for name, one in trial.items() if ", " not in name} for trial in trials]

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of something in the log."""
        points = [(event["step"], event[name]) for event in self.events if event.get(name) is not None]
        return [step for step, _ in points], [value for _, value in points]


@dataclass(frozen=True)
class VariantResult:
    """All runs of a variant."""

    name: str
    runs: list[RunResult]

    @property
    def parameters(self) -> int:
        """Number of the backbone's parameters, counted."""
        return self.runs[0].plan["parameters"]

    @property
    def gflops(self) -> float:
        """Of a forward pass on an image, counted."""
        return self.runs[0].plan["gflops"]

    @property
    def images_per_second(self) -> float | None:
        """Of training, the median of the log."""
        return self._logged("images_per_second", median)

    @property
    def memory_gb(self) -> float | None:
        """Of training, the most of the log."""
        return self._logged("memory_gb", max)

    def _logged(self, name: str, summary: Any) -> float | None:
        values = [value for run in self.runs for value in run.series(name)[1]]
        return summary(values) if values else None

    def values(self, metric: str) -> list[float]:
        """Of every trial of every seed."""
        found = [trial.get(metric) for run in self.runs for trial in run.trials]
        return [value for value in found if value is not None]

    def by_seed(self, metric: str) -> dict[int, float]:
        """The mean over trials, for each seed."""
        found = {
            run.seed: [v for v in (trial.get(metric) for trial in run.trials) if v is not None] for run in self.runs
        }
        return {seed: fmean(values) for seed, values in found.items() if values}


@dataclass(frozen=True)
class Results:
    """What an ablation's finished runs have measured."""

    folder: Path
    plan: dict[str, Any]
    variants: list[VariantResult]
    missing: list[str]

    @property
    def title(self) -> str:
        """The heading of the ablation's report."""
        return self.plan["ablation"]["title"] or self.folder.name

    @property
    def runs(self) -> list[RunResult]:
        """The finished runs of all variants."""
        return [run for variant in self.variants for run in variant.runs]

    @property
    def baseline(self) -> VariantResult:
        """What the others are tested against."""
        asked = self.plan["ablation"]["baseline"]
        return next((variant for variant in self.variants if variant.name == asked), self.variants[0])

    @cached_property
    def metrics(self) -> list[str]:
        """Those that some run has a value of, in the order of the scores."""
        names = [name for run in self.runs for trial in run.trials for name in trial]
        return [name for name in dict.fromkeys(names) if any(variant.values(name) for variant in self.variants)]

    def is_best(self, variant: VariantResult, metric: str) -> bool:
        """Whether this variant's mean is better than every other's, as they are shown: a tie has no best."""
        means = {each.name: fmean(each.values(metric)) for each in self.variants if each.values(metric)}
        best = (min if is_lower_better(metric) else max)(means.values())
        tied = [name for name, mean in means.items() if number(mean) == number(best)]
        return tied == [variant.name] and len(means) > 1

    def p_value(self, variant: VariantResult, metric: str) -> float | None:
        """Of the difference to the baseline, paired over the seeds that both have; None for fewer than two."""
        mine, theirs = variant.by_seed(metric), self.baseline.by_seed(metric)
        seeds = sorted(mine.keys() & theirs.keys())
        if variant is self.baseline or len(seeds) < 2:
            return None
        return paired_p([mine[seed] - theirs[seed] for seed in seeds])

    @property
    def references(self) -> dict[str, dict[str, Any]]:
        """The scores of training images (the floor) and of reconstructions (the ceiling), where a run has them, by what
        they are, and of which variant where not all are scored alike."""
        alike = len({run.scored_as for run in self.runs}) == 1
        rows = {row["name"]: (row["scores"], run.variant) for run in self.runs for row in run.record["rows"][1:]}
        return {
            f"{name} ({what}{'' if alike else f' of {rows[name][1]}'})": rows[name][0]
            for name, what in (("training images", "floor"), ("reconstructions", "ceiling"))
            if name in rows
        }


def read_results(folder: Path) -> Results:
    """From `plan.json` and the runs' own files.

    Raises:
        ValueError: where no run has been scored.
    """
    path = folder / "plan.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no ablation: there is no {path}")
    plan = json.loads(path.read_text())
    found: dict[str, list[RunResult]] = {}
    missing = []
    for one in plan["runs"]:
        scores = Path(one["folder"]) / "scores.json"
        if done_stages(Path(one["folder"])).get("score") != one["keys"]["score"] or not scores.is_file():
            missing.append(f"{one['variant']}, seed {one['seed']}")
            continue
        log = (Path(one["trained_in"]) / "log.jsonl").read_text().splitlines()
        run = RunResult(one, json.loads(scores.read_text()), [json.loads(line) for line in log])
        found.setdefault(one["variant"], []).append(run)
    if not found:
        raise ValueError(f"{folder}: no run is finished, there is nothing to report yet ({len(missing)} to go)")
    return Results(folder, plan, [VariantResult(name, runs) for name, runs in found.items()], missing)


def title_of(metric: str) -> str:
    """For the head of a column."""
    name = metric.partition("[")[0]
    return f"{TITLES.get(name, name)} {'↓' if is_lower_better(metric) else '↑'}"


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation (n - 1); None of a single value."""
    return stdev(values) if len(values) > 1 else None


def paired_p(differences: Sequence[float]) -> float | None:
    """Two-sided p of Student's t-test that the mean difference is zero; None where all differences are equal.

    With t = sqrt(n - 1) tan(theta) the density of Student's t becomes cos(theta)^(n - 2), whose tail is summed here.
    """
    n = len(differences)
    deviation = stdev(differences)
    if deviation == 0:
        return None
    t = abs(fmean(differences)) / (deviation / math.sqrt(n))
    start = math.atan(t / math.sqrt(n - 1))

    def integral(a: float) -> float:
        num = 20_000
        theta = a + (np.arange(num) + 0.5) * (math.pi / 2 - a) / num
        return float((np.cos(theta) ** (n - 2)).sum() * (math.pi / 2 - a) / num)

    return integral(start) / integral(0.0)
