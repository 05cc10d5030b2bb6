"""Format tables for a terminal, or as Markdown, LaTeX or CSV. A table is a list of rows, starting with the head. The
text of cells is escaped, so it cannot break the format."""

import csv
import io
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

SIGNIFICANT = 0.05
TEX = {character: rf"\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "±": r"$\pm$",
    "∞": r"$_\infty$",
}


class Cell(NamedTuple):
    """A cell with more than just text."""

    text: str
    value: float | None = None  # to sort by
    best: bool = False  # of its column
    p: float | None = None  # p-value of the difference from the baseline

    @property
    def star(self) -> str:
        return "*" if self.p is not None and self.p < SIGNIFICANT else ""


Row = Sequence[str | Cell]


def terminal(rows: Sequence[Row]) -> str:
    """Format for a terminal: aligned like Markdown, but with text as it is, except for `|`."""
    return _aligned(rows, lambda cell: " ".join(cell.text.split()).replace("|", r"\|") + cell.star)


def markdown(rows: Sequence[Row]) -> str:
    """Format as Markdown, with the best values in bold."""
    return _aligned(rows, lambda cell: (f"**{plain(cell.text)}**" if cell.best else plain(cell.text)) + cell.star)


def latex(*parts: Sequence[Row]) -> str:
    """Format as a booktabs table for `\\input`, with a rule between the parts, the first of which is the head; of a
    single part, that is its first row."""
    lines = [r"\begin{tabular}{l" + "r" * (len(parts[0][0]) - 1) + "}", r"\toprule"]
    if len(parts) == 1:
        parts = parts[0][:1], parts[0][1:]
    for index, rows in enumerate(filter(None, parts)):
        lines += [r"\midrule"] * (index > 0)
        lines += [" & ".join(_tex_cell(_cell(cell)) for cell in row) + r" \\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def as_csv(rows: Sequence[Sequence[object]]) -> str:
    """Format as CSV, with numbers in full precision and None as an empty field."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()


def plain(text: str) -> str:
    """Escape text for Markdown and join its lines."""
    return re.sub(r"([\\`*_\[\]<>#~&!|])", r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """Format text as inline code in Markdown, fenced by more backticks than it contains in a row."""
    text = " ".join(text.split())
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def number(value: float, std: float | None = None, digits: int | None = None) -> str:
    """Format a score and its spread with `digits` decimals; by default 4 for scores below 10, else 2."""
    if digits is None:
        digits = 4 if abs(value) < 10 else 2
    return f"{value:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def _cell(cell: str | Cell) -> Cell:
    return Cell(cell) if isinstance(cell, str) else cell


def _aligned(rows: Sequence[Row], shown: Callable[[Cell], str]) -> str:
    cells = [[shown(_cell(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _tex_cell(cell: Cell) -> str:
    if cell.value is None:
        return "".join(TEX.get(character, character) for character in " ".join(cell.text.split()))
    text = cell.text.replace("±", r"\pm").replace("M", r"\text{M}")
    text = rf"\mathbf{{{text}}}" if cell.best else text
    return f"${text}{'^{*}' if cell.star else ''}$"
