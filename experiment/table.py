"""Tables and numbers to be read, in a terminal or as Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """A table, aligned for the terminal; its first row is the head."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def number(value: float, std: float | None = None, sign: str = "±") -> str:
    """A score to be read, and its spread."""
    digits = 4 if abs(value) < 10 else 2
    return f"{value:.{digits}f}" + ("" if std is None else f" {sign} {std:.{digits}f}")
