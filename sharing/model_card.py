"""A model card written from what a run left: configuration, curves, samples, scores and where they come from."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from checkpoints.checkpoint import WEIGHTS, Checkpoint, read_metadata, read_tensors, save_tensors
from evaluation.table import code, markdown, plain

PLACES = {"path", "cache", "resume", "init_from", "guidance_checkpoint", "weights_path", "checkpoint"}  # of settings
PICTURES = {"samples.png": "Samples", "loss.png": "Loss", "progress.png": "The same noise in the course of training"}


def card_files(checkpoint: Checkpoint) -> dict[str, Path]:
    """What goes with the weights, by the name it has on the hub: no scores or samples of other weights."""
    run, mark = checkpoint.run, checkpoint.mark
    marked = {"scores.json": f"scores{mark}.json", "samples.png": f"samples{mark}.png"}
    names = ["config.yaml", "scores.json", "imported.json", *PICTURES]
    files = {name: run / marked.get(name, name) for name in names if (run / marked.get(name, name)).is_file()}
    for name in marked.keys() & files.keys():
        if not _is_of(checkpoint, files[name]):
            del files[name]
    grid = run / "samples" / f"{checkpoint.step:08d}.png"
    if "samples.png" not in files and checkpoint.path.name == WEIGHTS and grid.is_file():
        files["samples.png"] = grid
    return files


def _is_of(checkpoint: Checkpoint, path: Path) -> bool:
    """Whether a file was made from these weights: it names their step, or else is no older than they are."""
    samples = json.loads(path.read_text()).get("samples", {}) if path.suffix == ".json" else {}
    if "step" in samples:
        return samples["step"] == checkpoint.step
    return path.stat().st_mtime >= checkpoint.path.stat().st_mtime


def write_published(files: dict[str, Path], folder: Path) -> None:
    """The files as they leave this machine: paths are cut to the names at their end, wherever a file keeps them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in files.items():
        if path.suffix in (".json", ".yaml"):
            values = without_paths(yaml.safe_load(path.read_text()))
            is_json = path.suffix == ".json"
            text = json.dumps(values, indent=2) + "\n" if is_json else yaml.safe_dump(values, sort_keys=False)
            (folder / name).write_text(text)
        elif name == WEIGHTS and (metadata := read_metadata(path)) != (public := _without_paths_within(metadata)):
            save_tensors(read_tensors(path), folder / name, public)
        else:
            shutil.copy(path, folder / name)


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
        return {name: without_paths(one, str(name)) for name, one in value.items()}
    if isinstance(value, list):
        return [without_paths(one, key) for one in value]
    if not isinstance(value, str) or value.startswith(("hf://", "timm:")) or not re.search(r"[/\\]", value):
        return value
    is_path = key in PLACES or re.match(r"[/\\~.]|[A-Za-z]:[/\\]", value) or (len(value) < 250 and Path(value).exists())
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1] if is_path else value


def model_card(checkpoint: Checkpoint, repo: str, license: str, files: dict[str, Path]) -> str:
    """Markdown with the hub's YAML head; says nothing that the files do not say."""
    config, spec = checkpoint.config, checkpoint.spec
    train, size = config.train, config.data.image_size
    head = {
        "license": license,
        "library_name": "latent-diffusion-backbones",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusion", spec.name.lower().split("-")[0], config.diffusion.kind],
    }
    args = f" with {code(json.dumps(without_paths(spec.args)))}" if spec.args else ""
    millions = sum(parameter.numel() for parameter in spec.build_on_meta().parameters()) / 1e6
    height, width = checkpoint.image_size
    classes = f"{', '.join(map(plain, checkpoint.classes[:8]))}{', ...' if len(checkpoint.classes) > 8 else ''}"
    data = "the embedded procedural shapes" if config.data.path == "shapes" else plain(Path(config.data.path).name)
    described = [
        f"{code(spec.name)}{args}, {millions:.1f}M parameters, averaged weights after {checkpoint.step} steps",
        f"{height}x{width} images through the autoencoder {code(without_paths(config.autoencoder))}, latents of "
        f"{spec.in_channels}x{spec.input_size[0]}x{spec.input_size[1]}",
        f"{f'{len(checkpoint.classes)} classes ({classes})' if classes else 'unconditional'}; data: {data}",
        f"objective: {_listed(config.to_dict()['diffusion'])}",
        f"code: commit {code(checkpoint.commit or 'unknown')}",
    ]
    origin, training, scores = "", "", "Not scored yet."
    if "scores.json" in files:
        scores = _scores(files["scores.json"])
    if "imported.json" in files:
        record = json.loads(files["imported.json"].read_text())
        file, source, sha256 = (str(without_paths(record[name], "path")) for name in ("file", "source", "sha256"))
        origin = f"Converted from the published {code(file)} ({plain(source)}, sha256 {code(sha256)}).\n"
    else:
        length = f"{train.num_steps} steps" if train.num_steps else f"{train.num_epochs or 100} epochs"
        training = (
            "## Training\n\n```sh\npython train.py --config config.yaml\n```\n\n"
            f"{length} of batches of {train.batch_size}, AdamW at {config.optim.lr:g} ({config.optim.decay}), "
            f"averaged at {train.ema_decay:g}, label dropout {train.label_dropout:g}, seed {train.seed}.\n"
        )
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
        f"# {repo.split('/')[-1]}\n",
        _as_list(described),
        origin,
        f"```sh\npython sample.py --checkpoint hf://{repo}\n```\n",
        training,
        *(f"## {title}\n\n![{title}]({name})\n" for name, title in PICTURES.items() if name in files),
        f"## Scores\n\n{scores}\n",
        f"## Limits\n\nIt draws {size}x{size} pictures of the classes that it was trained on and nothing else, "
        "with the faults and the biases of those images; it was not tested for any use beyond the comparison of "
        "backbones.\n",
    ]
    return "\n".join(filter(None, parts))


def _scores(path: Path) -> str:
    """A table, and how its numbers came about."""
    record: dict[str, Any] = without_paths(json.loads(path.read_text()))
    rows = [
        [name, f"{score['value']:.4g}{'' if score['std'] is None else ' ± {:.2g}'.format(score['std'])}"]
        for name, score in record["scores"].items()
        if isinstance(score, dict) and score.get("value") is not None
    ]
    samples, reference = record.get("samples", {}), record.get("reference", {})
    drawn = {name: samples[name] for name in ("sampler", "num_steps", "guidance_scale", "seed") if name in samples}
    said = [
        f"{record['num_samples']} samples against {record['num_reference']} images",
        f"reference: {_listed({name: reference.get(name) for name in ('source', 'split')})}" if reference else "",
        f"extractor: {plain(record['extractor'])} (sha256 {code(record['extractor_sha256'])})",
        f"sampling: {_listed(drawn)}" if drawn else "",
        f"evaluated at commit {code(record['commit'])}" if record.get("commit") else "",
    ]
    return f"{markdown([['score', 'value'], *rows])}\n\n{_as_list(filter(None, said))}".rstrip("\n")


def _as_list(lines: Any) -> str:
    return "\n".join(f"- {line}" for line in lines) + "\n"


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {plain(str(value))}" for name, value in settings.items() if value is not None)
