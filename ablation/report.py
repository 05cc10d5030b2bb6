"""Report of an ablation: `report.html`, `report.md`, `table.tex`, `results.csv` and `figures/`, from its runs' JSON."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ablation.figures import draw_panels
from ablation.pictures import data_uri, read_pictures, save_side_by_side, side_by_side
from ablation.results import Results, read_results
from ablation.study import AblationConfig
from ablation.tables import (
    as_markdown,
    as_tex,
    cross_tabulate,
    header_cells,
    reference_cells,
    trials_csv,
    variant_cells,
)
from evaluation.plots import render_page
from evaluation.table import SIGNIFICANT, markdown, plain
from experiment.config import SamplingConfig
from machine.atomic_files import write_atomic
from metrics.scores import column_title, is_lower_better, num_digits

ALWAYS_SHOWN = ("sampler", "num_steps", "guidance_scale")  # other sampling settings only where not the default


def write_report(folder: Path, ablation: AblationConfig | None = None) -> str:
    """Write all files of the report, return a sentence that names them. Raises ValueError as `read_results` does."""
    results = read_results(folder, ablation)
    panels, pictures, notes = draw_panels(results), read_pictures(results), format_notes(results)
    tables, facts = cross_tabulate(results), format_facts(results)
    verdicts = {"What is claimed": format_claims(results), "What is decided": format_findings(results)}
    description = results.plan["ablation"]["description"]
    title = results.plan["ablation"]["title"] or folder.name
    missing = f"Not finished, and not in this report: {'; '.join(results.missing)}." if results.missing else ""

    groups = {"references": reference_cells(results), "models": variant_cells(results)}
    values: dict[str, Any] = {"title": title, "description": description, "missing": missing, "notes": notes}
    values |= {"head": header_cells(results), "groups": groups, "verdicts": verdicts, "crossed": tables}
    values |= {"panels": [*panels.values()], "pictures": pictures, "beside": side_by_side(pictures)}
    values |= {"data_uri": data_uri, "facts_of_results": facts}
    html = render_page("report.html", **values)  # self-contained: a browser needs no network to show it
    text = [f"# {plain(title)}", description, plain(missing), as_markdown(results), *map(plain, notes)]
    for heading, findings in verdicts.items():
        text += [f"## {heading}"] * bool(findings)
        for metric, sentences in findings.items():
            text.append("\n".join([f"{plain(metric)}:\n", *(f"- {plain(sentence)}" for sentence in sentences)]))
    for metric, rows in tables:
        text += [f"## {plain(metric)}", markdown(rows)]
    text += [f"![{name}](figures/{name}.png)\n\n*{caption}*" for name, (_, caption) in panels.items()]
    if side_by_side(pictures):
        save_side_by_side(pictures, folder / "figures" / "models.png")
        text.append("![samples](figures/models.png)")
    text.append("\n".join(f"- {name}: {plain(fact)}" for name, fact in facts.items()))

    write_atomic(folder / "report.html", html)
    write_atomic(folder / "report.md", "\n\n".join(filter(None, text)) + "\n")
    write_atomic(folder / "table.tex", as_tex(results, ablation.columns if ablation else ()))
    write_atomic(folder / "results.csv", trials_csv(results))
    return (
        f"report of {len(results.runs)} runs ({len(results.missing)} to go): {folder}/report.html, report.md, "
        "table.tex, results.csv, figures/"
    )


def format_notes(results: Results) -> list[str]:
    """Notes that a reader needs to understand the table."""
    extractor = results.runs[0].record["extractor"]
    num_seeds = max(len(variant.runs) for variant in results.variants)
    num_trials = max(len(run.trials) for run in results.runs)
    notes = [
        f"Mean ± standard deviation over {num_seeds} training seed{'s' * (num_seeds > 1)} and {num_trials} generation "
        f"trial{'s' * (num_trials > 1)} of each; bold: significantly better than every other. Seeds, data order "
        "and noise are the same for all. GFLOPs: one image, forward, counted; img/s and GB: of training, measured.",
        f"*: differs from {results.baseline.name} with p < {SIGNIFICANT} (two-sided t-test, paired over seeds, "
        "corrected by Holm's method for the variants compared)."
        if num_seeds > 1
        else "One training seed: the spread is that of generation only, no difference is tested, and nothing is bold.",
    ]
    records = [run.record for run in results.runs]
    keys = ("source_hash", "split", "image_size")
    references = {str([record["extractor_sha256"], *map(record["reference"].get, keys)]) for record in records}
    if (num := len(references)) > 1:
        notes.append(
            f"The runs were scored against {num} different references, or with extractors of different weights: "
            "only scores against the same reference and extractor are comparable."
        )
    samples = [(record.get("num_samples"), *map(record["samples"].get, ("labels", "precision"))) for record in records]
    if len(kinds := dict.fromkeys(samples)) > 1:
        listed = "; ".join(f"{num}, labels {labels}, {precision}" for num, labels, precision in kinds)
        notes.append(f"The runs were scored with different samples ({listed}), so their scores are not comparable.")
    if partly := [variant.name for variant in results.variants if variant.is_scored_in_part]:
        notes.append(f"Trials without a score, empty in results.csv, are left out of the means of {', '.join(partly)}.")
    if results.num_objectives > 1:
        notes.append("Losses of different objectives, latents or held-out images are not comparable: no column.")
    if extractor != "inception":
        notes.append(f"Features of {extractor}: distances compare these runs with each other, and are not FID.")
    return notes


def format_findings(results: Results) -> dict[str, list[str]]:
    """For each metric (by its title), a sentence per variant: better or worse than the baseline, or undecided."""
    findings = {}
    for metric in results.metrics:
        lower, differences = is_lower_better(metric), results.differences(metric)
        if lower is not None and differences:
            findings[column_title(metric)] = [
                difference.sentence(name, results.baseline.name, lower, num_digits(metric))
                for name, difference in differences.items()
            ]
    return findings


def format_claims(results: Results) -> dict[str, list[str]]:
    """For each metric (by its title), a sentence per claim: yes, no or undecided, and the difference that says so."""
    answers: dict[str, list[str]] = {}
    for metric in results.metrics:
        if (lower := is_lower_better(metric)) is None:
            continue
        differences = results.differences_of_claims(metric)
        for claim, (first, second) in results.claims.items():
            word, sentence = "undecided", f"{first} and {second} have no two seeds in common whose differences vary"
            if difference := differences.get(claim):
                word = ("yes" if difference.is_better(lower) else "no") if difference.is_decided else word
                sentence = difference.sentence(first, second, lower, num_digits(metric))
            answers.setdefault(column_title(metric), []).append(f"{claim}: {word}. {sentence}")
    return answers


def format_facts(results: Results) -> dict[str, str]:
    """Facts that are needed to reproduce the numbers: samples, reference, training, versions."""
    first = results.runs[0].record
    reference, samples = first["reference"], first["samples"]

    def sampled(name: str) -> str:
        return _distinct(run.record["samples"].get(name) for run in results.runs)

    def planned(name: str) -> str:
        return _distinct(run.plan[name] for run in results.runs)

    def versions_of(name: str) -> str:
        return _distinct(run.record["versions"].get(name) for run in results.runs)

    defaults = {name: value for name, value in asdict(SamplingConfig()).items() if name not in ALWAYS_SHOWN}
    settings = [item for run in results.runs for item in run.record["samples"].items()]
    changed = dict.fromkeys(name for name, value in settings if name in defaults and value != defaults[name])
    others = "".join(f", {name} {sampled(name)}" for name in changed)
    return {
        "samples": f"{first['num_samples']} a trial, labels {samples['labels']}, seed {sampled('seed')} and on",
        "reference": f"{first['num_reference']} images, {reference.get('split', '')} of {reference.get('source', '')}",
        "extractor": f"{first['extractor']}, sha256 {first['extractor_sha256']}",
        "sampling": f"{sampled('sampler')}, {sampled('num_steps')} steps, guidance {sampled('guidance_scale')}{others}",
        "training": f"{planned('num_steps')} steps of {planned('batch_size')}",
        "commit": sampled("trained_at_commit"),
        "versions": "; ".join(f"{name} {versions_of(name)}" for name in first["versions"]),
        "folder": results.folder.as_posix(),
    }


def _distinct(values: Iterable[object]) -> str:
    """Join the distinct values with commas, in order of first appearance."""
    return ", ".join(dict.fromkeys(map(str, values)))
