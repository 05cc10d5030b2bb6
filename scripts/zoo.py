"""Update docs/zoo.yaml and the table of docs/zoo.md from the checkpoints in this repository.

python scripts/zoo.py            (after one of them was replaced)

In docs/zoo.yaml the folder, the configuration (whose header has commands and cost), and the number and speed of images
seen in training are written by hand. Everything else is read from the files.
"""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parent.parent))

from evaluation.reproduction import table_cells
from evaluation.table import markdown
from experiment.cli import run_program
from machine.atomic_files import sha256_of, write_atomic

ROOT = Path(__file__).resolve().parent.parent
INDEX, DOCUMENT = ROOT / "docs" / "zoo.yaml", ROOT / "docs" / "zoo.md"
HEAD = "# Written by scripts/zoo.py from each folder's files, but for folder, config, images, images_per_second.\n"
BY_HAND = ("folder", "config", "images", "images_per_second")
MARKS = "<!-- python scripts/zoo.py writes this table -->", "<!-- to here -->"


def main() -> None:
    """Read the files and write both documents."""
    index = {name: entry(by_hand) for name, by_hand in yaml.safe_load(INDEX.read_text()).items()}
    write_atomic(INDEX, HEAD + yaml.safe_dump(index, sort_keys=False, width=120, allow_unicode=True))
    write_atomic(DOCUMENT, filled_in(DOCUMENT.read_text(), index))


def entry(by_hand: dict[str, Any], root: Path = ROOT) -> dict[str, Any]:
    """Compose a row of the index from the entries by hand and from the weights, their model card or their metrics."""
    from checkpoints.checkpoint import read_metadata  # imports torch, for which --help should not wait

    folder = root / by_hand["folder"]
    (weights,) = folder.glob("*.safetensors")
    with safe_open(weights, "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
        dtypes = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    metadata, metrics = read_metadata(weights), folder / "metrics.json"
    if metrics.is_file():  # an autoencoder
        facts = json.loads(metrics.read_text())
        scores = {name: f"{value:.2f} dB" for name, value in facts.items() if re.match(r"psnr_(?!images)", name)}
    else:
        facts = {"commit": metadata["commit"], "steps": int(metadata["step"])}
        card = (folder / "README.md").read_text()
        scores = {row["score"]: row["value"] for _, row in table_cells(card) if "halves" not in row["score"]}
        sampling = re.search(r"^- sampling: (.+)$", card, re.MULTILINE)
        facts |= {"sampling": sampling[1].replace("\\", "")} if sampling else {}
    head = re.match(r"(?:#.*\n)+", (root / by_hand["config"]).read_text())
    comment = re.sub(r"^# ?", "", head[0] if head else "", flags=re.MULTILINE)
    unbroken = comment.replace("\\\n", "")
    cost = re.search(r"^Cost: (.+?)(?=^\w+: |\Z)", comment, re.MULTILINE | re.DOTALL)
    return {
        **{name: by_hand[name] for name in BY_HAND},
        "cost": " ".join(cost[1].split()).rstrip(".") if cost else "not said",
        "commands": [" ".join(line.split()) for line in re.findall(r"^ +(python .+)$", unbroken, re.MULTILINE)],
        "file": weights.name,
        "sha256": sha256_of(weights),
        "bytes": weights.stat().st_size,
        "precision": sorted(dtypes),
        "parameters": sum(map(math.prod, shapes)),
        **{name: facts[name] for name in ("steps", "commit", "sampling") if name in facts},
        "scores": scores,
    }


def table(index: dict[str, dict[str, Any]]) -> str:
    lines = [["name", "parameters", "MB", "images seen", "img/s", "cost", "scores", "sha256"]]
    for name, row in index.items():
        scores = ", ".join(f"{score} {value}" for score, value in row["scores"].items())
        size, parameters = f"{row['bytes'] / 1e6:.1f}", f"{row['parameters'] / 1e6:.2f}M"
        speed = [f"{row['images']:,}", str(row["images_per_second"])]
        lines.append([name, parameters, size, *speed, row["cost"], scores, f"{row['sha256'][:12]}..."])
    return markdown(lines)


def filled_in(document: str, index: dict[str, dict[str, Any]]) -> str:
    """Replace the table between the marks in a document."""
    before, _, rest = document.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return f"{before}{MARKS[0]}\n\n{table(index)}\n\n{MARKS[1]}{after}"


if __name__ == "__main__":
    run_program(main)
