"""Reproduce the figures of docs/results.md and compare them within tolerances.

`docs/results.yaml` lists the commands. For each figure it says where the document prints it and where the commands
leave it, but not its value, so that a figure has to be changed in one place only.
"""

import json
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from evaluation.table import terminal

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT, INDEX = ROOT / "docs" / "results.md", ROOT / "docs" / "results.yaml"
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?\s?%?")
PERCENT_INTERVAL = re.compile(r"\s*± [\d.]+\s?%")  # its percent sign also applies to the number before it


@dataclass(frozen=True)
class Figure:
    """A number in the document, found by `cell` or `text`, and in the commands' results, by `file` or `printed`."""

    within: float  # tolerance
    why: str  # reason for the tolerance
    cell: tuple[str, ...] | None = None  # first cells of the row, and head of the column
    text: str | None = None  # sentence with {} in place of the number
    number: int = 0  # index among the numbers in the cell
    file: str | None = None  # written by the commands: JSON, or an ablation's report in Markdown
    key: tuple[str | int, ...] = ()  # path in the JSON, or row and column of the report
    printed: str | None = None  # sentence that the commands print, with {} in place of the number

    @property
    def name(self) -> str:
        """The position in the document, for readers."""
        ordinal = f" ({self.number + 1}.)" if self.number else ""
        return ", ".join(self.cell) + ordinal if self.cell else str(self.text)


@dataclass(frozen=True)
class Table:
    """A table of the document, or some figures of a section, and the commands that produce it."""

    name: str
    section: str
    cost: str
    commands: tuple[str, ...]
    figures: tuple[Figure, ...]
    commit: str | None = None  # None if published by others, not measured here
    superseded: str | None = None  # why the commands no longer produce it
    document: Path = DOCUMENT


def read_index(path: Path = INDEX) -> tuple[dict[str, str], dict[str, Table]]:
    """Read the descriptions of the commands' input files, and the tables, both by name."""
    index = yaml.safe_load(path.read_text())
    tables = {}
    for name, entry in index["tables"].items():
        defaults = {key: entry.pop(key) for key in ("file", "key", "why") if key in entry}
        figures = tuple(_figure({**defaults, **value}) for value in entry.pop("values", []))
        document = path.parent / entry.pop("document", DOCUMENT.name)
        commands = tuple(" ".join(command.split()) for command in entry.pop("commands"))
        tables[name] = Table(**entry, name=name, commands=commands, figures=figures, document=document)
    return index["files"], tables


def section(text: str, title: str) -> str:
    """Return the text below a heading, up to the next heading of any level."""
    parts = re.split(r"^#{2,} +(.+)$", text, flags=re.MULTILINE)
    bodies = [body for heading, body in zip(parts[1::2], parts[2::2], strict=True) if heading.strip() == title]
    if len(bodies) != 1:
        raise ValueError(f"{len(bodies)} sections are called {title!r}")
    return bodies[0]


def table_cells(text: str) -> list[tuple[list[str], dict[str, str]]]:
    """Parse the rows of all Markdown tables in a text, each as a list of cells and as cells by column head."""
    parsed, head = [], []
    for line in text.splitlines():
        if not line.startswith("|"):
            head = []
            continue
        cells = [cell.strip().replace("\\", "") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if head and set(line) - set("|-: "):
            parsed.append((cells, dict(zip(head, cells, strict=True))))
        head = head or cells
    return parsed


def documented_values(figure: Figure, text: str) -> float:
    """Read a figure from its section's text. Raises ValueError if it is missing or ambiguous."""
    if figure.cell:
        *first, column = figure.cell
        matches = [row[column] for cells, row in table_cells(text) if cells[: len(first)] == first and column in row]
    else:
        matches = _matches(str(figure.text), text)
    if len(matches) != 1:
        raise ValueError(f"{figure.name!r} stands in {len(matches)} places of its section, not in one")
    return _number(matches[0], figure)


def measured_values(figure: Figure, folder: Path, printed: str) -> float | None:
    """Read a figure from the commands' files in `folder`, or from their output `printed`; None if it is missing."""
    if figure.printed:
        matches = _matches(figure.printed, printed)
        return _number(matches[-1], figure) if matches else None
    path = folder / str(figure.file)
    if not path.is_file():
        return None
    if path.suffix == ".md":  # an ablation's report
        name, column = map(str, figure.key)
        cells_of_all = table_cells(path.read_text())
        matches = [row[column] for cells, row in cells_of_all if cells[0].strip("*") == name and column in row]
        return _number(matches[0], figure) if matches else None
    value: Any = json.loads(path.read_text())
    for key in figure.key:
        entries: Any = {entry["name"]: entry for entry in value} if isinstance(value, list) else value
        if key not in entries:
            return None
        value = entries[key]
    return None if value is None else float(value)


def compare(table: Table, folder: Path) -> tuple[str, bool]:
    """Compare a table with the results in a folder; return the comparison, and whether every figure agrees."""
    text, output = section(table.document.read_text(), table.section), folder / "output.txt"
    printed = output.read_text(errors="replace") if output.is_file() else ""
    lines, all_agree = [["figure", "stands", "obtained", "may differ by", "agrees"]], True
    for figure in table.figures:
        expected, value = documented_values(figure, text), measured_values(figure, folder, printed)
        agrees = value is not None and abs(value - expected) <= figure.within
        shown = "none" if value is None else f"{value:.5g}"
        lines.append([figure.name, f"{expected:.5g}", shown, f"{figure.within:g}", "yes" if agrees else "NO"])
        all_agree = all_agree and agrees
    return terminal(lines), all_agree


def arguments(command: str, files: Mapping[str, str]) -> list[str]:
    """Split a command to run anywhere, with this Python and checkout; `files` maps placeholders to paths."""
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    words = [str(ROOT / word) if re.match(r"[\w/]+\.(py|yaml)$", word) else word for word in words]
    for name, path in files.items():
        words = [re.sub(rf"(?<![\w./-]){re.escape(name)}(?![\w.-])", lambda _, path=path: path, word) for word in words]
    return words


def _figure(value: dict[str, Any]) -> Figure:
    settings: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
    settings["within"] = float(value["within"])
    return Figure(**settings)


def _matches(pattern: str, text: str) -> list[str]:
    """Find the numbers that stand for {} in a sentence, whose line breaks do not matter."""
    before, after = (r"\s+".join(map(re.escape, part.split())) for part in pattern.split("{}"))
    space = [r"\s+" if part[:1].isspace() or part[-1:].isspace() else "" for part in pattern.split("{}")]
    return [match[1] for match in re.finditer(rf"{before}{space[0]}({NUMBER.pattern}){space[1]}{after}", text)]


def _number(text: str, figure: Figure) -> float:
    matches = list(NUMBER.finditer(text))
    if len(matches) <= (0 if figure.text or figure.printed else figure.number):
        raise ValueError(f"{figure.name!r}: {text!r} has no number {figure.number}")
    match = matches[figure.number if figure.cell else 0]
    is_percentage = match[0].endswith("%") or PERCENT_INTERVAL.match(text, match.end())
    return float(match[0].replace(",", "").rstrip("% ")) / (100 if is_percentage else 1)
