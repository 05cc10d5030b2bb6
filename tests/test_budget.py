"""Cost estimates for training at ImageNet's scale, checked by hand and against the document that shows them."""

import pytest
from processes import ROOT, script

from experiment.cli import parse

BUDGET = script("scripts/budget.py")


def table(capsys, **settings):
    BUDGET.main(BUDGET.BudgetConfig(**settings))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return lines, [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def test_hours_by_hand(capsys):
    """DiT-XL/2 has 118.64 billion multiply-adds an image (Peebles and Xie 2023, table 4) and 675 million parameters."""
    _, (one, many) = table(
        capsys, models=["DiT-XL/2"], gpus=[1, 64], num_steps=1000, mfu=0.5, bus_gb=100.0, reading=135
    )
    assert (one["parameters"], one["GFLOP"]) == ("675M", "237")
    assert float(one["train"]) == pytest.approx(1000 * 256 * 3 * 2 * 118.64 / (989e3 * 0.5 * 3600), rel=0.01)
    assert float(one["sample"]) == pytest.approx(50_000 * 500 * 2 * 118.64 / (989e3 * 0.5 * 3600), rel=0.02)
    assert float(one["encode"]) == pytest.approx(1_281_167 / 135 / 3600, rel=0.01)
    assert one["limit"] == "arithmetic"
    assert many["limit"] == "sums"
    assert float(many["train"]) == pytest.approx(1000 * 2 * 4 * 675e6 * 63 / 64 / 100e9 / 3600, rel=0.01)


def test_the_document_shows_what_the_command_prints(capsys):
    lines, _ = table(capsys)
    assert "\n".join(lines) in (ROOT / "docs" / "scaling.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reading", "0.0"], r"--reading 0.0: must lie in \(0, inf\)"),
        (["--mfu", "40.0"], r"--mfu 40.0: must lie in \(0, 1\]"),
        (["--gpus", "[0]"], r"--gpus \[0\]: must lie in"),
        (["--gpus", "[]"], r"--gpus \[\]: give one at least"),
        (["--image_size", "40"], "--image_size 40 has to be a multiple of 32"),
    ],
)
def test_what_cannot_be_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        parse(BUDGET.BudgetConfig, flags)
