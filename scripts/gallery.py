"""All runs of a folder on one page that opens from disk: what differs, curves, grids, scores, sortable.

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

LEFT_OUT = ("name", "resume", "log.", "data.cache")  # of what differs: it changes no result
CAPTIONS = {"loss": "Training loss.", "validation_loss": "Loss on held-out images, of the averaged weights."}


class Run(NamedTuple):
    """What a training has left in its folder."""

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
        folder: with a run a folder
        output: the page; by default gallery.html in the folder
    """

    folder: Path
    output: Path | None = None


def main(config: GalleryConfig) -> None:
    """Read the runs, find what differs, fill in the page."""
    from evaluation.plots import page
    from machine.whole_files import write_whole

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
    write_whole(path, page("gallery.html", title=title, head=head, rows=table, panels=curves(runs), runs=cards))
    print(f"{len(runs)} runs: {path}")


def read_run(folder: Path) -> Run:
    """Configuration, log, scores and newest grid; a line of the log that was cut short is left out."""
    config = flatten(yaml.safe_load((folder / "config.yaml").read_text()) or {})
    log, scores = folder / "log.jsonl", folder / "scores.json"
    lines = log.read_text().splitlines() if log.is_file() else []
    record = json.loads(scores.read_text()) if scores.is_file() else {}
    about = {"scored at step": record.get("samples", {}).get("step"), "samples scored": record.get("num_samples")}
    known = {**{name: {"value": value} for name, value in about.items()}, **record.get("scores", {})}
    scored = {name: one.get("value") for name, one in known.items() if isinstance(one, dict)}
    values = {name: value for name, value in scored.items() if value is not None}
    events = [json.loads(line) for line in lines if line.endswith("}")]
    return Run(folder.name, config, events, values, newest_picture(folder))


def newest_picture(run: Path) -> Path | None:
    """The last step's grid, or samples.png where the newest weights drew it. What does not say whose it is, as those of
    before, is newest by the time of its file, which a copy of the run may not keep."""
    from checkpoints.checkpoint import WEIGHTS, CheckpointError, read_metadata
    from machine.checkpoint_folder import by_step, list_checkpoints
    from sampling.image_files import drawn_by

    pictures = [*[*by_step(run / "samples", ".png").values()][-1:], *run.glob("samples.png")]
    checkpoints = list_checkpoints(run / "checkpoints")
    if len(pictures) == 2 and checkpoints and (weights := drawn_by(pictures[1])):
        with suppress(CheckpointError):
            return pictures[read_metadata(checkpoints[-1] / WEIGHTS).get("weights_sha256") == weights]
    return max(pictures, key=lambda picture: picture.stat().st_mtime, default=None)


def differences(runs: Sequence[Run]) -> list[str]:
    names = sorted({name for run in runs for name in run.config if not name.startswith(LEFT_OUT)})
    return [name for name in names if len({json.dumps(run.config.get(name)) for run in runs}) > 1]


def cell(value: object) -> Cell:
    """Numbers sort as numbers; what there is none of comes last."""
    if value is None:
        return Cell("-")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return Cell(value if isinstance(value, str) else json.dumps(value))
    return Cell(f"{value:,}" if isinstance(value, int) else f"{value:.4g}", value)


def curves(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Training and held-out losses over the steps, as SVG, and their captions."""
    from evaluation.plots import color, draw, marker, svg_of

    def plot(axes: Any, name: str) -> bool:
        for number, run in enumerate(runs):
            points = [(event["step"], event[name]) for event in run.events if event.get(name) is not None]
            if points:
                look: Any = {"color": color(number), "marker": marker(number) if len(points) < 20 else ""}
                axes.plot(*zip(*points, strict=True), label=run.name, linewidth=1, markersize=3.5, **look)
        axes.set(xlabel="step", ylabel=name.replace("_", " "), yscale="log")
        return bool(axes.lines)

    figures = {name: draw(lambda axes, name=name: plot(axes, name)) for name in CAPTIONS}
    return [(svg_of(figure, name), CAPTIONS[name]) for name, figure in figures.items() if figure]


if __name__ == "__main__":
    with one_line_errors():
        main(parse(GalleryConfig, first="folder"))
