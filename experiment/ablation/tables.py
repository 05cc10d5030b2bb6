"""Table 1 in four formats, from one list of cells."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from statistics import fmean

from experiment.ablation.results import Results, spread, title_of
from experiment.table import markdown, number

SIGNIFICANT = 0.05
REFERENCES = {"training images": "training images (floor)", "reconstructions": "reconstructions (ceiling)"}


@dataclass(frozen=True)
class Cell:
    """What is shown, what it is sorted by, and whether it is the best of its column or differs from the baseline."""

    text: str
    value: float | None = None
    best: bool = False
    p: float | None = None


def head(results: Results) -> list[str]:
    """Of the columns."""
    return ["model", "parameters", "GFLOPs", "img/s", "GB", *map(title_of, results.metrics)]


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
            best = len(results.variants) > 1 and mean == results.best(metric)
            row.append(Cell(number(mean, spread(values)), mean, best, results.p_value(variant, metric)))
        rows.append(row)
    return rows


def reference_cells(results: Results) -> list[list[Cell]]:
    """Rows that no model made, to stand above all models: training images, a perfect model's score, and
    reconstructions, the ceiling of what is generated through this autoencoder."""
    rows = []
    for name, scores in results.references.items():
        row = [Cell(REFERENCES[name]), *[Cell("")] * 4]
        for metric in results.metrics:
            value = scores.get(metric, {}).get("value")
            row.append(Cell("-") if value is None else Cell(number(value, scores[metric].get("std")), value))
        rows.append(row)
    return rows


def as_markdown(results: Results) -> str:
    """With `*` where a difference to the baseline is significant."""
    rows = [[_marked(cell, "**", "**") for cell in row] for row in [*reference_cells(results), *cells(results)]]
    return markdown([head(results), *rows])


def as_tex(results: Results) -> str:
    """A booktabs table, ready for `\\input`."""
    columns = "l" + "r" * (len(head(results)) - 1)
    lines = [r"\begin{tabular}{" + columns + "}", r"\toprule"]
    lines += [" & ".join(map(_tex, head(results))) + r" \\"]
    for rows in filter(None, (reference_cells(results), cells(results))):
        lines += [r"\midrule", *(" & ".join(_tex_cell(cell) for cell in row) + r" \\" for row in rows)]
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
    text = f"{before}{cell.text}{after}" if cell.best else cell.text
    return text + ("*" if is_significant(cell) else "")


def is_significant(cell: Cell) -> bool:
    """Whether it differs from the baseline."""
    return cell.p is not None and cell.p < SIGNIFICANT


def _tex_cell(cell: Cell) -> str:
    if cell.value is None:
        return _tex(cell.text)
    text = cell.text.replace("±", r"\pm").replace("M", r"\text{M}")
    text = rf"\mathbf{{{text}}}" if cell.best else text
    return f"${text}{'^{*}' if is_significant(cell) else ''}$"


def _tex(text: str) -> str:
    for old, new in {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "↓": r"$\downarrow$", "↑": r"$\uparrow$"}.items():
        text = text.replace(old, new)
    return text
