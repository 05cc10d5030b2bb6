"""Show all runs of a folder on one offline HTML page: differing settings, curves, grids and scores, sortable.

python scripts/gallery.py runs/                # writes runs/gallery.html
"""

import base64
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

sys.path.insert(0, str(Path(__file__).parent.parent))

from evaluation.table import Cell
from experiment.cli import one_line_errors, parse
from experiment.mappings import flatten

IGNORED = ("name", "resume", "log.", "data.cache")  # settings that do not affect results
CAPTIONS = {"loss": "Training loss.", "validation_loss": "Loss on held-out images, of the averaged weights."}


class Run(NamedTuple):
    """The content of a run's folder."""

    name: str
    config: dict[str, Any]
    events: list[dict[str, Any]]
    scores: dict[str, float]
    grid: Path | None

    def last(self, name: str) -> float | None:
        return next((event[name] for event in reversed(self.events) if name in event), None)


@dataclass(frozen=True)
class GalleryConfig:
    """Write one HTML page of all runs.

    Args:
        folder: folder with runs in its subfolders
        output: HTML file; by default gallery.html in the folder
    """

    folder: Path
    output: Path | None = None


def main(config: GalleryConfig) -> None:
    """Read the runs, find their differences and write the page."""
    from evaluation.plots import render_page
    from machine.atomic_files import write_atomic

    folder = config.folder
    runs = [read_run(path.parent) for path in sorted(folder.glob("*/config.yaml"))]
    if not runs:
        raise ValueError(f"{folder}: no run in it; train.py and `make demo` make them in runs/")
    differing, scores = differences(runs), list(dict.fromkeys(name for run in runs for name in run.scores))
    logged = {"loss": "loss", "held-out loss": "validation_loss", "images/s": "images_per_second"}
    rows = [
        [run.name, *map(run.last, ("step", *logged.values())), *map(run.scores.get, scores)]
        + [run.config.get(name) for name in differing]
        for run in runs
    ]
    cards = []
    for run in runs:
        picture = run.grid and "data:image/png;base64," + base64.b64encode(run.grid.read_bytes()).decode()
        settings = {name: json.dumps(run.config.get(name)) for name in differing}
        cards.append({"name": run.name, "picture": picture, "differences": settings})
    title, head = f"{len(runs)} runs in {folder.resolve().name}", ["run", "steps", *logged, *scores, *differing]
    table = [[cell(value) for value in row] for row in rows]
    path = config.output or folder / "gallery.html"
    write_atomic(path, render_page("gallery.html", title=title, head=head, rows=table, panels=curves(runs), runs=cards))
    print(f"{len(runs)} runs: {path}")


def read_run(folder: Path) -> Run:
    """Read configuration, log, scores and the newest grid. Truncated lines of the log are ignored."""
    config = flatten(yaml.safe_load((folder / "config.yaml").read_text()) or {})
    log, scores = folder / "log.jsonl", folder / "scores.json"
    lines = log.read_text().splitlines() if log.is_file() else []
    record = json.loads(scores.read_text()) if scores.is_file() else {}
    values = {"scored at step": record.get("samples", {}).get("step"), "samples scored": record.get("num_samples")}
    values |= {name: score.get("value") for name, score in record.get("scores", {}).items() if isinstance(score, dict)}
    values = {name: value for name, value in values.items() if value is not None}
    events = [json.loads(line) for line in lines if line.endswith("}")]
    return Run(folder.name, config, events, values, newest_picture(folder))


def newest_picture(run: Path) -> Path | None:
    """The grid of the last step, or samples.png if the newest weights generated it. Older files of samples.png do not
    record their weights; the newer file is then chosen by its time, which a copy of the run may have changed."""
    from checkpoints.checkpoint import WEIGHTS, CheckpointError, read_metadata
    from machine.checkpoint_folder import by_step, list_checkpoints
    from sampling.grids import read_weights_hash

    pictures = [*[*by_step(run / "samples", ".png").values()][-1:], *run.glob("samples.png")]
    checkpoints = list_checkpoints(run / "checkpoints")
    if len(pictures) == 2 and checkpoints and (weights := read_weights_hash(pictures[1])):
        with suppress(CheckpointError):
            return pictures[read_metadata(checkpoints[-1] / WEIGHTS).get("weights_sha256") == weights]
    return max(pictures, key=lambda picture: picture.stat().st_mtime, default=None)


def differences(runs: Sequence[Run]) -> list[str]:
    """Names of the settings that differ between runs."""
    names = sorted({name for run in runs for name in run.config if not name.startswith(IGNORED)})
    return [name for name in names if len({json.dumps(run.config.get(name)) for run in runs}) > 1]


def cell(value: object) -> Cell:
    """Format a value. Numbers are sorted by value, and missing ones come last."""
    if value is None:
        return Cell("-")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return Cell(value if isinstance(value, str) else json.dumps(value))
    return Cell(f"{value:,}" if isinstance(value, int) else f"{value:.4g}", value)


def curves(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Plot training and validation losses over the steps as SVG, each with a caption."""
    from evaluation.plots import color, figure_to_svg, make_figure, marker

    def plot(axes: Any, name: str) -> bool:
        for index, run in enumerate(runs):
            points = [(event["step"], event[name]) for event in run.events if event.get(name) is not None]
            if points:
                style: Any = {"color": color(index), "marker": marker(index) if len(points) < 20 else ""}
                axes.plot(*zip(*points, strict=True), label=run.name, linewidth=1, markersize=3.5, **style)
        axes.set(xlabel="step", ylabel=name.replace("_", " "), yscale="log")
        return bool(axes.lines)

    figures = {name: make_figure(lambda axes, name=name: plot(axes, name)) for name in CAPTIONS}
    return [(figure_to_svg(figure, name), CAPTIONS[name]) for name, figure in figures.items() if figure]


if __name__ == "__main__":
    with one_line_errors():
        main(parse(GalleryConfig, first="folder"))
