"""A model card written from what a run left: configuration, curves, samples, scores and where they come from."""

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
from sampling.image_files import drawn_by

TEMPLATE = Path(__file__).parent.parent / "assets" / "model_card.md"
PLACES = {"path", "cache", "resume", "init_from", "guidance_checkpoint", "weights_path", "checkpoint"}  # of settings
NAMES = {"classes", "exclude_classes"}  # which no slash makes a place
PICTURES = {"samples.png": "Samples", "loss.png": "Loss", "progress.png": "The same noise in the course of training"}
SHOWN = ("config.yaml", "scores.json", "imported.json", *PICTURES)  # beside the weights, where there are such


def card_files(checkpoint: Checkpoint) -> dict[str, Path]:
    """What goes with the weights, by the name it has on the hub: no scores or samples of other weights."""
    run, mark = checkpoint.run, checkpoint.mark
    marked = {"scores.json": f"scores{mark}.json", "samples.png": f"samples{mark}.png"}
    files = {name: run / marked.get(name, name) for name in SHOWN if (run / marked.get(name, name)).is_file()}
    for name in marked.keys() & files.keys():
        if not _is_of(checkpoint, files[name]):
            del files[name]
    grid = run / "samples" / f"{checkpoint.step:08d}.png"
    if "samples.png" not in files and checkpoint.path.name == WEIGHTS and grid.is_file():
        files["samples.png"] = grid
    return files


def _is_of(checkpoint: Checkpoint, path: Path) -> bool:
    """Whether a file is of these weights, by their hash or, of before, their step; or else no older than they."""
    samples = json.loads(path.read_text()).get("samples", {}) if path.suffix == ".json" else {}
    if known := samples.get("weights_sha256") or drawn_by(path):  # a step may have been taken again, differently
        return known == read_metadata(checkpoint.path).get("weights_sha256")
    if "step" in samples:
        return samples["step"] == checkpoint.step
    return path.stat().st_mtime >= checkpoint.path.stat().st_mtime


def write_published(files: dict[str, Path], folder: Path, *, half: bool = False) -> None:
    """The files as they leave this machine: paths are cut to their last names, weights `half` in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in files.items():
        if path.suffix in (".json", ".yaml"):
            values = without_paths(yaml.safe_load(path.read_text()))
            is_json = path.suffix == ".json"
            text = json.dumps(values, indent=2) + "\n" if is_json else yaml.safe_dump(values, sort_keys=False)
            (folder / name).write_text(text)
        elif name == WEIGHTS and (half or (metadata := read_metadata(path)) != _without_paths_within(metadata)):
            weights = read_tensors(path)
            weights = rounded(weights) if half else weights
            save_tensors(weights, folder / name, _without_paths_within(read_metadata(path)))
        else:
            shutil.copy(path, folder / name)


def rounded(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """To float16; a ValueError names a tensor whose numbers it does not hold."""
    halves = {name: weight.half() if weight.is_floating_point() else weight for name, weight in weights.items()}
    for name, half in halves.items():
        if not half.isfinite().all():
            raise ValueError(f"--half true: {name} has numbers beyond float16's 65504; leave it out")
    return halves


def _without_paths_within(metadata: dict[str, str]) -> dict[str, str]:
    """Of the weights' file, whose values are JSON; what has no paths stays as it is."""
    public = dict(metadata)
    for key in {"config", "spec", "identity"} & metadata.keys():
        values = json.loads(metadata[key])
        if (cut := without_paths(values)) != values:
            public[key] = json.dumps(cut)
    return public


def without_paths(value: Any, key: str = "") -> Any:
    """Settings, their paths cut to the names at their end; ids of the hub stay."""
    if isinstance(value, dict):
        return {name: one if name in NAMES else without_paths(one, str(name)) for name, one in value.items()}
    if isinstance(value, list):
        return [without_paths(one, key) for one in value]
    if not isinstance(value, str) or value.startswith(("hf://", "timm:")) or not re.search(r"[/\\]", value):
        return value
    is_path = key in PLACES or re.match(r"[/\\~.]|[A-Za-z]:[/\\]", value) or (len(value) < 250 and Path(value).exists())
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1] if is_path else value


def model_card(checkpoint: Checkpoint, repo: str, license: str, files: dict[str, Path]) -> str:
    """`assets/model_card.md`, filled in, with the hub's YAML head; says nothing that the files do not say."""
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
    scores = [
        [name, f"{score['value']:.4g}{'' if score['std'] is None else ' ± {:.2g}'.format(score['std'])}"]
        for name, score in record.get("scores", {}).items()
        if isinstance(score, dict) and score.get("value") is not None
    ]
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"code": code, "plain": plain, "json": json.dumps, "listed": _listed}
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
        scores=markdown([["score", "value"], *scores]),
        origin=origin,
        averaged=averaged(checkpoint),
        drawn=drawn_with(checkpoint, record.get("samples", {})),
    )


def drawn_with(checkpoint: Checkpoint, samples: dict[str, Any]) -> dict[str, Any]:
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


def averaged(checkpoint: Checkpoint) -> str:
    """By what, or when, in the words of a card."""
    if length := read_metadata(checkpoint.path).get("sigma_rel"):
        return f"averaged by a power function of length {length} (sigma_rel; Karras et al. 2024)"
    if checkpoint.path.name != WEIGHTS:
        return "averaged after training"
    return f"averaged at {checkpoint.config.train.ema_decay:g}"


def _listed(settings: dict[str, Any], *names: str) -> str:
    chosen = {name: settings.get(name) for name in names or settings}
    return ", ".join(f"{name} {plain(str(value))}" for name, value in chosen.items() if value is not None)
