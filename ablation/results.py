"""What the runs of an ablation left, read from their own JSON, and what it amounts to."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from ablation.differences import Difference, corrected, paired
from ablation.identity import is_scored
from metrics.scores import is_lower_better


@dataclass(frozen=True)
class RunResult:
    """A scored run: its row of `plan.json`, `scores.json`, and the lines of `log.jsonl`."""

    plan: dict[str, Any]
    record: dict[str, Any]
    events: list[dict[str, Any]]

    @cached_property
    def trials(self) -> list[dict[str, float | None]]:
        """The scores of each, by metric; distances of halves are left out."""
        trials = self.record["rows"][0]["trials"]
        return [{name: one["value"] for name, one in trial.items() if ", " not in name} for trial in trials]

    def values(self, metric: str) -> list[float]:
        """Of the trials that have a value."""
        return [value for trial in self.trials if (value := trial.get(metric)) is not None]

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of something in the log."""
        points = [(event["step"], event[name]) for event in self.events if event.get(name) is not None]
        return [step for step, _ in points], [value for _, value in points]


@dataclass(frozen=True)
class VariantResult:
    """All runs of a variant, one a training seed."""

    name: str
    runs: list[RunResult]

    @property
    def plan(self) -> dict[str, Any]:
        """The row of `plan.json` of its first run."""
        return self.runs[0].plan

    @property
    def costs(self) -> dict[str, int | float | None]:
        """Parameters and GFLOPs of a forward pass; of training, from its log, median images a second and most
        memory."""
        counted = {name: self.plan[name] for name in ("parameters", "gflops")}
        logged = {"images_per_second": median, "memory_gb": max}
        for name, summary in logged.items():
            values = [value for run in self.runs for value in run.series(name)[1]]
            counted[name] = summary(values) if values else None
        return counted

    def values(self, metric: str) -> list[float]:
        """Of every trial of every seed."""
        return [value for run in self.runs for value in run.values(metric)]

    def by_seed(self, metric: str) -> dict[int, float]:
        """The mean over trials, for each seed."""
        return {run.plan["seed"]: fmean(values) for run in self.runs if (values := run.values(metric))}


@dataclass(frozen=True)
class Results:
    """What an ablation's finished runs have measured."""

    folder: Path
    plan: dict[str, Any]
    variants: list[VariantResult]
    missing: list[str]

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
        names = dict.fromkeys(name for run in self.runs for trial in run.trials for name in trial)
        return [name for name in names if any(variant.values(name) for variant in self.variants)]

    def differences(self, metric: str) -> dict[str, Difference]:
        """Of each variant to the baseline, where it can be tested; p-values are for all variants together."""
        return self._differences_to(self.baseline, metric)

    def is_best(self, variant: VariantResult, metric: str) -> bool:
        """Whether this variant is decidedly better than every other; p-values are for all of them together."""
        if (lower := is_lower_better(metric)) is None:
            return False
        rivals = {other.name for other in self.variants if other is not variant and other.values(metric)}
        differences = self._differences_to(variant, metric).items()
        return bool(rivals) and rivals == {
            name for name, one in differences if one.is_decided and (one.mean > 0) == lower
        }

    def _differences_to(self, base: VariantResult, metric: str) -> dict[str, Difference]:
        by_seed = base.by_seed(metric)
        others = [variant for variant in self.variants if variant is not base]
        return corrected({other.name: paired(other.by_seed(metric), by_seed) for other in others})

    @property
    def references(self) -> dict[str, dict[str, Any]]:
        """The scores of training images (the floor) and reconstructions (the ceiling), by name and, where not all are
        scored alike, by variant."""
        of_scores, of_samples = ("num_samples", "reference", "extractor_sha256"), ("labels", "autoencoder")
        scored_as = [
            [*map(run.record.get, of_scores), *map(run.record["samples"].get, of_samples)] for run in self.runs
        ]
        alike = all(other == scored_as[0] for other in scored_as)
        rows = {row["name"]: (run.plan["variant"], row) for run in self.runs for row in run.record["rows"][1:]}
        references = {}
        for name, what in (("training images", "floor"), ("reconstructions", "ceiling")):
            if name in rows:
                variant, row = rows[name]
                references[f"{name} ({what}{'' if alike else f' of {variant}'})"] = row["scores"]
        return references


def read_results(folder: Path) -> Results:
    """From `plan.json` and the runs' own files. Raises ValueError where no run has been scored."""
    path = folder / "plan.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no ablation: there is no {path}")
    plan = json.loads(path.read_text())
    variants: dict[str, list[RunResult]] = {}
    missing = []
    for one in plan["runs"]:
        scores = Path(one["folder"]) / "scores.json"
        if not is_scored(scores.parent, one["keys"]["score"]) or not scores.is_file():
            missing.append(f"{one['variant']}, seed {one['seed']}")
            continue
        log = (Path(one["trained_in"]) / "log.jsonl").read_text().splitlines()
        run = RunResult(one, json.loads(scores.read_text()), [json.loads(line) for line in log])
        variants.setdefault(one["variant"], []).append(run)
    if not variants:
        raise ValueError(f"{folder}: no run is finished, there is nothing to report yet ({len(missing)} to go)")
    return Results(folder, plan, [VariantResult(name, runs) for name, runs in variants.items()], missing)


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation (n - 1); None of a single value."""
    return stdev(values) if len(values) > 1 else None
