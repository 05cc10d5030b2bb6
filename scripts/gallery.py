"""Show all runs of a folder on one offline HTML page: differing settings, curves, grids and scores, sortable.

python scripts/gallery.py                # writes runs/gallery.html
"""

import base64
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml

sys.path.insert(0, str(Path(__file__).parent.parent))

from evaluation.table import Cell
from experiment.cli import run_main
from experiment.config import SamplingConfig
from experiment.mappings import flatten
from settings import reads

IGNORED = ("name", "resume", "log.", "data.cache")  # settings that do not affect results
OWN = '<div class="cards">'  # by which a gallery of before is told from other pages
CAPTIONS = {"loss": "Training loss.", "validation_loss": "Loss of the EMA weights on held-out images."}


class Run(NamedTuple):
    """The content of a run's folder."""

    name: str
    config: dict[str, Any]
    events: list[dict[str, Any]]
    scores: dict[str, float]
    scored_with: dict[str, Any]  # how the samples were generated, and what they were compared with
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

    folder: Path = reads("folder", Path("runs"))
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
    scored_with = scoring_differences(runs)
    logged = {"loss": "loss", "held-out loss": "validation_loss", "images/s": "images_per_second"}
    rows = []
    for run in runs:
        rows.append([run.name, *map(run.last, ("step", *logged.values())), *map(run.scores.get, scores)])
        rows[-1] += [*map(run.scored_with.get, scored_with), *map(run.config.get, differing)]
    cards = []
    for run in runs:
        picture = run.grid and "data:image/png;base64," + base64.b64encode(run.grid.read_bytes()).decode()
        settings = {name: json.dumps(run.config.get(name)) for name in differing}
        cards.append({"name": run.name, "picture": picture, "differences": settings})
    title = f"{len(runs)} runs in {folder.resolve().name}"
    head = ["run", "steps", *logged, *scores, *(f"scored with {name}" for name in scored_with), *differing]
    table = [[cell(value) for value in row] for row in rows]
    path = config.output or folder / "gallery.html"
    page = render_page("gallery.html", title=title, head=head, rows=table, panels=curves(runs), runs=cards)
    is_other = path.is_file() and OWN not in path.read_text(errors="replace")
    write_atomic(path, page, keep=is_other)
    print(f"{len(runs)} runs: {path}")


def read_run(folder: Path) -> Run:
    """Read configuration, log, scores and the newest grid."""
    from training.log import read_log

    config = flatten(yaml.safe_load((folder / "config.yaml").read_text()) or {})
    log, scores = folder / "log.jsonl", folder / "scores.json"
    record = json.loads(scores.read_text()) if scores.is_file() else {}
    values = {"scored at step": record.get("samples", {}).get("step"), "samples scored": record.get("num_samples")}
    values |= {name: score.get("value") for name, score in record.get("scores", {}).items() if isinstance(score, dict)}
    values = {name: value for name, value in values.items() if value is not None}
    events = read_log(log) if log.is_file() else []
    for part in reversed(json.loads(newest_metadata(folder).get("history", "[]"))):  # trained with other settings
        for name, former in part["settings"].items():
            config[name] = f"{former} until step {part['until']}, then {config.get(name)}"
    return Run(folder.name, config, events, values, scoring_of(record), newest_picture(folder))


def scoring_of(record: dict[str, Any]) -> dict[str, Any]:
    """The settings that must agree for the numbers of two records of scores to be comparable."""
    samples, reference = record.get("samples", {}), record.get("reference", {})
    names = [setting.name for setting in fields(SamplingConfig)]
    names += ["guide_sha256", "spacing_sha256", "labels", "precision"]
    values = {name: samples[name] for name in names if name in samples}
    codec = samples.get("autoencoder")
    hashes = {"autoencoder": codec.get("decoder_sha256") if isinstance(codec, dict) else None}
    hashes |= {"extractor": record.get("extractor_sha256"), "reference": reference.get("source_hash")}
    values |= {f"{name} (sha256)": text[:12] for name, text in hashes.items() if isinstance(text, str)}
    return values | {name: reference[name] for name in ("split",) if name in reference}


def newest_metadata(run: Path) -> dict[str, str]:
    """Metadata of a run's newest checkpoint; empty without one that can be read."""
    from checkpoints.checkpoint import WEIGHTS, CheckpointError, read_metadata
    from machine.checkpoint_folder import list_checkpoints

    with suppress(CheckpointError, IndexError):
        return read_metadata(list_checkpoints(run / "checkpoints")[-1] / WEIGHTS)
    return {}


def newest_picture(run: Path) -> Path | None:
    """The grid of the last step, or samples.png if the newest weights generated it. Older files of samples.png do not
    record their weights; the newer file is then chosen by its time, which a copy of the run may have changed."""
    from machine.checkpoint_folder import paths_by_step
    from sampling.grids import read_weights_hash

    pictures = [*[*paths_by_step(run / "samples", ".png").values()][-1:], *run.glob("samples.png")]
    metadata = newest_metadata(run)
    if len(pictures) == 2 and metadata and (weights := read_weights_hash(pictures[1])):
        return pictures[metadata.get("weights_sha256") == weights]
    return max(pictures, key=lambda picture: picture.stat().st_mtime, default=None)


def differences(runs: Sequence[Run]) -> list[str]:
    """Names of the settings that differ between runs."""
    names = sorted({name for run in runs for name in run.config if not name.startswith(IGNORED)})
    return [name for name in names if len({json.dumps(run.config.get(name)) for run in runs}) > 1]


def scoring_differences(runs: Sequence[Run]) -> list[str]:
    """Names of entries of `scored_with` that differ between runs, or from a run's own configuration."""

    def differs(name: str) -> bool:
        values = [(run.scored_with.get(name), run.config.get(f"sampling.{name}")) for run in runs if run.scored_with]
        is_other = any(configured not in (None, used) for used, configured in values)
        return is_other or len({json.dumps(used) for used, _ in values}) > 1

    return [name for name in dict.fromkeys(name for run in runs for name in run.scored_with) if differs(name)]


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
    from training.curves import label_by_numbers

    def plot(axes: Any, name: str) -> bool:
        lowest = 1.0
        for index, run in enumerate(runs):
            points = [(event["step"], event[name]) for event in run.events if event.get(name) is not None]
            if points:
                style: Any = {"color": color(index), "marker": marker(index) if len(points) < 20 else ""}
                axes.plot(*zip(*points, strict=True), label=run.name, linewidth=1, markersize=3.5, **style)
                lowest = min(lowest, *(loss for _, loss in points))
        axes.set(xlabel="step", ylabel=name.replace("_", " "))
        if lowest > 0:  # with a learned error scale, or a contrastive term, a loss may be negative
            axes.set_yscale("log")
            label_by_numbers(axes.yaxis)
        return bool(axes.lines)

    figures = {name: make_figure(lambda axes, name=name: plot(axes, name)) for name in CAPTIONS}
    return [(figure_to_svg(figure, name), CAPTIONS[name]) for name, figure in figures.items() if figure]


if __name__ == "__main__":
    run_main(main, GalleryConfig, first="folder")
