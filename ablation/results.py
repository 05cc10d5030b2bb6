"""Results of an ablation's runs, read from their JSON, and the tests of whether one variant is better than another.

Differences are paired over training seeds, with confidence intervals, and p-values are corrected for the number of
comparisons.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from ablation.identity import is_scored
from ablation.study import AblationConfig
from evaluation.table import SIGNIFICANT, number
from metrics.scores import is_lower_better
from training.log import read_log

ROUNDING = 1e-12  # of a score, relative; what differs by less is equal
PLANNED = ("base", "set", "variants", "grid", "match", "scoring", "pictures")  # of an ablation; results depend on them


@dataclass(frozen=True)
class Difference:
    """Mean difference of two variants' scores over the training seeds that both have, and its t-test."""

    mean: float
    low: float  # ends of the 95% confidence interval
    high: float
    p: float
    num_seeds: int

    @property
    def is_decided(self) -> bool:
        return self.p < SIGNIFICANT

    def is_better(self, lower_is_better: bool) -> bool:
        """Whether the first variant has the better mean."""
        return (self.mean < 0) == lower_is_better

    def sentence(self, name: str, other: str, lower_is_better: bool, digits: int | None = None) -> str:
        """Say whether `name` is better or worse than `other`, or why that is undecided."""
        sign = -1 if self.is_decided and self.mean < 0 else 1  # a decided difference is told by its size
        bounds = sorted((sign * self.low, sign * self.high))
        mean, low, high = (number(value, digits=digits) for value in (sign * self.mean, *bounds))
        evidence = f"95% interval {low} to {high}, {self.num_seeds} seeds, corrected p = {self.p:.2g}"
        if self.is_decided:
            verdict = "better" if self.is_better(lower_is_better) else "worse"
            return f"{name} is {verdict} than {other} by {mean} ({evidence})"
        reason = "the interval holds 0" if self.low <= 0 <= self.high else "too many comparisons for so few seeds"
        return f"{name} against {other} is undecided: {reason} ({evidence})"


