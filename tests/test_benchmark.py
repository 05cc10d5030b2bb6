"""scripts/benchmark.py as a user runs it."""

from processes import run


def test_a_table_with_every_row(tmp_path):
    flags = ("--models", "[DiT]", "--batch_size", 2, "--rounds", 1)
    flags += ("--model_args", "{dim: 32, depth: 2, num_heads: 2}")
    done = run("scripts/benchmark.py", *flags, cwd=tmp_path)
    head, _, row = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line
    )
    row = dict(zip(head, row, strict=True))
    assert row["model"] == "DiT"
    assert float(row["parameters"].removesuffix("M")) < 1
    assert float(row["training img/s"]) > 0
    assert float(row["calls img/s"]) > float(row["training img/s"])
    assert 0 < float(row["MFU"]) < 1
