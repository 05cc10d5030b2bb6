"""Tables and numbers to be read, in a terminal, as Markdown or in LaTeX."""

from __future__ import annotations

import re
from collections.abc import Sequence

TEX = {each: rf"\{each}" for each in "&%$#_{}"} | {
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
}


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """A table, aligned for the terminal; its first row is the head. No cell ends early or breaks the line."""
    cells = [[" ".join(cell.split()).replace("|", r"\|") for cell in line] for line in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def plain(text: str) -> str:
    """Text that somebody else chose, for Markdown: on one line, and nothing in it means anything."""
    return re.sub(r"([\\`*_\[\]<>#~&!])", r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """The same between backticks, of which there are more than in any row of them within."""
    text = " ".join(text.split())
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def tex(text: str) -> str:
    """Text with LaTeX's special characters escaped."""
    return "".join(TEX.get(each, each) for each in " ".join(text.split()))


def number(value: float, std: float | None = None, sign: str = "±") -> str:
    """A score to be read, and its spread."""
    digits = 4 if abs(value) < 10 else 2
    return f"{value:.{digits}f}" + ("" if std is None else f" {sign} {std:.{digits}f}")
