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
    for name in {"scores.json", "samples.png"} & files.keys():
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
        if name == WEIGHTS:
            metadata = read_metadata(path)
            private = {key: json.loads(metadata[key]) for key in ("config", "spec", "identity") if key in metadata}
            public = {key: without_paths(value) for key, value in private.items()}
            if public != private:
                written = {key: json.dumps(value) for key, value in public.items()}
                save_tensors(read_tensors(path), folder / name, {**metadata, **written})
                continue
        elif path.suffix in (".json", ".yaml"):
            values = without_paths(yaml.safe_load(path.read_text()))
            is_json = path.suffix == ".json"
            text = json.dumps(values, indent=2) + "\n" if is_json else yaml.safe_dump(values, sort_keys=False)
            (folder / name).write_text(text)
            continue
        shutil.copy(path, folder / name)


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
    args = json.dumps(without_paths(spec.args))
    head = {
        "license": license,
        "library_name": "latent-diffusion-backbones",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusion", spec.name.lower().split("-")[0], config.diffusion.kind],
    }
    height, width = checkpoint.image_size
    data = "the embedded procedural shapes" if config.data.path == "shapes" else plain(Path(config.data.path).name)
    described = [
        f"{code(spec.name)}{f' with {code(args)}' if spec.args else ''}, "
        f"{_millions(checkpoint):.1f}M parameters, averaged weights after {checkpoint.step} steps",
        f"{height}x{width} images through the autoencoder {code(without_paths(config.autoencoder))}, latents of "
        f"{spec.in_channels}x{spec.input_size[0]}x{spec.input_size[1]}",
        f"{_classes(checkpoint.classes)}; data: {data}",
        f"objective: {_given(config.to_dict()['diffusion'])}",
        f"code: commit {code(checkpoint.commit or 'unknown')}",
    ]
    trained = "" if "imported.json" in files else _training(checkpoint)
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
        f"# {repo.split('/')[-1]}\n",
        "\n".join(f"- {line}" for line in described) + "\n",
        _origin(files),
        "```sh\n" + f"python sample.py --checkpoint hf://{repo}\n" + "```\n",
        trained,
        *(f"## {title}\n\n![{title}]({name})\n" for name, title in PICTURES.items() if name in files),
        _scores(files),
        f"## Limits\n\n{_limits(checkpoint)}\n",
    ]
    return "\n".join(part for part in parts if part)


def _training(checkpoint: Checkpoint) -> str:
    config = checkpoint.config
    length = f"{config.train.num_steps} steps" if config.train.num_steps else f"{config.train.num_epochs or 100} epochs"
    return (
        "## Training\n\n```sh\npython train.py --config config.yaml\n```\n\n"
        f"{length} of batches of {config.train.batch_size}, AdamW at {config.optim.lr:g} ({config.optim.decay}), "
        f"averaged at {config.train.ema_decay:g}, label dropout {config.train.label_dropout:g}, "
        f"seed {config.train.seed}.\n"
    )


def _origin(files: dict[str, Path]) -> str:
    if "imported.json" not in files:
        return ""
    origin = json.loads(files["imported.json"].read_text())
    file, source, sha256 = (str(without_paths(origin[name], "path")) for name in ("file", "source", "sha256"))
    return f"Converted from the published {code(file)} ({plain(source)}, sha256 {code(sha256)}).\n"


def _scores(files: dict[str, Path]) -> str:
    if "scores.json" not in files:
        return "## Scores\n\nNot scored yet.\n"
    record: dict[str, Any] = without_paths(json.loads(files["scores.json"].read_text()))
    rows = [
        [name, f"{score['value']:.4g}{'' if score['std'] is None else ' ± {:.2g}'.format(score['std'])}"]
        for name, score in record["scores"].items()
        if isinstance(score, dict) and score.get("value") is not None
    ]
    samples, reference = record.get("samples", {}), record.get("reference", {})
    drawn = {name: samples[name] for name in ("sampler", "num_steps", "guidance_scale", "seed") if name in samples}
    said = [
        f"{record['num_samples']} samples against {record['num_reference']} images",
        f"reference: {_given({name: reference.get(name) for name in ('source', 'split')})}" if reference else "",
        f"extractor: {plain(record['extractor'])} (sha256 {code(record['extractor_sha256'])})",
        f"sampling: {_given(drawn)}" if drawn else "",
        f"evaluated at commit {code(record['commit'])}" if record.get("commit") else "",
    ]
    table = markdown([["score", "value"], *rows])
    return f"## Scores\n\n{table}\n\n" + "\n".join(f"- {line}" for line in said if line) + "\n"


def _limits(checkpoint: Checkpoint) -> str:
    size = checkpoint.config.data.image_size
    return (
        f"It draws {size}x{size} pictures of the classes that it was trained on and nothing else, with the faults and "
        "the biases of those images; it was not tested for any use beyond the comparison of backbones."
    )


def _classes(classes: list[str]) -> str:
    if not classes:
        return "unconditional"
    return f"{len(classes)} classes ({', '.join(map(plain, classes[:8]))}{', ...' if len(classes) > 8 else ''})"


def _given(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {plain(str(value))}" for name, value in settings.items() if value is not None)


def _millions(checkpoint: Checkpoint) -> float:
    return sum(parameter.numel() for parameter in checkpoint.spec.build_on_meta().parameters()) / 1e6