def paired_t_test(mine: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Two-sided paired t-test of scores by seed; None for fewer than two common seeds, or differences that are equal up
    to rounding, as those of shares of few images may be."""
    from scipy import stats

    seeds = sorted(mine.keys() & theirs.keys())
    differences = [mine[seed] - theirs[seed] for seed in seeds]
    largest = max((abs(scores[seed]) for scores in (mine, theirs) for seed in seeds), default=0.0)
    if len(differences) < 2 or stdev(differences) <= ROUNDING * largest:
        return None
    test: Any = stats.ttest_1samp(differences, 0)
    low, high = map(float, test.confidence_interval(0.95))
    return Difference(fmean(differences), low, high, float(test.pvalue), len(differences))


def correct_p_values(differences: Mapping[str, Difference | None]) -> dict[str, Difference]:
    """Drop the differences that could not be tested, and correct the p-values of the others by Holm's method."""
    tested = {name: difference for name, difference in differences.items() if difference is not None}
    p_values = holm([difference.p for difference in tested.values()])
    return {name: replace(difference, p=p) for (name, difference), p in zip(tested.items(), p_values, strict=True)}


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values by Holm's step-down method, which controls the family-wise error rate (Holm 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = adjusted[index] = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
    return adjusted


@dataclass(frozen=True)
class RunResult:
    """A scored run: its row of `plan.json`, `scores.json`, and the lines of `log.jsonl`."""

    plan: dict[str, Any]
    record: dict[str, Any]
    events: list[dict[str, Any]]

    @cached_property
    def trials(self) -> list[dict[str, float | None]]:
        """Scores of each trial by metric, without those of halves; the first also has the last held-out loss
        and the share of memorisation."""
        trials = self.record["rows"][0]["trials"]
        scores = [{name: score["value"] for name, score in trial.items() if ", " not in name} for trial in trials]
        if losses := self.series("validation_loss")[1]:
            scores[0]["validation_loss"] = losses[-1] if math.isfinite(losses[-1]) else None
        if memorisation := self.record.get("memorisation"):
            scores[0]["closer to training images"] = memorisation["closer_to_training_than_held_out"]
        return scores

    def values(self, metric: str) -> list[float]:
        """Values of a metric in all trials that have one."""
        return [value for trial in self.trials if (value := trial.get(metric)) is not None]

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a quantity in the training's log."""
        points = [(event["step"], event[name]) for event in self.events if event.get(name) is not None]
        return [step for step, _ in points], [value for _, value in points]


@dataclass(frozen=True)
class VariantResult:
    """The scored runs of a variant, one per training seed."""

    name: str
    runs: list[RunResult]

    @property
    def plan(self) -> dict[str, Any]:
        return self.runs[0].plan

    @property
    def costs(self) -> dict[str, int | float | None]:
        """Parameters, GFLOPs of a forward pass, and from the training logs median images per second and peak memory."""
        costs = {name: self.plan[name] for name in ("parameters", "gflops")}
        for name, summary in {"images_per_second": median, "memory_gb": max}.items():
            values = [value for run in self.runs for value in run.series(name)[1]]
            costs[name] = summary(values) if values else None
        return costs

    def values(self, metric: str) -> list[float]:
        """Values of a metric over all seeds and trials."""
        return [value for run in self.runs for value in run.values(metric)]

    @property
    def is_scored_in_part(self) -> bool:
        """Whether a metric has a value in some trials and none in others, as those of samples that diverged."""
        known = {(name, value is None) for run in self.runs for trial in run.trials for name, value in trial.items()}
        return any((name, not is_missing) in known for name, is_missing in known)

    def by_seed(self, metric: str) -> dict[int, float]:
        """Mean of a metric over the trials of each training seed."""
        return {run.plan["seed"]: fmean(values) for run in self.runs if (values := run.values(metric))}


@dataclass(frozen=True)
class Results:
    """Results of an ablation's finished runs, by variant; `missing` names the runs that are not finished."""

    folder: Path
    plan: dict[str, Any]  # `plan.json`
    variants: list[VariantResult]
    missing: list[str]

    @property
    def runs(self) -> list[RunResult]:
        return [run for variant in self.variants for run in variant.runs]

    @property
    def baseline(self) -> VariantResult:
        """The variant that the others are tested against: the first, unless the ablation names one."""
        name = self.plan["ablation"]["baseline"]
        return next((variant for variant in self.variants if variant.name == name), self.variants[0])

    @cached_property
    def metrics(self) -> list[str]:
        """Names of the metrics that have a value in some run; the loss only where all are of one objective."""
        names = dict.fromkeys(name for run in self.runs for trial in run.trials for name in trial)
        if self.num_objectives > 1:
            names.pop("validation_loss", None)
        return [name for name in names if any(variant.values(name) for variant in self.variants)]

    @property
    def num_objectives(self) -> int:
        """Number of different objectives, latents or images that the losses are of: those of one can be compared."""
        return len({str(run.plan.get("loss_of")) for run in self.runs})

    def differences(self, metric: str) -> dict[str, Difference]:
        """Difference of each variant to the baseline where it can be tested, corrected for the number of variants."""
        return self._differences_to(self.baseline, metric)

    def differences_of_claims(self, metric: str) -> dict[str, Difference]:
        """Difference of the two variants of each claim where it can be tested, corrected for the number of claims."""
        scores = {variant.name: variant.by_seed(metric) for variant in self.variants}
        pairs = {claim: [scores.get(name, {}) for name in names] for claim, names in self.claims.items()}
        return correct_p_values({claim: paired_t_test(*pair) for claim, pair in pairs.items()})

    @property
    def claims(self) -> dict[str, list[str]]:
        """For each claim, the variant that it says is better, and the other."""
        return self.plan["ablation"].get("claims", {})

    def is_best(self, variant: VariantResult, metric: str) -> bool:
        """Whether this variant is significantly better than every other, corrected for the number of variants."""
        if (lower := is_lower_better(metric)) is None:
            return False
        rivals = {other.name for other in self.variants if other is not variant and other.values(metric)}
        differences = self._differences_to(variant, metric).items()
        beaten = {name for name, difference in differences if difference.is_decided and (difference.mean > 0) == lower}
        return bool(rivals) and rivals == beaten

    def _differences_to(self, baseline: VariantResult, metric: str) -> dict[str, Difference]:
        by_seed = baseline.by_seed(metric)
        others = [variant for variant in self.variants if variant is not baseline]
        return correct_p_values({other.name: paired_t_test(other.by_seed(metric), by_seed) for other in others})

    @property
    def references(self) -> dict[str, dict[str, Any]]:
        """Scores of the floor (training images) and the ceiling (reconstructions), by the name of their row.

        Runs that are scored differently, and for the ceiling runs with another autoencoder, have their own: it is taken
        from the first such run, and named after its variant where there are several.
        """
        references = {}
        for name, kind, sample_keys in (
            ("training images", "floor", ("labels",)),
            ("reconstructions", "ceiling", ("labels", "autoencoder")),
        ):
            firsts: dict[str, RunResult] = {}
            for run in self.runs:
                scoring = map(run.record.get, ("num_samples", "reference", "extractor_sha256"))
                firsts.setdefault(repr([*scoring, *map(run.record["samples"].get, sample_keys)]), run)
            for run in firsts.values():
                row = next((row for row in run.record["rows"][1:] if row["name"] == name), None)
                if row is not None:
                    of_variant = f" of {run.plan['variant']}" if len(firsts) > 1 else ""
                    references[f"{name} ({kind}{of_variant})"] = row["scores"]
        return references


def read_results(folder: Path, ablation: AblationConfig | None = None) -> Results:
    """Read `plan.json` and the files of its runs. Words, baseline and claims are those of `ablation`, which may have
    been edited since. Raises ValueError if other parts of it have changed, or if no run has been scored."""
    path = folder / "plan.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no ablation: there is no {path}")
    plan = json.loads(path.read_text())
    plan |= {"ablation": _as_edited(plan, ablation)} if ablation else {}
    variants: dict[str, list[RunResult]] = {}
    missing = []
    for row in plan["runs"]:
        scores = Path(row["folder"]) / "scores.json"
        if not is_scored(scores.parent, row["keys"]["score"]) or not scores.is_file():
            missing.append(f"{row['variant']}, seed {row['seed']}")
            continue
        log = read_log(Path(row["trained_in"]) / "log.jsonl")
        events = [event for event in log if event["step"] <= row["num_steps"]]  # somebody may have trained it further
        run = RunResult(row, json.loads(scores.read_text()), events)
        variants.setdefault(row["variant"], []).append(run)
    if not variants:
        scored = any((Path(row["folder"]) / "scores.json").is_file() for row in plan["runs"])
        remedy = "; results of other code count if it is planned with --any_code true" if scored else ""
        raise ValueError(f"{folder}: no run is finished, there is nothing to report yet ({len(missing)} to go){remedy}")
    return Results(folder, plan, [VariantResult(name, runs) for name, runs in variants.items()], missing)


def _as_edited(plan: dict[str, Any], ablation: AblationConfig) -> dict[str, Any]:
    """The ablation of a plan as it is now. Raises ValueError if it is not the one that was planned."""
    planned, now = plan["ablation"], json.loads(json.dumps(asdict(ablation)))
    now["set"] = {**planned["set"], **now["set"]}  # a report needs no --set
    if changed := [name for name in PLANNED if json.dumps(planned[name]) != json.dumps(now[name])]:
        remedy = "--only plan, with the same --set, plans it again"
        raise ValueError(f"{', '.join(changed)}: the YAML was edited since it was planned; {remedy}")
    return now


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval by Student's t; of a single value that is unknown (nan)."""
    from scipy import stats

    if len(values) < 2:
        return fmean(values), math.nan
    return fmean(values), float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5


def sample_std(values: Sequence[float]) -> float | None:
    """Sample standard deviation (n - 1); None for a single value."""
    return stdev(values) if len(values) > 1 else None
