"""The one writer of tables: for a terminal, as Markdown, LaTeX or CSV. A table is a list of rows, whose first is the
head; whatever its cells hold is text, which means nothing to the format."""

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
    """What is shown, what it is sorted by, whether it is the best of its column, and the p-value of its difference."""

    text: str
    value: float | None = None
    best: bool = False
    p: float | None = None

    @property
    def star(self) -> str:
        return "*" if self.p is not None and self.p < SIGNIFICANT else ""


Row = Sequence[str | Cell]


def terminal(rows: Sequence[Row]) -> str:
    """Aligned, in Markdown's form, with names as they are."""
    return _aligned(rows, lambda cell: " ".join(cell.text.split()).replace("|", r"\|") + cell.star)


def markdown(rows: Sequence[Row]) -> str:
    """With the best in bold."""
    return _aligned(rows, lambda cell: (f"**{plain(cell.text)}**" if cell.best else plain(cell.text)) + cell.star)


def latex(*parts: Sequence[Row]) -> str:
    """A booktabs table, ready for `\\input`, with a rule between its parts; the first is the head."""
    lines = [r"\begin{tabular}{l" + "r" * (len(parts[0][0]) - 1) + "}", r"\toprule"]
    for number_, rows in enumerate(filter(None, parts)):
        lines += [r"\midrule"] * (number_ > 0)
        lines += [" & ".join(_tex_cell(_cell(cell)) for cell in row) + r" \\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def as_csv(rows: Sequence[Sequence[object]]) -> str:
    """Numbers in full precision; None is empty."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()


def plain(text: str) -> str:
    """Text that somebody else chose, for Markdown: on one line, and nothing in it means anything."""
    return re.sub(r"([\\`*_\[\]<>#~&!|])", r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """The same between backticks, of which there are more than in any row of them within."""
    text = " ".join(text.split())
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def number(value: float, std: float | None = None, digits: int | None = None) -> str:
    """A score to be read, and its spread, with so many digits after the point; by default 4 below 10, else 2."""
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
