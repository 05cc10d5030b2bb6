"""Combine the scores of several evaluations, as written by `evaluate.py`, in one table and one figure.

python scripts/compare.py --scores '[runs/DiT, runs/XSwin]'
python scripts/compare.py --scores '[flow.json, meanflow.json]' --names '[flow, MeanFlow]' --output calls

Writes OUTPUT.md, OUTPUT.tex (booktabs) and, if an evaluation was a sweep, OUTPUT.png and OUTPUT.pdf.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

from evaluation.table import latex, markdown
from experiment.cli import run_main
from settings import reads

# Formats of a table, and of a note below it, by suffix.
FORMS = {"md": (markdown, "\n{}"), "tex": (latex, "% {}")}


@dataclass(frozen=True)
class CompareConfig:
    """Compare scores of the same kind: of equally many samples, against the same images, on the same features.

    Args:
        scores: JSON files written by evaluate.py, or run folders with a scores.json
        names: their names in the table; by default the name of the run or file
        along: the setting on the figure's horizontal axis: 'guidance_scale', 'network_evaluations' per sample, or
            'model_calls' (a guided call may take two evaluations); by default the first that varies
        output: path of the files to write, without a suffix
    """

    scores: list[str] = reads("file or folder", [])
    names: list[str] = field(default_factory=list)
    along: Literal["guidance_scale", "network_evaluations", "model_calls"] | None = None
    output: str = "comparison"

    def check(self, prefix: str) -> None:
        if not self.scores:
            raise ValueError(f"{prefix}scores '[runs/A, runs/B]': name the evaluations to compare")
        if self.names and len(self.names) != len(self.scores):
            raise ValueError(f"{prefix}names: {len(self.names)} for {len(self.scores)} scores")


def main(config: CompareConfig) -> None:
    """Read the records, check that their scores compare, then print and write the table and the figure."""
    from evaluation.comparison import check_comparable, combined_rows, lines_of, read_record, varying_settings
    from evaluation.record import cost_of_sampling, draw_sweep, spread_notes, table
    from machine.atomic_files import keeping, write_atomic

    records = [read_record(Path(path)) for path in config.scores]
    check_comparable(config.scores, records)
    names = config.names or [record["rows"][0].name for record in records]
    if len(set(names)) < len(names):
        raise ValueError(f"--scores: several are of {max(names, key=names.count)}; tell them apart by --names '[A, B]'")
    rows = combined_rows(records, names)
    columns = varying_settings(rows)
    notes = spread_notes(rows)
    print("\n".join([table(rows, columns), *notes]))
    samples = [row for row in rows if row.settings]
    drawn = [row for row in samples if {"guidance_scale", "model_calls"} <= row.settings.keys()]
    if config.along == "network_evaluations" != cost_of_sampling(drawn):
        raise ValueError("--along network_evaluations: a record of an earlier version lacks it; give model_calls")
    lines = lines_of(drawn, columns)
    written = [Path(f"{config.output}.{suffix}") for suffix in FORMS]
    pictures = [Path(f"{config.output}.{suffix}") for suffix in ("png", "pdf")]
    with keeping([*written, *pictures]):  # of an earlier comparison, or of somebody else
        for path, (form, note) in zip(written, FORMS.values(), strict=True):
            text = table(rows, columns, form=form).rstrip("\n")
            write_atomic(path, "\n".join([text, *map(note.format, notes)]) + "\n")
        if len(drawn) > len({row.name for row in drawn}):
            for path in pictures:
                draw_sweep(drawn, path, lines, along=config.along)
            written += pictures
            if left_out := dict.fromkeys(row.name for row in samples if row not in drawn):
                print(f"not in the figure, as they state no guidance scale or number of calls: {', '.join(left_out)}")
    print("written: " + ", ".join(map(str, written)))


if __name__ == "__main__":
    run_main(main, CompareConfig)
