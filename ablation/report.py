"""`report.html`, `report.md`, `table.tex`, `results.csv` and `figures/` of an ablation, from its runs' JSON."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ablation.figures import PANELS, draw_panels
from ablation.pictures import Pictures, beside, data_uri, read_pictures, save_beside
from ablation.results import Results, read_results
from ablation.tables import as_markdown, as_tex, cells, crossed, head, reference_cells, trials_csv
from evaluation.plots import page
from evaluation.table import SIGNIFICANT, markdown, plain
from machine.whole_files import write_whole
from sampling.image_files import save_labelled


def write_report(folder: Path, columns: Sequence[str] = ()) -> str:
    """Write it all, `table.tex` with these columns; returns what was written, in words.

    Raises:
        ValueError: where no run is finished.
    """
    results = read_results(folder)
    panels, pictures = draw_panels(results), read_pictures(results)
    notes, facts = notes_of(results), facts_of(results)
    figures = save_pictures(pictures, folder / "figures")
    write_whole(folder / "report.html", as_page(results, panels, pictures, notes, facts))
    write_whole(folder / "report.md", as_text(results, [*panels], figures, notes, facts))
    write_whole(folder / "table.tex", as_tex(results, columns))
    write_whole(folder / "results.csv", trials_csv(results))
    return (
        f"report of {len(results.runs)} runs ({len(results.missing)} to go): {folder}/report.html, report.md, "
        "table.tex, results.csv, figures/"
    )


def save_pictures(pictures: list[Pictures], folder: Path) -> list[str]:
    """PNGs for a paper: models beside each other, and a grid of each."""
    if not pictures:
        return []
    save_beside(pictures, folder / "models.png")
    names = ["models.png"]
    for number, one in enumerate(pictures):
        names.append(f"classes-{number + 1}.png")
        rows = [(name, list(images)) for name, images in zip(one.classes, one.images, strict=True)]
        save_labelled(rows, [], folder / names[-1], scale=1)
    return names


def notes_of(results: Results) -> list[str]:
    """What a reader of the table has to know."""
    first = results.runs[0].record
    num_seeds = max(len(variant.runs) for variant in results.variants)
    num_trials = max(len(run.trials) for run in results.runs)
    notes = [
        f"Mean ± standard deviation over {num_seeds} training seed{'s' * (num_seeds > 1)} and {num_trials} generation "
        f"trial{'s' * (num_trials > 1)} of each; bold: the best of a column, where no other is shown the same. Seeds, "
        "data order and noise are the same for all. GFLOPs: one image, forward, counted; img/s and GB: of training, "
        "measured."
    ]
    notes.append(
        f"*: differs from {results.baseline.name} with p < {SIGNIFICANT} (two-sided t-test, paired over seeds; not "
        "corrected for their number)."
        if num_seeds > 1
        else "One training seed: the spread is that of generation alone, and no difference is tested."
    )
    of_images = ("source_hash", "split", "image_size")
    held = {str([run.record["extractor_sha256"], *map(run.record["reference"].get, of_images)]) for run in results.runs}
    if len(held) > 1:
        notes.append(
            f"The runs were scored against {len(held)} different references, or with extractors of different weights: "
            "only scores of the same can be compared."
        )
    if first["extractor"] != "inception":
        notes.append(
            f"Features of {first['extractor']}: distances compare these runs with each other, and are not FID."
        )
    return notes


def facts_of(results: Results) -> dict[str, Any]:
    """What it takes to derive the numbers again."""
    first = results.runs[0].record
    reference, samples = first["reference"], first["samples"]
    return {
        "samples": f"{first['num_samples']} a trial, labels {samples['labels']}, seed {samples['seed']} and on",
        "reference": f"{first['num_reference']} images, {reference.get('split', '')} of {reference.get('source', '')}",
        "extractor": f"{first['extractor']}, sha256 {first['extractor_sha256']}",
        "sampling": _common("sampler", results) + f", {_common('num_steps', results)} steps, guidance "
        f"{_common('guidance_scale', results)}",
        "training": f"{_planned('num_steps', results)} steps of {_planned('batch_size', results)}",
        "commit": ", ".join(dict.fromkeys(str(run.record["samples"]["trained_at_commit"]) for run in results.runs)),
        "versions": ", ".join(f"{name} {version}" for name, version in first["versions"].items()),
        "folder": results.folder.as_posix(),
    }


def _common(name: str, results: Results) -> str:
    return ", ".join(dict.fromkeys(str(run.record["samples"][name]) for run in results.runs))


def _planned(name: str, results: Results) -> str:
    return ", ".join(dict.fromkeys(str(run.plan[name]) for run in results.runs))


def as_page(
    results: Results, panels: dict[str, str], pictures: list[Pictures], notes: list[str], facts: dict[str, Any]
) -> str:
    """One file that a browser reads without a network: table, curves, pictures, and where the numbers come from."""
    return page(
        "report.html",
        title=results.title,
        description=results.plan["ablation"]["description"],
        missing=unfinished(results),
        head=head(results),
        groups={"references": reference_cells(results), "models": cells(results)},
        notes=notes,
        crossed=crossed(results),
        panels=[(svg, PANELS[name][1]) for name, svg in panels.items()],
        pictures=pictures,
        beside=beside(pictures) if pictures else [],
        data_uri=data_uri,
        facts_of_results=facts,
    )


def unfinished(results: Results) -> str:
    """What is left out, in words."""
    return f"Not finished, and not in this report: {'; '.join(results.missing)}." if results.missing else ""


def as_text(results: Results, panels: list[str], figures: list[str], notes: list[str], facts: dict[str, Any]) -> str:
    """Markdown, with the figures beside it."""
    parts = [f"# {plain(results.title)}", results.plan["ablation"]["description"], plain(unfinished(results))]
    parts += [as_markdown(results), *map(plain, notes)]
    for metric, rows in crossed(results):
        parts += [f"## {plain(metric)}", markdown(rows)]
    parts += [f"![{name}](figures/{name}.png)\n\n*{PANELS[name][1]}*" for name in panels]
    parts += [f"![samples](figures/{name})" for name in figures]
    parts.append("\n".join(f"- {name}: {plain(str(value))}" for name, value in facts.items()))
    return "\n\n".join(filter(None, parts)) + "\n"
