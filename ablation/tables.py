"""The tables of a report, from one list of cells."""

from collections.abc import Sequence
from statistics import fmean

from ablation.results import Results, spread
from evaluation.table import Cell, as_csv, latex, markdown, number
from metrics.scores import METRICS, digits_of, row_of, title_of

COSTS = {  # by their columns' heads: names, and how they are written
    "parameters": ("parameters", lambda value: f"{value / 1e6:.2f}M"),
    "GFLOPs": ("gflops", lambda value: f"{value:.3f}"),
    "img/s": ("images_per_second", lambda value: f"{value:.1f}"),
    "GB": ("memory_gb", lambda value: f"{value:.2f}"),
}


def head(results: Results) -> list[str]:
    return ["model", *COSTS, *map(title_of, results.metrics)]


def cells(results: Results) -> list[list[Cell]]:
    """A row a variant: what it costs, counted and measured, beside its scores over trials and seeds."""
    rows, differences = [], {metric: results.differences(metric) for metric in results.metrics}
    for variant in results.variants:
        row, costs = [Cell(variant.name)], variant.costs
        for name, written in COSTS.values():
            value = costs[name]
            row.append(Cell("-") if value is None else Cell(written(value), float(value)))
        for metric in results.metrics:
            if not (values := variant.values(metric)):
                row.append(Cell("-"))
                continue
            text = number(fmean(values), spread(values), digits_of(metric))
            difference = differences[metric].get(variant.name)
            p = None if difference is None else difference.p
            row.append(Cell(text, fmean(values), results.is_best(variant, metric), p))
        rows.append(row)
    return rows


def reference_cells(results: Results) -> list[list[Cell]]:
    """Rows that no model made, to stand above all models: training images and reconstructions."""
    rows = []
    for name, scores in results.references.items():
        row = [Cell(name), *[Cell("")] * len(COSTS)]
        for metric in results.metrics:
            score = scores.get(metric, {})
            value = score.get("value")
            text = "-" if value is None else number(value, score.get("std"), digits_of(metric))
            row.append(Cell(text, value))
        rows.append(row)
    return rows


def crossed(results: Results) -> list[tuple[str, list[list[str]]]]:
    """Where two factors alone differ, for each metric a table of their own: one's values down, the other's across."""
    points = {variant.name: variant.plan.get("point", {}) for variant in results.variants}
    values = {
        key: list(dict.fromkeys(str(point.get(key)) for point in points.values()))
        for key in dict.fromkeys(key for point in points.values() for key in point)
    }
    factors = [key for key, choices in values.items() if len(choices) > 1]
    if len(factors) != 2:
        return []
    down, across = factors
    names = {(str(point.get(down)), str(point.get(across))): name for name, point in points.items()}
    shown = {row[0].text: row for row in cells(results)}
    tables = []
    for column, metric in enumerate(results.metrics, start=1 + len(COSTS)):
        rows = [[f"{down}, {across}", *values[across]]]
        for one in values[down]:
            of_row = [names.get((one, other)) for other in values[across]]
            rows.append([one, *(shown[name][column].text if name else "-" for name in of_row)])
        tables.append((title_of(metric), rows))
    return tables


def as_markdown(results: Results) -> str:
    """With `*` where a difference to the baseline is significant."""
    return markdown([head(results), *reference_cells(results), *cells(results)])


def check_columns(columns: list[str]) -> None:
    """Whether `as_tex` may have these. Raises ValueError for a name that is none."""
    known = [*COSTS, *METRICS]
    for name in columns:
        if name not in known:
            raise ValueError(f"columns {name}: choose from {', '.join(known)}")


def as_tex(results: Results, columns: Sequence[str] = ()) -> str:
    """For a paper: the columns asked for, by their heads or metrics' names; by default all that have values."""
    names, models = [*COSTS, *(row_of(metric)[0] for metric in results.metrics)], cells(results)
    chosen = [0] + [
        place
        for place, name in enumerate(names, start=1)
        if (name in columns if columns else any(row[place].value is not None for row in models))
    ]
    parts = [[head(results)], reference_cells(results), models]
    return latex(*([[row[place] for place in chosen] for row in rows] for rows in parts))


def trials_csv(results: Results) -> str:
    rows: list[list[object]] = [["variant", "seed", "trial", *(name for name, _ in COSTS.values()), *results.metrics]]
    for variant in results.variants:
        for run in variant.runs:
            for place, trial in enumerate(run.trials):
                scores = [trial.get(name) for name in results.metrics]
                rows.append([variant.name, run.plan["seed"], place, *variant.costs.values(), *scores])
    return as_csv(rows)
