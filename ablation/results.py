"""What an ablation's runs left, read from their own JSON, and whether one variant is better than another: differences
paired over training seeds, their intervals, and p-values that hold for all comparisons together."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from ablation.identity import is_scored
from evaluation.table import SIGNIFICANT, number
from metrics.scores import is_lower_better


@dataclass(frozen=True)
class Difference:
    """Of two means of scores, over the training seeds that both have."""

    mean: float
    low: float
    high: float
    p: float
    num_seeds: int

    @property
    def is_decided(self) -> bool:
        return self.p < SIGNIFICANT

    def sentence(self, name: str, other: str, lower_is_better: bool, digits: int | None = None) -> str:
        mean, low, high = (number(value, digits=digits) for value in (abs(self.mean), self.low, self.high))
        interval = f"95% interval {low} to {high}"
        why = f"{interval}, {self.num_seeds} seeds, corrected p = {self.p:.2g}"
        if self.is_decided:
            verdict = "better" if (self.mean < 0) == lower_is_better else "worse"
            return f"{name} is {verdict} than {other} by {mean} ({why})"
        reason = "the interval holds 0" if self.low <= 0 <= self.high else "too many comparisons for so few seeds"
        return f"{name} against {other} is undecided: {reason} ({why})"


def paired(mine: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Student's paired t-test over the common seeds, two-sided; None for fewer than two, or where all differ alike."""
    from scipy import stats

    differences = [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]
    if len(differences) < 2 or stdev(differences) == 0:
        return None
    test: Any = stats.ttest_1samp(differences, 0)
    low, high = map(float, test.confidence_interval(0.95))
    return Difference(fmean(differences), low, high, float(test.pvalue), len(differences))


def corrected(differences: Mapping[str, Difference | None]) -> dict[str, Difference]:
    """Those that could be tested, with p-values for all of them together."""
    tested = {name: difference for name, difference in differences.items() if difference is not None}
    p_values = holm([difference.p for difference in tested.values()])
    return {name: replace(difference, p=p) for (name, difference), p in zip(tested.items(), p_values, strict=True)}


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values such that among all tests one is below a bound by chance with at most that probability (Holm 1979)."""
    found, least = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = found[place] = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
    return found


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
        return [value for trial in self.trials if (value := trial.get(metric)) is not None]

    def series(self, name: str) -> tuple[list[int], list[float]]:
        points = [(event["step"], event[name]) for event in self.events if event.get(name) is not None]
        return [step for step, _ in points], [value for _, value in points]


@dataclass(frozen=True)
class VariantResult:
    """All runs of a variant, one a training seed."""

    name: str
    runs: list[RunResult]

    @property
    def plan(self) -> dict[str, Any]:
        return self.runs[0].plan

    @property
    def costs(self) -> dict[str, int | float | None]:
        """Parameters and GFLOPs of a forward pass; of training, logged, median images a second and most memory."""
        counted = {name: self.plan[name] for name in ("parameters", "gflops")}
        logged = {"images_per_second": median, "memory_gb": max}
        for name, summary in logged.items():
            values = [value for run in self.runs for value in run.series(name)[1]]
            counted[name] = summary(values) if values else None
        return counted

    def values(self, metric: str) -> list[float]:
        return [value for run in self.runs for value in run.values(metric)]

    def by_seed(self, metric: str) -> dict[int, float]:
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
        return [run for variant in self.variants for run in variant.runs]

    @property
    def baseline(self) -> VariantResult:
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
        beaten = {name for name, one in differences if one.is_decided and (one.mean > 0) == lower}
        return bool(rivals) and rivals == beaten

    def _differences_to(self, base: VariantResult, metric: str) -> dict[str, Difference]:
        by_seed = base.by_seed(metric)
        others = [variant for variant in self.variants if variant is not base]
        return corrected({other.name: paired(other.by_seed(metric), by_seed) for other in others})

    @property
    def references(self) -> dict[str, dict[str, Any]]:
        """Scores of training images (floor) and of reconstructions (ceiling): of each way of scoring, and of each
        autoencoder, the first run's; by its variant where there are several."""
        references = {}
        for name, what, of_samples in (
            ("training images", "floor", ("labels",)),
            ("reconstructions", "ceiling", ("labels", "autoencoder")),
        ):
            found: dict[str, RunResult] = {}
            for run in self.runs:
                of_run = map(run.record.get, ("num_samples", "reference", "extractor_sha256"))
                found.setdefault(repr([*of_run, *map(run.record["samples"].get, of_samples)]), run)
            for run in found.values():
                row = next((row for row in run.record["rows"][1:] if row["name"] == name), None)
                if row is not None:
                    of_variant = f" of {run.plan['variant']}" if len(found) > 1 else ""
                    references[f"{name} ({what}{of_variant})"] = row["scores"]
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
