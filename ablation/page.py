"""The report as one file that a browser reads without a network."""

from __future__ import annotations

from html import escape
from pathlib import Path
from string import Template

from ablation.figures import CAPTIONS
from ablation.pictures import Pictures, beside, data_uri
from ablation.results import Results
from ablation.tables import Cell, cells, crossed, head, is_significant, reference_cells

TEMPLATE = Template((Path(__file__).parent / "page.html").read_text())


def page(results: Results, panels: dict[str, str], pictures: list[Pictures], notes: list[str], facts: dict) -> str:
    """Table, curves, pictures, and what it takes to derive them again."""
    lead = [f"<p>{escape(results.plan['ablation']['description'])}</p>"]
    if results.missing:
        text = f"Not finished, and not in this report: {'; '.join(results.missing)}."
        lead.append(f'<p class="warning">{escape(text)}</p>')
    sections = [_table(results, notes), _crossed(results), _panels(panels)]
    if pictures:
        sections += [_beside(pictures), _models(pictures)]
    sections.append(_facts(facts))
    width = pictures[0].images.shape[3] * pictures[0].images.shape[1] if pictures else 0
    return TEMPLATE.substitute(
        title=escape(results.title),
        lead="\n".join(lead),
        sections="\n".join(sections),
        columns=max(1, len(pictures)),
        strip=int(1.25 * width),
    )


def _table(results: Results, notes: list[str]) -> str:
    heads = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in head(results))
    bodies = {"references": reference_cells(results), "models": cells(results)}
    body = "".join(
        f'<tbody class="{name}">{"".join(_row(row) for row in rows)}</tbody>' for name, rows in bodies.items() if rows
    )
    below = "".join(f'<p class="soft">{escape(note)}</p>' for note in notes)
    table = (
        f'<div class="scroll" tabindex="0"><table class="sortable"><thead><tr>{heads}</tr></thead>{body}</table></div>'
    )
    return f'<section id="scores"><h2>Scores and costs</h2>{table}{below}</section>'


def _crossed(results: Results) -> str:
    tables = []
    for metric, (heads, *rows) in crossed(results):
        head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
        body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        table = f'<table class="plain"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        tables.append(f'<div><h3>{escape(metric)}</h3><div class="scroll" tabindex="0">{table}</div></div>')
    title = "<h2>One factor against the other</h2>"
    return f'<section id="crossed">{title}<div class="panels">{"".join(tables)}</div></section>' if tables else ""


def _row(row: list[Cell]) -> str:
    return f"<tr>{''.join(_cell(cell) for cell in row)}</tr>"


def _cell(cell: Cell) -> str:
    text = f"<b>{escape(cell.text)}</b>" if cell.best else escape(cell.text)
    value = "" if cell.value is None else f' data-value="{cell.value!r}"'
    title = "" if cell.p is None else f' title="p = {cell.p:.3g}"'
    return f"<td{value}{title}>{text}{'<sup>*</sup>' if is_significant(cell) else ''}</td>"


def _panels(panels: dict[str, str]) -> str:
    figures = [
        f"<figure>{svg}<figcaption>{escape(CAPTIONS[name])}</figcaption></figure>" for name, svg in panels.items()
    ]
    return f'<section id="curves"><h2>Curves</h2><div class="panels">{"".join(figures)}</div></section>'


def _beside(pictures: list[Pictures]) -> str:
    names = "".join(f'<div class="name">{escape(one.variant)}</div>' for one in pictures)
    rows = []
    for name, blocks in beside(pictures):
        images = "".join(
            f'<img src="{data_uri(block, 2)}" alt="{escape(name)} by {escape(one.variant)}">'
            for block, one in zip(blocks, pictures, strict=True)
        )
        rows.append(f'<div class="class">{escape(name.replace("_", " "))}</div>{images}')
    note = "Every model from the same noise: the first four samples of each class."
    grid = f'<div class="beside"><div></div>{names}{"".join(rows)}</div>'
    return f'<section id="beside"><h2>Models beside each other</h2><p class="soft">{note}</p>{grid}</section>'


def _models(pictures: list[Pictures]) -> str:
    blocks = []
    for one in pictures:
        strips = "".join(
            f'<div class="strip"><span>{escape(name.replace("_", " "))}</span>'
            f'<img src="{data_uri(images, len(images))}" alt="{escape(name)} by {escape(one.variant)}"></div>'
            for name, images in zip(one.classes, one.images, strict=True)
        )
        blocks.append(f"<div><h3>{escape(one.variant)}</h3>{strips}</div>")
    return f'<section id="models"><h2>Class by class</h2><div class="classes">{"".join(blocks)}</div></section>'


def _facts(facts: dict) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
    return f'<section id="provenance"><h2>Where the numbers come from</h2><dl>{rows}</dl></section>'
