"""Rows of several evaluations' records, after checking that their scores are comparable."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evaluation.record import REFERENCE, cost_of_sampling
from evaluation.scoring import Row
from metrics.scores import Score

SAME = {
    "num_samples": "samples; distances depend on their number",
    "num_reference": "reference images",
    "extractor_sha256": "extractor",
    "settings": "settings of metrics",
    **{f"reference.{entry}": "reference images" for entry in REFERENCE},
}
SWEEPABLE = ("sampler", "spacing", "num_steps", "model_calls", "network_evaluations")
SWEEPABLE += ("guidance_scale", "guidance_interval", "guidance_rescale")
# Without these, too, scores do not compare; those that differ within an evaluation are lines of a figure.
STATED = ("sampler_args", "spacing_sha256", "guidance_parallel", "guidance_radius", "guidance_checkpoint")
STATED += ("guide_sha256", "guidance_unlabelled", "legacy_cfg_channels", "clip")
STATED += ("autoencoder", "labels", "precision", "step")


def read_record(path: Path) -> dict[str, Any]:
    """Read an evaluation's record from a JSON file or from `scores.json` in a run's folder.

    Raises:
        ValueError: the file is no record of scores.
        OSError: it cannot be read.
    """
    if path.is_dir():
        path = path / "scores.json"
        if not path.exists():
            raise ValueError(f"--scores {path}: not found; `python evaluate.py --samples {path.parent}` writes it")
    if not path.is_file():
        raise ValueError(f"--scores {path}: no such file")
    try:
        record = json.loads(path.read_text())
        record["rows"] = [
            Row(row["name"], {name: Score(**score) for name, score in row["scores"].items()}, row["samples"], [])
            for row in record["rows"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--scores {path}: not a file of scores that evaluate.py has written") from error
    if not record["rows"]:
        raise ValueError(f"--scores {path}: it has no scores")
    return record


def check_comparable(names: Sequence[str], records: Sequence[Mapping[str, Any]]) -> None:
    """Refuse scores that differ in more than the samples: their number, the reference, the extractor, the metrics.

    Raises:
        ValueError: names the first record that differs from the first of all, and in what.
    """
    first = records[0]
    for name, record in zip(names, records, strict=True):
        for entry, what in SAME.items():
            values = [_entry(one, entry) for one in (first, record)]
            if entry == "settings":  # of the metrics that both have
                values = [{metric: value.get(metric) for metric in values[0].keys() & values[1]} for value in values]
            if values[0] != values[1]:
                shown = ": {} and {}".format(*values) if entry.startswith("num_") else ""
                raise ValueError(f"--scores {name}: its scores do not compare with {names[0]}, by other {what}{shown}")


def combined_rows(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Row]:
    """All rows, those of samples named after their evaluation, as their setting `run` is.

    Rows of real images and of reconstructions follow at the end, without settings: once where several evaluations
    agree, and else with the evaluation's name.
    """
    samples: list[Row] = []
    others: dict[str, Row] = {}
    for name, record in zip(names, records, strict=True):
        first = record["rows"][0]
        for row in record["rows"]:
            # A set of samples may be called as baselines are, which are of another kind.
            if (row.name, row.settings.get("kind")) == (first.name, first.settings.get("kind")):
                settings = {**row.settings, "run": name}
                if isinstance(codec := settings.get("autoencoder"), dict):
                    sha256 = codec.get("decoder_sha256")
                    settings["autoencoder"] = f"{codec.get('autoencoder')}{f' ({sha256[:6]})' if sha256 else ''}"
                samples.append(replace(row, name=name, settings=settings))
            elif row.scores != others.setdefault(row.name, replace(row, settings={})).scores:
                of_this = f"{row.name}, {name}"
                others[of_this] = replace(row, name=of_this, settings={})
    return [*samples, *others.values()]


def varying_settings(rows: Sequence[Row]) -> list[str]:
    """Names of the settings of sampling, and of the weights' steps, that differ among rows of samples."""
    samples = [row.settings for row in rows if row.settings]
    names = [
        name for name in (*SWEEPABLE, *STATED) if len({json.dumps(settings.get(name)) for settings in samples}) > 1
    ]
    return [name for name in names if name != "model_calls" or cost_of_sampling(rows) == name]


def lines_of(samples: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """Those of `columns` for which a figure needs a line per value. The others follow from the evaluation."""
    runs = [[row for row in samples if row.name == name] for name in {row.name for row in samples}]
    within = {name for rows in runs for name in varying_settings(rows)}
    return [name for name in columns if name in SWEEPABLE or name in within]


def _entry(record: Mapping[str, Any], name: str) -> Any:
    value: Any = record
    for part in name.split("."):
        value = value.get(part) or {}
    return value
