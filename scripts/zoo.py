"""Maintain docs/zoo.yaml and the table of docs/zoo.md, the index of the checkpoints trained with this project.

    python scripts/zoo.py add --name faces --run runs/anime-fast --configuration configs/anime/fast.yaml \
        --images 2304000 --scores '[runs/anime-fast/scores.json]' --within '{"frechet_distance[mobilenet_v2]": 23}'
    python scripts/zoo.py check --name faces --run runs/anime-fast --scores '[runs/anime-fast/scores.json]'
    python scripts/zoo.py update              (after a file in the repository or the header of a configuration changed)

A row has the hash of the weights that `push_to_hub.py --half true --dry_run FOLDER` writes. Checkpoints whose row names
a folder are part of the repository; the commands of a row make the others.
"""

import json
import math
import re
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent.parent))

from evaluation.reproduction import table_cells
from evaluation.table import markdown, terminal
from experiment.cli import run_program
from experiment.inputs import KINDS
from machine.atomic_files import sha256_of, write_atomic

ROOT = Path(__file__).resolve().parent.parent
INDEX, DOCUMENT = ROOT / "docs" / "zoo.yaml", ROOT / "docs" / "zoo.md"
HEAD = (
    "# Written by scripts/zoo.py. By hand, of rows with a folder: folder, config, images, images_per_second, within.\n"
)
BY_HAND = ("folder", "config", "images", "images_per_second", "within")
MARKS = "<!-- python scripts/zoo.py writes this table -->", "<!-- to here -->"


def add(
    name: str,
    run: Path,
    configuration: Path,  # `config` is a flag of the parser's own
    scores: list[Path],
    within: dict[str, float],
    images: int | None = None,
) -> None:
    """Add the checkpoint of a run to the index, or replace its row.

    Args:
        name: name of the row
        run: the run's folder, or one of its checkpoints
        configuration: the one in the repository whose header has the commands and their cost
        scores: files of evaluate.py's or recognise.py's --output; of several evaluations in a file the first counts
        within: by score, the largest difference at which another training of this configuration counts as the same
        images: images seen in training, with those of the weights that it started from; by default those of its steps
    """
    from checkpoints.checkpoint import read_metadata
    from training.log import read_log
    from training.resumption import images_seen

    checkpoint = opened(run)
    origin, batch_size = checkpoint.config.init_from, checkpoint.config.train.batch_size
    seen = images_seen(read_metadata(checkpoint.path), checkpoint.step, batch_size)
    if not (configuration.is_file() and configuration.resolve().is_relative_to(ROOT)):
        raise ValueError(
            f"--configuration {configuration}: not a file of this repository, as configs/quickstart.yaml is"
        )
    path = configuration.resolve().relative_to(ROOT).as_posix()
    if images is None and origin:
        raise ValueError(f"--images: the run started from {origin}; give the sum of the images that both have seen")
    log_file = checkpoint.run / "log.jsonl"
    if not log_file.is_file():
        raise ValueError(f"--run {run}: {log_file} does not exist; give the folder of a training")
    speeds = [event["images_per_second"] for event in read_log(log_file) if "images_per_second" in event]
    if not speeds:
        raise ValueError(f"--run {run}: {log_file} has no speeds; train with --log.every above 0")
    values, sampling = read_scores(scores, checkpoint)
    if not all(largest >= 0 for largest in within.values()) or (images is not None and images < 1):
        raise ValueError(f"--within, --images: {within}, {images}; differences are at least 0, images at least 1")
    if unknown := within.keys() - values.keys():
        raise ValueError(f"--within: {', '.join(sorted(unknown))} is not in --scores, which have {', '.join(values)}")
    with tempfile.TemporaryDirectory() as folder:
        weights = published(checkpoint, Path(folder))
        row = {
            "config": path,
            "images": images or seen,
            "images_per_second": round(statistics.median(speeds)),
            "within": within,
            **described(path),
            **facts_of(weights),
            "steps": checkpoint.step,
            "commit": checkpoint.commit,
            **({"sampling": sampling} if sampling else {}),
            "scores": {score: text for score, (text, _) in values.items()},
        }
    write({**read_index(), name: row})
    print(f"{name}: {row['sha256']}")


