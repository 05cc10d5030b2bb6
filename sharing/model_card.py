"""Model card of a checkpoint, filled in from the files of its run: configuration, curves, samples and scores."""

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from torch import Tensor

from checkpoints.checkpoint import WEIGHTS, Checkpoint, read_metadata, read_tensors, save_tensors
from evaluation.table import code, markdown, plain
from experiment.config import SamplingConfig
from sampling.grids import read_settings, read_weights_hash

TEMPLATE = Path(__file__).parent.parent / "assets" / "model_card.md"
# Settings that hold a path, and settings whose values are names even where they contain a slash.
PATH_SETTINGS = {"path", "cache", "resume", "init_from", "guidance_checkpoint", "weights_path", "checkpoint"}
NAME_SETTINGS = {"classes", "exclude_classes"}
PICTURES = {"samples.png": "Samples", "loss.png": "Loss", "progress.png": "The same noise in the course of training"}
SHOWN = ("config.yaml", "scores.json", "imported.json", *PICTURES)  # published with the weights, where they exist


def card_files(checkpoint: Checkpoint) -> dict[str, Path]:
    """Find the files to publish with the weights, by their name on the hub; scores of other weights are left out."""
    run, mark = checkpoint.run, checkpoint.output_suffix
    marked = {"scores.json": f"scores{mark}.json", "samples.png": f"samples{mark}.png"}
    files = {name: run / marked.get(name, name) for name in SHOWN if (run / marked.get(name, name)).is_file()}
    for name in marked.keys() & files.keys():
        if not _belongs_to(checkpoint, files[name]):
            del files[name]
    grid = run / "samples" / f"{checkpoint.step:08d}.png"
    if "samples.png" not in files and checkpoint.path.name == WEIGHTS and grid.is_file():
        files["samples.png"] = grid
    return files


def _belongs_to(checkpoint: Checkpoint, path: Path) -> bool:
    """Whether scores or samples were made with these weights.

    Decided by the hash of the weights, which tells a repeated training from the first. Files of older versions have
    only the step, or nothing: they must then be no older than the weights.
    """
    samples = json.loads(path.read_text()).get("samples", {}) if path.suffix == ".json" else {}
    if sha256 := samples.get("weights_sha256") or read_weights_hash(path):
        return sha256 == checkpoint.weights_sha256
    if "step" in samples:
        return samples["step"] == checkpoint.step
    return path.stat().st_mtime >= checkpoint.path.stat().st_mtime


def write_folder(checkpoint: Checkpoint, repo: str, license: str, folder: Path, *, half: bool) -> list[str]:
    """Write all files for publication, the model card among them, and return their names."""
    files = card_files(checkpoint)
    card = model_card(checkpoint, repo, license, files)
    files = {WEIGHTS: checkpoint.path, **files}
    write_published(files, folder, half=half)
    checkpoint.check_unchanged()  # or the card would be of other weights
    (folder / "README.md").write_text(card)
    return [*files, "README.md"]


def write_published(files: dict[str, Path], folder: Path, *, half: bool = False) -> None:
    """Write the files for publication: paths in them are cut to their last part; `half` writes float16 weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in files.items():
        if path.suffix in (".json", ".yaml"):
            values = without_paths(yaml.safe_load(path.read_text()))
            is_json = path.suffix == ".json"
            text = json.dumps(values, indent=2) + "\n" if is_json else yaml.safe_dump(values, sort_keys=False)
            (folder / name).write_text(text)
        elif name == WEIGHTS and (half or (metadata := read_metadata(path)) != _public_metadata(metadata)):
            weights = read_tensors(path)
            weights = to_half(weights) if half else weights
            save_tensors(weights, folder / name, _public_metadata(read_metadata(path)))
        else:
            shutil.copy(path, folder / name)


def to_half(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert floating-point tensors to float16. Raises ValueError naming a tensor whose values overflow."""
    halves = {name: weight.half() if weight.is_floating_point() else weight for name, weight in weights.items()}
    for name, half in halves.items():
        if not half.isfinite().all():
            raise ValueError(f"--half true: {name} has numbers beyond float16's 65504; leave it out")
    return halves


def _public_metadata(metadata: dict[str, str]) -> dict[str, str]:
    """Cut the paths in the JSON values of a safetensors file's metadata; values without paths stay unchanged."""
    public = dict(metadata)
    for key in {"config", "spec", "identity"} & metadata.keys():
        values = json.loads(metadata[key])
        if (shortened := without_paths(values)) != values:
            public[key] = json.dumps(shortened)
    return public


