"""The results of an evaluation: a JSON record, a table and figures."""

import glob
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from evaluation.scoring import Memorisation, Reference, Row, Scorer
from evaluation.sources import Source
from evaluation.table import number, terminal
from machine.accelerator import describe_device
from machine.atomic_files import unused_path, write_atomic
from metrics.features import Extractor
from metrics.scores import Score, metric_name, num_digits
from sampling.grids import save_grid

ENOUGH_FOR_INCEPTION_SCORE = 5000  # images per split; the literature splits 50,000 images into ten
LIKELIHOOD = "bits per dimension: {value:.4f} ± {std:.4f} over {num_images} held-out images"
LIBRARIES = ("torch", "torchvision", "diffusers", "accelerate", "torch-fidelity")


def provenance(rows: Sequence[Row], reference: Reference, scorer: Scorer) -> dict[str, Any]:
    """Compose the record: the first row's scores, all rows, and everything needed to reproduce them."""
    first, trials, extractor = rows[0], rows[0].trials, scorer.extractor
    record: dict[str, Any] = {"scores": first.to_dict()["scores"], "num_samples": trials[0].num_samples}
    record |= {"num_reference": reference.features.num, "num_trials": len(trials)}
    record |= {"extractor": extractor.name, "extractor_sha256": extractor.sha256, "settings": trials[0].settings}
    record |= {"samples": first.settings, "reference": reference.provenance, "evaluation": asdict(scorer.evaluation)}
    record |= {"rows": [row.to_dict() for row in rows], "machine": describe_device(scorer.accelerator)}
    return {**record, "commit": scorer.commit, "versions": {name: version(name) for name in LIBRARIES}}