def check(name: str, run: Path, scores: list[Path] | None = None) -> None:
    """Compare a checkpoint that was made elsewhere with its row: by its hash, or else by its scores. The exit status
    is 1 if they differ.

    Args:
        name: name of the row
        run: the run's folder, a checkpoint, or a folder for the hub
        scores: files of evaluate.py's or recognise.py's --output, for weights that are not the same
    """
    from checkpoints.checkpoint import read_metadata

    index = read_index()
    if name not in index:
        raise ValueError(f"--name {name}: not in {INDEX.name}, which has {', '.join(index)}")
    row, checkpoint = index[name], opened(run)
    with tempfile.TemporaryDirectory() as folder:
        weights = published(checkpoint, Path(folder))
        if row["sha256"] in (sha256_of(weights), sha256_of(checkpoint.path)):
            return print(f"{name}: the same file")
        if row.get("weights_sha256") == read_metadata(weights)["weights_sha256"]:
            return print(f"{name}: the same weights; the file also has the commit, and names of data, which differ")
    if not row.get("within"):
        raise ValueError(f"{name}: other weights, and its row has no tolerance for scores")
    if not scores:
        raise ValueError(f"{name}: other weights; give --scores with {', '.join(row['within'])} to compare")
    values, _ = read_scores(scores, checkpoint)
    if missing := row["within"].keys() - values.keys():
        raise ValueError(f"--scores: they lack {', '.join(sorted(missing))}")
    lines, agrees = [["score", "in the index", "here", "within", ""]], True
    for score, largest in row["within"].items():
        listed = float(row["scores"][score].split()[0])
        near = abs(values[score][1] - listed) <= largest
        agrees &= near
        lines.append([score, row["scores"][score], values[score][0], f"{largest:g}", "" if near else "differs"])
    print(f"{name}: other weights\n{terminal(lines)}")
    if not agrees:
        sys.exit(1)
    return None


def update() -> None:
    """Read the files in the repository and the headers of configurations, and write both documents."""
    write({name: current(row) for name, row in read_index().items()})


def opened(run: Path) -> Any:
    """The checkpoint that `--run` names."""
    from checkpoints.checkpoint import open_checkpoint

    kind = KINDS["checkpoint"]
    if not kind.exists(str(run)):
        raise ValueError(f"--run {run}{kind.problem}")
    return open_checkpoint(run)


def current(row: dict[str, Any]) -> dict[str, Any]:
    """A row as the files in the repository have it now."""
    return entry(row) if "folder" in row else {**row, **described(row["config"])}


def read_index() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(INDEX.read_text())


def write(index: dict[str, dict[str, Any]]) -> None:
    """Write the index and the document's table."""
    write_atomic(INDEX, HEAD + yaml.safe_dump(index, sort_keys=False, width=120, allow_unicode=True))
    write_atomic(DOCUMENT, filled_in(DOCUMENT.read_text(), index))


def published(checkpoint: Any, folder: Path) -> Path:
    """Write the checkpoint's weights as push_to_hub.py does with --half true, and return the file."""
    from checkpoints.checkpoint import WEIGHTS
    from sharing.model_card import write_published

    write_published({WEIGHTS: checkpoint.path}, folder, half=True)
    checkpoint.check_unchanged()
    return folder / WEIGHTS


