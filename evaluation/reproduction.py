"""The figures of docs/results.md, derived again: which commands give each, where it stands, how far off it may be.

`docs/results.yaml` holds no figure. Of each it says where it stands in the document and where the commands leave it, so
that there is one place to change.
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
OF_INTERVAL = re.compile(r"\s*± [\d.]+\s?%")  # whose sign is that of the number before it too


@dataclass(frozen=True)
class Figure:
    """One number: where it stands (`cell`, the first cells of a row and the head of a column, of which the `number`-th,
    or `text`), and where the commands leave it (`key` of the JSON `file`, row and column of a report in Markdown, or
    `printed`); a difference of `within` is none."""

    within: float
    why: str
    cell: tuple[str, ...] | None = None
    text: str | None = None
    number: int = 0
    file: str | None = None
    key: tuple[str | int, ...] = ()
    printed: str | None = None

    @property
    def name(self) -> str:
        """As a reader of the document finds it."""
        counted = f" ({self.number + 1}.)" if self.number else ""
        return ", ".join(self.cell) + counted if self.cell else str(self.text)


@dataclass(frozen=True)
class Table:
    """A table of the document, or some figures of a section, and what gives it; `superseded` says why not any more."""

    name: str
    section: str
    cost: str
    commands: tuple[str, ...]
    figures: tuple[Figure, ...]
    commit: str | None = None  # None: of a publication, not measured here
    superseded: str | None = None
    document: Path = DOCUMENT


def read_index(path: Path = INDEX) -> tuple[dict[str, str], dict[str, Table]]:
    """What the commands' files are and where they come from, and the tables, by name."""
    index = yaml.safe_load(path.read_text())
    tables = {}
    for name, entry in index["tables"].items():
        of_all = {key: entry.pop(key) for key in ("file", "key", "why") if key in entry}
        figures = tuple(_figure({**of_all, **value}) for value in entry.pop("values", []))
        document = path.parent / entry.pop("document", DOCUMENT.name)
        commands = tuple(" ".join(command.split()) for command in entry.pop("commands"))
        tables[name] = Table(**entry, name=name, commands=commands, figures=figures, document=document)
    return index["files"], tables


def section(text: str, title: str) -> str:
    """What stands below a heading, up to the next of any level."""
    parts = re.split(r"^#{2,} +(.+)$", text, flags=re.MULTILINE)
    found = [body for heading, body in zip(parts[1::2], parts[2::2], strict=True) if heading.strip() == title]
    if len(found) != 1:
        raise ValueError(f"{len(found)} sections are called {title!r}")
    return found[0]


def rows(text: str) -> list[tuple[list[str], dict[str, str]]]:
    """Of all Markdown tables, each row as its cells, and as its cells by the heads of their columns."""
    found, head = [], []
    for line in text.splitlines():
        if not line.startswith("|"):
            head = []
            continue
        cells = [cell.strip().replace("\\", "") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if head and set(line) - set("|-: "):
            found.append((cells, dict(zip(head, cells, strict=True))))
        head = head or cells
    return found


def standing(figure: Figure, text: str) -> float:
    """The number that a section's text has for it; a ValueError where it has none, or several places."""
    if figure.cell:
        *first, column = figure.cell
        places = [row[column] for cells, row in rows(text) if cells[: len(first)] == first and column in row]
    else:
        places = _matches(str(figure.text), text)
    if len(places) != 1:
        raise ValueError(f"{figure.name!r} stands in {len(places)} places of its section, not in one")
    return _number(places[0], figure)


def obtained(figure: Figure, folder: Path, printed: str) -> float | None:
    """What the commands left for it in their folder, or printed; None where they did not."""
    if figure.printed:
        places = _matches(figure.printed, printed)
        return _number(places[-1], figure) if places else None
    path = folder / str(figure.file)
    if not path.is_file():
        return None
    if path.suffix == ".md":  # an ablation's report
        name, column = map(str, figure.key)
        places = [row[column] for cells, row in rows(path.read_text()) if cells[0].strip("*") == name and column in row]
        return _number(places[0], figure) if places else None
    value: Any = json.loads(path.read_text())
    for step in figure.key:
        named: Any = {one["name"]: one for one in value} if isinstance(value, list) else value
        if step not in named:
            return None
        value = named[step]
    return None if value is None else float(value)


def compare(table: Table, folder: Path) -> tuple[str, bool]:
    """A table of what stands and what was obtained, and whether each lies within its tolerance."""
    text, output = section(table.document.read_text(), table.section), folder / "output.txt"
    printed = output.read_text(errors="replace") if output.is_file() else ""
    lines, agreed = [["figure", "stands", "obtained", "may differ by", "agrees"]], True
    for figure in table.figures:
        expected, value = standing(figure, text), obtained(figure, folder, printed)
        agrees = value is not None and abs(value - expected) <= figure.within
        shown = "none" if value is None else f"{value:.5g}"
        lines.append([figure.name, f"{expected:.5g}", shown, f"{figure.within:g}", "yes" if agrees else "NO"])
        agreed = agreed and agrees
    return terminal(lines), agreed


def arguments(command: str, files: Mapping[str, str]) -> list[str]:
    """A command as it is started from another folder: this Python, this checkout's programs and configurations, and
    `files` in place of the names that stand for them."""
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    words = [str(ROOT / word) if re.match(r"[\w/]+\.(py|yaml)$", word) else word for word in words]
    for name, path in files.items():
        words = [re.sub(rf"(?<![\w./-]){re.escape(name)}(?![\w.-])", lambda _, path=path: path, word) for word in words]
    return words


def _figure(value: dict[str, Any]) -> Figure:
    settings: dict[str, Any] = {key: tuple(one) if isinstance(one, list) else one for key, one in value.items()}
    settings["within"] = float(value["within"])
    return Figure(**settings)


def _matches(pattern: str, text: str) -> list[str]:
    """What stands for {} in a sentence, wherever its lines break."""
    before, after = (r"\s+".join(map(re.escape, part.split())) for part in pattern.split("{}"))
    space = [r"\s+" if part[:1].isspace() or part[-1:].isspace() else "" for part in pattern.split("{}")]
    return [match[1] for match in re.finditer(rf"{before}{space[0]}({NUMBER.pattern}){space[1]}{after}", text)]


def _number(text: str, figure: Figure) -> float:
    found = list(NUMBER.finditer(text))
    if len(found) <= (0 if figure.text or figure.printed else figure.number):
        raise ValueError(f"{figure.name!r}: {text!r} has no number {figure.number}")
    match = found[figure.number if figure.cell else 0]
    is_share = match[0].endswith("%") or OF_INTERVAL.match(text, match.end())
    return float(match[0].replace(",", "").rstrip("% ")) / (100 if is_share else 1)