def write_json(record: dict[str, Any], path: Path) -> None:
    """Write a record as strict JSON, with infinite numbers as text. An existing file is renamed instead of overwritten,
    unless all of its scores are computed again, on as many images."""
    record, existing = _strict(record), _read_json(path)
    if path.is_file() and path.stat().st_size and (what := _lost(existing, record)):
        print(f"{path} was of {what}, and is now {path.rename(unused_path(path))}")
    write_atomic(path, json.dumps(record, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def unfinished_path(path: Path, settings: str) -> Path:
    """Path of what is scored before the record at `path` is finished; other `settings` have another."""
    return path.with_name(f"{path.name}.unfinished-{hashlib.sha256(settings.encode()).hexdigest()[:8]}")


def write_unfinished(record: dict[str, Any], path: Path) -> None:
    """Write the record of what is scored so far, unless the file has as much; errors of the disk are ignored."""
    if _lost(_strict(record), _read_json(path)):
        with suppress(OSError):
            write_json(record, path)


def remove_unfinished(record: dict[str, Any], path: Path) -> None:
    """Remove the files of `write_unfinished` for the record at `path`, unless they have what it lacks."""
    for unfinished in path.parent.glob(f"{glob.escape(path.name)}.unfinished*"):
        if ".before-" not in unfinished.name and not _lost(_read_json(unfinished), _strict(record)):
            unfinished.unlink(missing_ok=True)


def _read_json(path: Path) -> Any:
    with suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return None


def _lost(existing: Any, record: Any) -> str:
    """What a file has that another lacks, in words; empty if nothing."""
    try:
        if _num_likelihood(existing) > _num_likelihood(record):
            return "the likelihood of more images"
        if int(existing["num_samples"]) > int(record["num_samples"]):  # of a trial; of trials, see `_scored`
            return "more images"
        if existing.get("extractor_sha256") != record.get("extractor_sha256"):
            return "another extractor"
        if existing.get("evaluation", {}).get("seed") != record.get("evaluation", {}).get("seed"):
            return "another seed"  # of subsets, whose rows do not state it
        networks = [one.get("perceptual", {}).get("sha256") for one in (existing, record)]
        if networks[0] not in (None, networks[1]):
            return "another perceptual distance"
        references = [[one.get("reference", {}).get(name) for name in REFERENCE] for one in (existing, record)]
        if references[0] != references[1]:
            return "another reference"
        before, now = _scored(existing), _scored(record)
    except (AttributeError, KeyError, TypeError, ValueError):  # not a record
        return "something else"
    if not before.keys() <= now.keys():
        return "other samples"
    is_complete = all(names <= now[images] for images, names in before.items())
    return "" if is_complete and existing.keys() <= record.keys() else "more scores"


def _num_likelihood(record: Any) -> int:
    """Number of images whose likelihood a record has."""
    return int(record.get("bits_per_dimension", {}).get("num_images", 0))


def _scored(record: Any) -> dict[str, set[str]]:
    """Names of the scores that have a value, and numbers of the trials, by the images that they are of."""
    found: dict[str, set[str]] = {}
    for row in record.get("rows", ()):
        about = {name: value for name, value in row["samples"].items() if not NO_SETTING.fullmatch(name)}
        names = found.setdefault(json.dumps([row["name"], about], sort_keys=True), set())
        names |= {name for name, score in row["scores"].items() if score["value"] is not None}
        names |= {f"trial {number}" for number in range(len(row.get("trials", ())))}
    return found


REFERENCE = ("source", "source_hash", "split", "image_size", "transparency")  # entries that identify a reference
NO_SETTING = re.compile("num_images|num_different|network_evaluations|.* img/s")  # entries that follow from others


def _strict(value: Any) -> Any:
    """Convert to what JSON gives back."""
    if isinstance(value, Mapping):
        return {str(name): _strict(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def table(
    rows: Sequence[Row],
    columns: Sequence[str] = (),
    *,
    of: str = "samples",
    form: Callable[[Sequence[Sequence[str]]], str] = terminal,
) -> str:
    """Format scores as a table with a row per source.

    Args:
        columns: settings to show before the metrics
        of: heading of the first column
        form: a format of `evaluation.table`
    """
    metrics = list(dict.fromkeys(name for row in rows for name in row.scores))
    cells = [[of, *columns, *metrics]]
    for row in rows:
        settings = [str(row.settings.get(column, "")) for column in columns]
        cells.append([row.name, *settings, *(_cell(metric, row.scores.get(metric)) for metric in metrics)])
    return form(cells)


def format_report(
    rows: Sequence[Row], columns: Sequence[str], reference: Reference, extractor: Extractor, extra: Mapping[str, Any]
) -> str:
    """Report the results and what a reader must know to interpret them. `extra` holds further entries of the record."""
    on = f"{extractor.name} (sha256 {extractor.sha256[:12]})"
    lines = [
        f"{rows[0].trials[0].num_samples} samples against {reference.features.num} images, on {on}",
        f"reference: {reference.provenance.get('split', 'a file')}, {reference.provenance['source']}",
        table(rows, columns),
        *notes(rows, extractor),
    ]
    if memorisation := extra.get("memorisation"):
        closer, copies = memorisation["closer_to_training_than_held_out"], memorisation["planted_copies_closer"]
        found = memorisation["planted_copies_found"]
        lines.append(
            f"A sample lies closer to the training images than a held-out image does {closer:.1%} of the time; "
            f"of copies of training images planted in their place, {copies:.1%} ({found:.1%} "
            "found their own original)" + ("." if copies > 0.9 else ": here the score is meaningless.")
        )
    if extractor.kind != "inception":
        lines.append(f"Distances on {on} compare runs with each other; they are not FID.")
    return "\n".join(lines)


def notes(rows: Sequence[Row], extractor: Extractor) -> list[str]:
    """Footnotes of a table: the meaning of each ±, and a warning about scores that are biased by few images."""
    first, lines = rows[0].trials[0], spread_notes(rows)
    name, splits = metric_name("is", extractor.kind, extractor.name), first.settings.get("is", {}).get("splits")
    is_known = name in first.scores and first.scores[name].value is not None
    if is_known and splits and (num := first.num_samples // splits) < ENOUGH_FOR_INCEPTION_SCORE:
        lines.append(f"{name}: biased low, with {splits} splits of {num} images; compare equal counts only")
    return lines


def spread_notes(rows: Sequence[Row]) -> list[str]:
    """The meaning of each ± in a table; of a score that has several, also the rows of each."""
    meanings: dict[str, dict[str, list[str]]] = {}  # rows by name of a score and meaning of its spread
    for row in rows:
        for name, score in row.scores.items():
            if score.spread:
                meanings.setdefault(name, {}).setdefault(score.spread, []).append(row.name)
    names: dict[str, list[str]] = {}  # of scores, by what is said of them
    for name, rows_of in meanings.items():
        for spread, of in rows_of.items():
            which = f" ({', '.join(dict.fromkeys(of))})" if len(rows_of) > 1 else ""
            names.setdefault(f"{spread}{which}", []).append(name)
    return [f"± of {', '.join(of)}: {note}" for note, of in names.items()]


def _cell(metric: str, score: Score | None) -> str:
    if score is None:
        return "-"
    return "none" if score.value is None else number(score.value, score.std, num_digits(metric))


def draw_pairs(samples: Source, train: Source, memorisation: Memorisation, path: Path) -> None:
    """Save the twelve samples that are closest to a training image, each above that image."""
    closest = memorisation.distances.argsort()[:12]
    pairs = torch.cat([samples.images(closest), train.images(memorisation.nearest[closest])])
    captions = [f"{distance:.3g}" for distance in memorisation.distances[closest].tolist()]
    save_grid(pairs, path, columns=len(closest), captions=[*captions, *["training"] * len(closest)])


def draw_sweep(rows: Sequence[Row], path: Path, columns: Sequence[str] = (), *, along: str | None = None) -> None:
    """Plot the first metric against a setting, `along`, and precision against recall.

    By default this is the guidance scale or, if only the number of steps varies, the number of network evaluations
    (`cost_of_sampling`). Each combination of other varying settings, in `SWEPT` and `columns`, is a line, in the order
    of the setting. Error bars show the spread over trials.
    """
    from matplotlib.figure import Figure

    distance = next(iter(rows[0].scores))
    names = dict.fromkeys(["run", *SWEPT, *columns])
    varying = [name for name in names if len({str(row.settings.get(name)) for row in rows}) > 1]
    is_guidance = "guidance_scale" in varying or "num_steps" not in varying
    along = along or ("guidance_scale" if is_guidance else cost_of_sampling(rows))
    follow = {along, *CALLS, *(["num_steps"] if along in CALLS else [])}
    others = [name for name in varying if name not in follow]
    lines: dict[str, list[Row]] = {}
    captions = {**SWEPT, "run": "{}"}
    for row in rows:
        labels = [captions.get(name, f"{name} {{}}").format(row.settings.get(name)) for name in others]
        lines.setdefault(", ".join(labels), []).append(row)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, line in lines.items():
        line.sort(key=lambda row: row.settings[along])
        positions = [row.settings[along] for row in line]
        left.errorbar(positions, *_values(line, distance), marker="o", capsize=3, label=name)
        recall, recall_error = _values(line, "recall")
        precision, precision_error = _values(line, "precision")
        right.errorbar(recall, precision, precision_error, recall_error, marker="o", capsize=3, label=name)
        for x, y, position in zip(recall, precision, positions, strict=True):
            right.annotate(f"{position:g}", (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
    left.set(xlabel=CALLS.get(along, along.replace("_", " ")), ylabel=distance)
    if along in CALLS:
        left.set_xscale("log", base=2)
        left.xaxis.set_major_formatter("{x:g}")
    right.set(xlabel="recall", ylabel="precision", title=f"numbers: {along.replace('_', ' ')}")
    right.title.set_fontsize(9)
    if len(lines) > 1:
        left.legend(frameon=False, fontsize=8)
    left.grid(alpha=0.3)
    right.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def cost_of_sampling(rows: Sequence[Row]) -> str:
    """Return the setting that tells how often the network is evaluated for a sample: the number of evaluations or, if a
    record of an earlier version lacks it, that of calls."""
    is_known = all("network_evaluations" in row.settings for row in rows if "model_calls" in row.settings)
    return "network_evaluations" if is_known else "model_calls"


CALLS = {
    "network_evaluations": "network evaluations",
    "model_calls": "model calls (a guided one evaluates the network twice)",
}
SWEPT = {"sampler": "{}", "spacing": "{}", "num_steps": "{} steps", "guidance_scale": "guidance {}"}


def _values(rows: Sequence[Row], metric: str) -> tuple[list[float], list[float]]:
    """Values and spreads of a metric; missing values are nan, which leaves a gap in a plot."""
    scores = [row.scores.get(metric) for row in rows]
    values = [score.value if score and score.value is not None else float("nan") for score in scores]
    return values, [(score.std or 0.0) if score else 0.0 for score in scores]
