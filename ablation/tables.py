"""Table 1 in four formats, from one list of cells."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from ablation.results import Results, spread, title_of
from evaluation.table import markdown, number, plain, tex
from metrics.features import METRICS
from metrics.fidelity import ELSEWHERE

SIGNIFICANT = 0.05
COSTS = ["parameters", "GFLOPs", "img/s", "GB"]


@dataclass(frozen=True)
class Cell:
    """What is shown, what it is sorted by, and whether it is the best of its column or differs from the baseline."""

    text: str
    value: float | None = None
    best: bool = False
    p: float | None = None


def head(results: Results) -> list[str]:
    """Names that stand above the columns."""
    return ["model", *COSTS, *map(title_of, results.metrics)]


def cells(results: Results) -> list[list[Cell]]:
    """A row a variant: what it costs, counted and measured, beside its scores over trials and seeds."""
    rows = []
    for variant in results.variants:
        speed, memory = variant.images_per_second, variant.memory_gb
        row = [
            Cell(variant.name),
            Cell(f"{variant.parameters / 1e6:.2f}M", float(variant.parameters)),
            Cell(f"{variant.gflops:.3f}", variant.gflops),
            Cell("-" if speed is None else f"{speed:.1f}", speed),
            Cell("-" if memory is None else f"{memory:.2f}", memory),
        ]
        for metric in results.metrics:
            values = variant.values(metric)
            if not values:
                row.append(Cell("-"))
                continue
            mean = fmean(values)
            row.append(
                Cell(
                    number(mean, spread(values)),
                    mean,
                    results.is_best(variant, metric),
                    results.p_value(variant, metric),
                )
            )
        rows.append(row)
    return rows


def reference_cells(results: Results) -> list[list[Cell]]:
    """Rows that no model made, to stand above all models: training images, a perfect model's score, and
    reconstructions, the ceiling of what is generated through this autoencoder."""
    rows = []
    for name, scores in results.references.items():
        row = [Cell(name), *[Cell("")] * len(COSTS)]
        for metric in results.metrics:
            value = scores.get(metric, {}).get("value")
            row.append(Cell("-") if value is None else Cell(number(value, scores[metric].get("std")), value))
        rows.append(row)
    return rows


def crossed(results: Results) -> list[tuple[str, list[list[str]]]]:
    """Where two factors alone differ, for each metric a table of their own: one's values down, the other's across."""
    points = {variant.name: variant.runs[0].plan.get("point", {}) for variant in results.variants}
    values = {
        key: list(dict.fromkeys(str(point.get(key)) for point in points.values()))
        for key in dict.fromkeys(key for point in points.values() for key in point)
    }
    factors = [key for key, found in values.items() if len(found) > 1]
    if len(factors) != 2:
        return []
    down, across = factors
    places = {(str(point.get(down)), str(point.get(across))): name for name, point in points.items()}
    shown = {row[0].text: row for row in cells(results)}
    tables = []
    for column, metric in enumerate(results.metrics, start=1 + len(COSTS)):
        rows = [[f"{down}, {across}", *values[across]]]
        for one in values[down]:
            names = [places.get((one, other), "") for other in values[across]]
            rows.append([one, *(shown[name][column].text if name else "-" for name in names)])
        tables.append((title_of(metric), rows))
    return tables


def as_markdown(results: Results) -> str:
    """With `*` where a difference to the baseline is significant."""
    rows = [[_marked(cell, "**", "**") for cell in row] for row in [*reference_cells(results), *cells(results)]]
    return markdown([head(results), *rows])


def check_columns(columns: list[str]) -> None:
    """Whether `as_tex` may have these.

    Raises:
        ValueError: for a name that is none.
    """
    known = [*COSTS, *METRICS]
    for name in columns:
        if name not in known:
            raise ValueError(f"columns {name}: choose from {', '.join(known)}")


def as_tex(results: Results, columns: Sequence[str] = ()) -> str:
    """A booktabs table, ready for `\\input`: of the columns that are asked for, by their heads or by the names of
    `evaluation.metrics`; by default of all in which some model has a value."""
    names = [*COSTS, *(metric.partition("[")[0] for metric in results.metrics)]
    tables = [[[Cell(name) for name in head(results)]], reference_cells(results), cells(results)]
    asked = {name for column in columns for name in (column, ELSEWHERE.get(column))}
    chosen = [0] + [
        place
        for place, name in enumerate(names, start=1)
        if (name in asked if columns else any(row[place].value is not None for row in tables[-1]))
    ]
    lines = [r"\begin{tabular}{l" + "r" * (len(chosen) - 1) + "}", r"\toprule"]
    for number_, rows in enumerate(filter(None, tables)):
        lines += [r"\midrule"] * (number_ > 0)
        lines += [" & ".join(_tex_cell(row[place]) for place in chosen) + r" \\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def as_csv(results: Results) -> str:
    """Every trial of every run, in full precision."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    costs = ["parameters", "gflops", "images_per_second", "memory_gb"]
    writer.writerow(["variant", "seed", "trial", *costs, *results.metrics])
    for variant in results.variants:
        cost = [getattr(variant, name) for name in costs]
        for run in variant.runs:
            for number_, trial in enumerate(run.trials):
                writer.writerow([variant.name, run.seed, number_, *cost, *(trial.get(m) for m in results.metrics)])
    return file.getvalue()


def _marked(cell: Cell, before: str, after: str) -> str:
    text = f"{before}{cell.text}{after}" if cell.best else plain(cell.text)
    return text + ("*" if is_significant(cell) else "")


def is_significant(cell: Cell) -> bool:
    """Whether it differs from the baseline."""
    return cell.p is not None and cell.p < SIGNIFICANT


def _tex_cell(cell: Cell) -> str:
    if cell.value is None:
        return tex(cell.text)
    text = cell.text.replace("±", r"\pm").replace("M", r"\text{M}")
    text = rf"\mathbf{{{text}}}" if cell.best else text
    return f"${text}{'^{*}' if is_significant(cell) else ''}$"