def read_scores(paths: list[Path], checkpoint: Any) -> tuple[dict[str, tuple[str, float]], str]:
    """Return text and value of each score in files of evaluate.py or recognise.py, and how samples were drawn. Raises
    ValueError for scores of other weights, or of samples that were drawn in several ways."""
    from sharing.model_card import format_sampling, listed, score_texts

    values, sampling = {}, {}
    for path in paths:
        try:
            record = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"--scores {path}: no file of evaluate.py's or recognise.py's --output") from error
        samples = record.get("samples", {})
        own = checkpoint.weights_sha256
        if samples.get("weights_sha256", own) != own:
            raise ValueError(f"--scores {path}: of other weights than {checkpoint.path}")
        scores = record.get("scores", {})
        values |= {name: (text, scores[name]["value"]) for name, text in score_texts(record) if "halves" not in name}
        if "class_agreement" in record:
            share, num = record["class_agreement"], record["num_samples"]
            values["class_agreement"] = f"{share:.3f} of {num} samples", share
        drawn = {name: value for name, value in format_sampling(checkpoint, samples).items() if value is not None}
        if sampling and drawn and drawn != sampling:
            raise ValueError(
                f"--scores {path}: its samples were drawn otherwise: {listed(drawn)}, not {listed(sampling)}"
            )
        sampling = sampling or drawn
    return values, listed(sampling).replace("\\", "")


def entry(by_hand: dict[str, Any], root: Path = ROOT) -> dict[str, Any]:
    """Compose a checkpoint's row from the entries by hand, the weights, and their card or metrics."""
    from checkpoints.checkpoint import read_metadata  # imports torch, for which --help should not wait

    folder = root / by_hand["folder"]
    (weights,) = folder.glob("*.safetensors")
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
    return {
        **{name: by_hand[name] for name in BY_HAND if name in by_hand},
        **described(by_hand["config"], root),
        **facts_of(weights),
        **{name: facts[name] for name in ("steps", "commit", "sampling") if name in facts},
        "scores": scores,
    }


def described(config: str, root: Path = ROOT) -> dict[str, Any]:
    """Read cost and commands from the header of a configuration."""
    head = re.match(r"(?:#.*\n)+", (root / config).read_text())
    comment = re.sub(r"^# ?", "", head[0] if head else "", flags=re.MULTILINE)
    cost = re.search(r"^Cost: (.+?)(?=^\w+: |^$|\Z)", comment, re.MULTILINE | re.DOTALL)
    commands = re.findall(r"^ +(python .+)$", comment.replace("\\\n", ""), re.MULTILINE)
    return {
        "cost": " ".join(cost[1].split()).rstrip(".") if cost else "not said",
        "commands": [" ".join(line.split()) for line in commands],
    }


def facts_of(weights: Path) -> dict[str, Any]:
    """Describe a file of weights: name, hashes of the file and of the tensors in it, size and precision."""
    from safetensors import safe_open

    with safe_open(weights, "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
        dtypes = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        of_tensors = (file.metadata() or {}).get("weights_sha256")
    return {
        "file": weights.name,
        "sha256": sha256_of(weights),
        **({"weights_sha256": of_tensors} if of_tensors else {}),
        "bytes": weights.stat().st_size,
        "precision": sorted(dtypes),
        "parameters": sum(map(math.prod, shapes)),
    }


def table(index: dict[str, dict[str, Any]]) -> str:
    """Format the index as a table; of scores on MobileNetV2 it leaves the extractor's name out."""
    lines = [["name", "scores", "images seen", "img/s", "cost", "size", "where", "sha256"]]
    for name, row in index.items():
        scores = ", ".join(f"{score} {value}" for score, value in row["scores"].items())
        size = f"{row['parameters'] / 1e6:.2f}M, {row['bytes'] / 1e6:.1f} MB"
        speed = [f"{row['images']:,}", str(row["images_per_second"])]
        where = row.get("folder", f"made by {row['config']}")
        scores = scores.replace("[mobilenet_v2]", "")
        lines.append([name, scores, *speed, row["cost"], size, where, f"{row['sha256'][:12]}..."])
    return markdown(lines)


def filled_in(document: str, index: dict[str, dict[str, Any]]) -> str:
    """Replace the table between the marks in a document."""
    before, _, rest = document.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return f"{before}{MARKS[0]}\n\n{table(index)}\n\n{MARKS[1]}{after}"


if __name__ == "__main__":
    run_program([add, check, update])