def without_paths(value: Any, key: str = "") -> Any:
    """Cut the paths in nested settings to their last part; ids of the hub stay. `key` is the name of the setting."""
    if isinstance(value, dict):
        return {name: item if name in NAME_SETTINGS else without_paths(item, str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item, key) for item in value]
    if not isinstance(value, str) or value.startswith(("hf://", "timm:")) or not re.search(r"[/\\]", value):
        return value
    looks_like_path = re.match(r"[/\\~.]|[A-Za-z]:[/\\]", value)
    is_path = key in PATH_SETTINGS or looks_like_path or (len(value) < 250 and Path(value).exists())
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1] if is_path else value


def model_card(checkpoint: Checkpoint, repo: str, license: str, files: dict[str, Path]) -> str:
    """Fill in `assets/model_card.md` and the hub's YAML header from the checkpoint and the files beside it."""
    spec = checkpoint.spec
    head = {
        "license": license,
        "library_name": "latent-diffusion-backbones",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusion", spec.name.lower().split("-")[0], checkpoint.config.diffusion.kind],
    }
    record, origin = (
        without_paths(json.loads(files[name].read_text())) if name in files else {}
        for name in ("scores.json", "imported.json")
    )
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"code": code, "plain": plain, "json": json.dumps, "listed": listed}
    environment.filters |= {"without_paths": without_paths, "without_folders": lambda path: Path(path).name}
    return environment.from_string(TEMPLATE.read_text()).render(
        checkpoint=checkpoint,
        config=checkpoint.config,
        spec=spec,
        classes=checkpoint.classes,
        millions=sum(parameter.numel() for parameter in spec.build_on_meta().parameters()) / 1e6,
        head=yaml.safe_dump(head, sort_keys=False),
        repo=repo,
        files=files,
        pictures=PICTURES,
        record=record,
        scores=markdown([["score", "value"], *score_texts(record)]),
        origin=origin,
        averaged=describe_averaging(checkpoint),
        history=json.loads(read_metadata(checkpoint.path).get("history", "[]")),
        drawn=format_sampling(checkpoint, record.get("samples", {})),
        shown=format_sampling(checkpoint, read_settings(files["samples.png"])) if "samples.png" in files else {},
    )


def score_texts(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and text of each score in a record of evaluate.py."""
    return [
        (name, f"{score['value']:.4g}{'' if score['std'] is None else ' ± {:.2g}'.format(score['std'])}")
        for name, score in record.get("scores", {}).items()
        if isinstance(score, dict) and score.get("value") is not None
    ]


def format_sampling(checkpoint: Checkpoint, samples: dict[str, Any]) -> dict[str, Any]:
    """By name, how samples that were scored were drawn: the usual four, and whatever else is not as it is by default;
    the autoencoder where it is not the checkpoint's own."""
    known: dict[str, Any] = {name: samples.get(name) for name in ("sampler", "num_steps", "guidance_scale", "seed")}
    usual = {**asdict(SamplingConfig()), "spacing": checkpoint.build_diffusion().default_spacing, "labels": "balanced"}
    others = {name: samples[name] for name in usual if name in samples and name not in known}
    known |= {name: value for name, value in others.items() if value != usual[name]}
    codec, own = samples.get("autoencoder"), checkpoint.identity.get("codec", {})
    if isinstance(codec, dict) and any(codec.get(name) != own[name] for name in own if name != "autoencoder"):
        known["autoencoder"] = codec.get("autoencoder")
    return known


def describe_averaging(checkpoint: Checkpoint) -> str:
    """Say for the card how the weights were averaged."""
    if length := read_metadata(checkpoint.path).get("sigma_rel"):
        return f"averaged by a power function of length {length} (sigma_rel; Karras et al. 2024)"
    if checkpoint.path.name != WEIGHTS:
        return "averaged after training"
    return f"averaged at {checkpoint.config.train.ema_decay:g}"


def listed(settings: dict[str, Any], *names: str) -> str:
    """Join `name value` of the named settings, or of all, with commas; those that are None are left out."""
    values = {name: settings.get(name) for name in names or settings}
    return ", ".join(f"{name} {plain(str(value))}" for name, value in values.items() if value is not None)
