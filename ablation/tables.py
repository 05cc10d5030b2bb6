"""Tables of a report: Markdown, LaTeX and CSV, from the same cells."""

from collections.abc import Sequence
from statistics import fmean

from ablation.results import Results, sample_std
from evaluation.table import Cell, as_csv, latex, markdown, number
from metrics.scores import METRICS, column_title, find_metric, num_digits

COSTS = {  # by column head: name of the cost, and its format
    "parameters": ("parameters", lambda value: f"{value / 1e6:.2f}M"),
    "GFLOPs": ("gflops", lambda value: f"{value:.3f}"),
    "img/s": ("images_per_second", lambda value: f"{value:.1f}"),
    "GB": ("memory_gb", lambda value: f"{value:.2f}"),
}


def header_cells(results: Results) -> list[str]:
    """Heads of the columns: model, costs, metrics."""
    return ["model", *COSTS, *map(column_title, results.metrics)]


def variant_cells(results: Results) -> list[list[Cell]]:
    """One row per variant: its costs, and mean and spread of its scores over seeds and trials."""
    rows, differences = [], {metric: results.differences(metric) for metric in results.metrics}
    for variant in results.variants:
        row, costs = [Cell(variant.name)], variant.costs
        for name, to_text in COSTS.values():
            value = costs[name]
            row.append(Cell("-") if value is None else Cell(to_text(value), float(value)))
        for metric in results.metrics:
            if not (values := variant.values(metric)):
                row.append(Cell("-"))
                continue
            text = number(fmean(values), sample_std(values), num_digits(metric))
            difference = differences[metric].get(variant.name)
            p = None if difference is None else difference.p
            row.append(Cell(text, fmean(values), results.is_best(variant, metric), p))
        rows.append(row)
    return rows


def reference_cells(results: Results) -> list[list[Cell]]:
    """Rows of training images and reconstructions, which stand above those of the models."""
    rows = []
    for name, scores in results.references.items():
        row = [Cell(name), *[Cell("")] * len(COSTS)]
        for metric in results.metrics:
            score = scores.get(metric, {})
            value = score.get("value")
            text = "-" if value is None else number(value, score.get("std"), num_digits(metric))
            row.append(Cell(text, value))
        rows.append(row)
    return rows


def cross_tabulate(results: Results) -> list[tuple[str, list[list[str]]]]:
    """Two-way tables, one per metric, of an ablation with exactly two factors; otherwise none. Returns the metric's
    title and rows of text, with the first factor's values as rows and the second's as columns."""
    points = {variant.name: variant.plan.get("point", {}) for variant in results.variants}
    values = {
        key: list(dict.fromkeys(str(point.get(key)) for point in points.values()))
        for key in dict.fromkeys(key for point in points.values() for key in point)
    }
    factors = [key for key, choices in values.items() if len(choices) > 1]
    if len(factors) != 2:
        return []
    rows_of, columns_of = factors
    names = {(str(point.get(rows_of)), str(point.get(columns_of))): name for name, point in points.items()}
    by_variant = {row[0].text: row for row in variant_cells(results)}
    tables = []
    for column, metric in enumerate(results.metrics, start=1 + len(COSTS)):
        rows = [[f"{rows_of}, {columns_of}", *values[columns_of]]]
        for value in values[rows_of]:
            variants = [names.get((value, other)) for other in values[columns_of]]
            rows.append([value, *(by_variant[name][column].text if name else "-" for name in variants)])
        tables.append((column_title(metric), rows))
    return tables


def as_markdown(results: Results) -> str:
    """Format the table as Markdown; `*` marks a significant difference to the baseline."""
    return markdown([header_cells(results), *reference_cells(results), *variant_cells(results)])


def check_columns(columns: list[str]) -> None:
    """Check the columns for `as_tex`. Raises ValueError for an unknown name."""
    allowed = [*COSTS, *METRICS]
    for name in columns:
        if name not in allowed:
            raise ValueError(f"columns {name}: choose from {', '.join(allowed)}")


def as_tex(results: Results, columns: Sequence[str] = ()) -> str:
    """Format the table as LaTeX with the given columns (heads of costs, names of metrics); default: all with values."""
    names, models = [*COSTS, *(find_metric(metric)[0] for metric in results.metrics)], variant_cells(results)
    chosen = [0] + [
        index
        for index, name in enumerate(names, start=1)
        if (name in columns if columns else any(row[index].value is not None for row in models))
    ]
    parts = [[header_cells(results)], reference_cells(results), models]
    return latex(*([[row[index] for index in chosen] for row in rows] for rows in parts))


def trials_csv(results: Results) -> str:
    """Format all scores as CSV, one row per generation trial."""
    rows: list[list[object]] = [["variant", "seed", "trial", *(name for name, _ in COSTS.values()), *results.metrics]]
    for variant in results.variants:
        for run in variant.runs:
            for index, trial in enumerate(run.trials):
                scores = [trial.get(name) for name in results.metrics]
                rows.append([variant.name, run.plan["seed"], index, *variant.costs.values(), *scores])
    return as_csv(rows)
