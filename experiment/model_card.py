"""A model card written from what a run left: configuration, curves, samples, scores and where they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from experiment.checkpoint import Checkpoint

PICTURES = {"samples.png": "Samples", "loss.png": "Loss", "progress.png": "The same noise in the course of training"}


def card_files(checkpoint: Checkpoint) -> dict[str, Path]:
    """What goes with the weights, by the name it has on the hub."""
    run = checkpoint.run
    names = ["config.yaml", "scores.json", "imported.json", *PICTURES]
    files = {name: run / name for name in names if (run / name).is_file()}
    grids = sorted((run / "samples").glob("[0-9]*.png"))
    if "samples.png" not in files and grids:
        files["samples.png"] = grids[-1]
    return files


def model_card(checkpoint: Checkpoint, repo: str, license: str, files: dict[str, Path]) -> str:
    """Markdown with the hub's YAML head; says nothing that the files do not say."""
    config, spec = checkpoint.config, checkpoint.spec
    head = {
        "license": license,
        "library_name": "latent-diffusion-backbones",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusion", spec.name.lower().split("-")[0], config.diffusion.kind],
    }
    height, width = checkpoint.image_size
    data = "the embedded procedural shapes" if config.data.path == "shapes" else Path(config.data.path).name
    described = [
        f"`{spec.name}`{f' with {json.dumps(spec.args)}' if spec.args else ''}, "
        f"{_millions(checkpoint):.1f}M parameters, averaged weights after {checkpoint.step} steps",
        f"{height}x{width} images through the autoencoder `{config.autoencoder}`, latents of "
        f"{spec.in_channels}x{spec.input_size[0]}x{spec.input_size[1]}",
        f"{_classes(checkpoint.classes)}; data: {data}",
        f"objective: {_given(config.to_dict()['diffusion'])}",
        f"code: commit `{checkpoint.commit or 'unknown'}`",
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
    length = f"{config.train.num_steps} steps" if config.train.num_steps else f"{config.train.num_epochs} epochs"
    return (
        "## Training\n\n```sh\naccelerate launch train.py --config config.yaml\n```\n\n"
        f"{length} of batches of {config.train.batch_size}, AdamW at {config.optim.lr:g} ({config.optim.decay}), "
        f"averaged at {config.train.ema_decay:g}, label dropout {config.train.label_dropout:g}, "
        f"seed {config.train.seed}.\n"
    )


def _origin(files: dict[str, Path]) -> str:
    if "imported.json" not in files:
        return ""
    origin = json.loads(files["imported.json"].read_text())
    return f"Converted from the published `{origin['file']}` ({origin['source']}, sha256 `{origin['sha256']}`).\n"


def _scores(files: dict[str, Path]) -> str:
    if "scores.json" not in files:
        return "## Scores\n\nNot scored yet.\n"
    record: dict[str, Any] = json.loads(files["scores.json"].read_text())
    rows = [
        f"| {name} | {score['value']:.4g}{'' if score['std'] is None else ' ± {:.2g}'.format(score['std'])} |"
        for name, score in record["scores"].items()
        if isinstance(score, dict) and score.get("value") is not None
    ]
    samples, reference = record.get("samples", {}), record.get("reference", {})
    drawn = {name: samples[name] for name in ("sampler", "num_steps", "guidance_scale", "seed") if name in samples}
    said = [
        f"{record['num_samples']} samples against {record['num_reference']} images",
        f"reference: {_given({name: reference.get(name) for name in ('source', 'split')})}" if reference else "",
        f"extractor: {record['extractor']} (sha256 `{record['extractor_sha256']}`)",
        f"sampling: {_given(drawn)}" if drawn else "",
        f"evaluated at commit `{record['commit']}`" if record.get("commit") else "",
    ]
    table = "\n".join(["| score | value |", "|---|---|", *rows])
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
    return f"{len(classes)} classes ({', '.join(classes[:8])}{', ...' if len(classes) > 8 else ''})"


def _given(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)


def _millions(checkpoint: Checkpoint) -> float:
    return sum(parameter.numel() for parameter in checkpoint.spec.build_on_meta().parameters()) / 1e6
