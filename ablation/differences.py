"""Whether one variant is better than another: differences paired over training seeds, their intervals, and p-values
that hold for all comparisons together."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

from evaluation.table import SIGNIFICANT, number


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
        """Whether it is not zero."""
        return self.p < SIGNIFICANT

    def sentence(self, name: str, other: str, lower_is_better: bool, digits: int | None = None) -> str:
        """What may be said of `name` beside `other`."""
        mean, low, high = (number(value, digits=digits) for value in (abs(self.mean), self.low, self.high))
        interval = f"95% interval {low} to {high}"
        why = f"{interval}, {self.num_seeds} seeds, corrected p = {self.p:.2g}"
        if self.is_decided:
            verdict = "better" if (self.mean < 0) == lower_is_better else "worse"
            return f"{name} is {verdict} than {other} by {mean} ({why})"
        reason = "the interval holds 0" if self.low <= 0 <= self.high else "too many comparisons for so few seeds"
        return f"{name} against {other} is undecided: {reason} ({why})"


def paired(mine: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Student's paired t-test of scores by seed, two-sided; None for fewer than two common seeds, or where all
    differences are equal."""
    from scipy import stats

    differences = [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]
    if len(differences) < 2 or stdev(differences) == 0:
        return None
    mean, error = fmean(differences), stdev(differences) / math.sqrt(len(differences))
    student = stats.t(len(differences) - 1)
    margin = float(student.ppf(0.975)) * error
    return Difference(mean, mean - margin, mean + margin, 2 * float(student.sf(abs(mean) / error)), len(differences))


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
