"""All runs of a folder on one page that opens from disk: what differs, curves, grids, scores, sortable.

python scripts/gallery.py runs/                # writes runs/gallery.html
"""

from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import yaml

sys.path.insert(0, str(Path(__file__).parent.parent))

TEMPLATE = Template((Path(__file__).parent / "gallery.html").read_text())
LEFT_OUT = ("name", "resume", "log.", "data.cache")  # of what differs: it changes no result


class Run(NamedTuple):
    """What a training has left in its folder."""

    name: str
    config: dict[str, Any]
    events: list[dict[str, Any]]
    scores: dict[str, float]
    grid: Path | None


def main(folder: Path, output: Path | None = None) -> None:
    """Write one HTML page of all runs.

    Args:
        folder: with a run a folder
        output: the page; by default gallery.html in the folder
    """
    from machine.whole_files import write_whole

    runs = [read_run(path.parent) for path in sorted(folder.glob("*/config.yaml"))]
    if not runs:
        raise ValueError(
            f"{folder}: no run in it, a folder with config.yaml; train.py and `make demo` make them in runs/"
        )
    path = output or folder / "gallery.html"
    write_whole(path, page(runs, folder.resolve().name))
    print(f"{len(runs)} runs: {path}")


def read_run(folder: Path) -> Run:
    """Configuration, log, scores and newest grid; a line of the log that was cut short is left out."""
    config = flat(yaml.safe_load((folder / "config.yaml").read_text()) or {})
    log, scores = folder / "log.jsonl", folder / "scores.json"
    lines = log.read_text().splitlines() if log.is_file() else []
    record = json.loads(scores.read_text()) if scores.is_file() else {}
    known = {"scored at step": {"value": record.get("samples", {}).get("step")}, **record.get("scores", {})}
    values = {
        name: one["value"] for name, one in known.items() if isinstance(one, dict) and one.get("value") is not None
    }
    grids = sorted((folder / "samples").glob("[0-9]*.png"))
    grid = folder / "samples.png" if (folder / "samples.png").is_file() else grids[-1] if grids else None
    return Run(folder.name, config, [json.loads(line) for line in lines if line.endswith("}")], values, grid)


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by the names that flags have."""
    settings = {}
    for key, value in config.items():
        nested = isinstance(value, dict) and value
        settings |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return settings


def differences(runs: Sequence[Run]) -> list[str]:
    """Settings in which runs differ."""
    names = sorted({name for run in runs for name in run.config if not name.startswith(LEFT_OUT)})
    return [name for name in names if len({json.dumps(run.config.get(name)) for run in runs}) > 1]


def page(runs: Sequence[Run], title: str) -> str:
    """One file, with nothing to load."""
    differing, metrics = differences(runs), list(dict.fromkeys(name for run in runs for name in run.scores))
    heads = ["run", "steps", "loss", "held-out loss", "images/s", *metrics, *differing]
    rows = [
        [
            run.name,
            run.events[-1]["step"] if run.events else None,
            last(run, "loss"),
            last(run, "validation_loss"),
            last(run, "images_per_second"),
            *(run.scores.get(name) for name in metrics),
            *(run.config.get(name) for name in differing),
        ]
        for run in runs
    ]
    head = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in heads)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    cards = "".join(card(run, differing) for run in runs)
    curve = curves(runs)
    return TEMPLATE.substitute(
        title=f"{len(runs)} runs in {escape(title)}",
        table=f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>",
        curves=f'<h2>Curves</h2><div class="cards">{curve}</div>' if curve else "",
        cards=cards,
    )


def last(run: Run, name: str) -> float | None:
    """The newest value in the log."""
    return next((event[name] for event in reversed(run.events) if name in event), None)


def cell(value: object) -> str:
    """Numbers sort as numbers; what there is none of comes last."""
    if value is None:
        return "<td>-</td>"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"<td>{escape(value if isinstance(value, str) else json.dumps(value))}</td>"
    return f'<td data-value="{value!r}">{f"{value:,}" if isinstance(value, int) else f"{value:.4g}"}</td>'


def card(run: Run, differing: Sequence[str]) -> str:
    """A run's grid, and what sets it apart."""
    picture = "<p>No samples yet.</p>"
    if run.grid is not None:
        data = base64.b64encode(run.grid.read_bytes()).decode()
        picture = f'<img src="data:image/png;base64,{data}" alt="samples of {escape(run.name)}" loading="lazy">'
    said = [f"<dt>{escape(name)}</dt><dd>{escape(json.dumps(run.config.get(name)))}</dd>" for name in differing]
    return f"<section><h3>{escape(run.name)}</h3>{picture}<dl>{''.join(said)}</dl></section>"


def curves(runs: Sequence[Run]) -> str:
    """Training and held-out losses over the steps, as SVG."""
    from matplotlib.figure import Figure

    panels = []
    for name, title in (("loss", "training loss"), ("validation_loss", "held-out loss, averaged weights")):
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for run in runs:
            points = [(event["step"], event[name]) for event in run.events if event.get(name) is not None]
            if points:
                marker = "o" if len(points) < 20 else ""
                axes.plot(*zip(*points, strict=True), label=run.name, linewidth=1, marker=marker)
        if axes.lines:
            axes.set(xlabel="step", title=title, yscale="log")
            axes.grid(alpha=0.3)
            axes.legend(frameon=False, fontsize=8)
            with io.StringIO() as file:
                figure.savefig(file, format="svg", metadata={"Date": None})
                panels.append(file.getvalue())
    return "".join(f"<div>{svg[svg.index('<svg') :]}</div>" for svg in panels)


if __name__ == "__main__":
    from experiment.cli import one_line_errors, run_program

    with one_line_errors():
        run_program(main, as_positional=True)
