"""Score a checkpoint, a folder or an npz against the held-out images.

python evaluate.py --samples runs/XSwin
python evaluate.py --samples samples.npz --data.path caltech101.zip --extractor mobilenet_v2.pt
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from experiment.cli import one_line_errors, parse
from experiment.config import DataConfig


@dataclass(frozen=True)
class EvaluateConfig:
    """Score samples against real images: Fréchet distance, inception score, kernel distance, precision, recall.

    Args:
        samples: a run or checkpoint to draw from, a folder or zip of images, an npz; 'train' and 'reconstructions'
            score the reference's own training images and autoencoder reconstructions: the floor and the ceiling
        checkpoint: whose data, split and autoencoder are the reference; by default samples, where it is one
        extractor: 'inception', 'dinov2-*', 'clip-*', 'vgg16', or a TorchScript file (uint8 images to features and
            class probabilities)
        weights_path: weights of a named extractor, where they cannot be downloaded
        num_samples: images to draw, or to take; by default as many as there are reference images
        output: JSON file; by default scores.json beside the samples
        seed: of the drawn samples
        sampler: 'ddpm' or 'ddim'; by default as in the checkpoint, like the flags below
        num_steps: model calls a sample
        guidance_scale: classifier-free guidance; 1 turns it off
        eta: randomness of 'ddim', 0 to 1
        batch_size: images at a time
        precision: of sampling: 'auto', 'fp32' or 'bf16'
        autoencoder: in place of the one in the checkpoint's configuration
        data: of the reference, where no checkpoint says or the file has moved (--data.path)
    """

    samples: str
    checkpoint: str | None = None
    extractor: str = "inception"
    weights_path: str | None = None
    num_samples: int | None = None
    output: str | None = None
    seed: int = 0
    sampler: str | None = None
    num_steps: int | None = None
    guidance_scale: float | None = None
    eta: float | None = None
    batch_size: int = 64
    precision: str = "auto"
    autoencoder: str | None = None
    data: DataConfig = field(default_factory=DataConfig)


def main(config: EvaluateConfig) -> None:
    """Gather samples and reference, extract features, compare, write."""
    import importlib.metadata

    from accelerate import Accelerator

    from experiment.build import open_split, precision, use_all_cores
    from experiment.checkpoint import CheckpointError, current_commit, open_checkpoint
    from experiment.evaluation import KINDS, draw_samples, read_samples
    from metrics.fidelity import Extractor, compare

    accelerator = Accelerator(mixed_precision=precision(config.precision))
    use_all_cores(accelerator)
    try:
        checkpoint = open_checkpoint(config.checkpoint or config.samples)
    except CheckpointError:
        if config.checkpoint is not None:
            raise
        checkpoint = None
    data = config.data
    if checkpoint is not None:
        moved = {} if data.path == DataConfig().path else {"path": data.path}
        data = replace(checkpoint.config.data, **moved)
    reference = open_split(data, "test")
    extractor = Extractor(config.extractor, weights_path=config.weights_path, device=accelerator.device)

    num_samples = config.num_samples or len(reference)
    if config.samples in KINDS:
        images, provenance = KINDS[config.samples](checkpoint, config, data, num_samples, accelerator)
    elif checkpoint is not None and config.checkpoint is None:
        images, provenance = draw_samples(checkpoint, config, data, num_samples, accelerator)
    else:
        images, provenance = read_samples(config.samples, data.image_size, config.num_samples)
    if not accelerator.is_main_process:
        return

    scores = compare(
        extractor(images, batch_size=config.batch_size, desc="samples"),
        extractor(reference, batch_size=config.batch_size, desc="reference"),
        extractor,
        seed=config.seed,
    )
    libraries = ("torch", "torchvision", "diffusers", "accelerate", "torch-fidelity")
    record = {
        **scores.to_dict(),
        "samples": provenance,
        "reference": {**reference.describe(), "classes": len(reference.classes)},
        "evaluation": asdict(config),
        "commit": current_commit(),
        "versions": {name: importlib.metadata.version(name) for name in libraries},
    }
    default = Path(config.samples)
    default = checkpoint.run if checkpoint and config.checkpoint is None else default.parent
    output = Path(config.output) if config.output else default / "scores.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
    partial.replace(output)
    print(f"{scores.num_samples} samples against {scores.num_reference} held-out images, {scores.extractor}")
    print(scores.table())
    if extractor.kind != "inception":
        print(f"Distances on {scores.extractor} compare runs with each other; they are not FID.")
    print(f"scores: {output}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse(EvaluateConfig))
