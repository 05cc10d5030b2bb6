"""Are samples recognised as the class that was asked for? By a small classifier trained on the real training images.

python scripts/recognise.py --samples samples.npz --data.path mnist.zip --data.image_size 28
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiment.cli import one_line_errors, parse
from experiment.config import DataConfig


@dataclass(frozen=True)
class RecogniseConfig:
    """Train a small classifier on real images, say how it does on held-out ones and on labelled samples.

    Args:
        samples: an npz of sample.py: images in arr_0, the labels asked for in arr_1
        data: the real images
        classifier: TorchScript file to keep the classifier in, which also serves as --extractor
        output: JSON file of the figures; by default only printed
        epochs: passes over the real images
        seed: of the classifier
    """

    samples: Path
    data: DataConfig = field(default_factory=DataConfig)
    classifier: Path | None = None
    output: Path | None = None
    epochs: int = 4
    seed: int = 0


def main(config: RecogniseConfig) -> None:
    """Train, hold against held-out images, read the samples."""
    import numpy as np
    import torch
    from torch import Tensor

    from experiment.build import open_split
    from metrics.classifier import train_classifier
    from metrics.images import image_batches

    try:
        with np.load(config.samples, allow_pickle=False) as file:
            samples = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2).contiguous()
            asked = torch.from_numpy(file["arr_1"])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--samples {config.samples}: not an npz that sample.py wrote ({error})") from error

    real, held_out = (open_split(config.data, split) for split in ("train", "test"))
    classes = real.classes
    if len(classes) < 2 or asked.max() >= len(classes):
        raise ValueError(
            f"--data.path {config.data.path}: its classes are {', '.join(classes) or 'none'}, and the samples' labels "
            f"run up to {asked.max()}; give the images that the model was trained on"
        )

    def read(dataset) -> Tensor:
        return torch.cat([batch.images for batch in image_batches(dataset, 256)])

    classifier = train_classifier(read(real), real.labels, len(classes), seed=config.seed, epochs=config.epochs)
    if config.classifier:
        classifier.save_torchscript(config.classifier)

    right = classifier.predict(samples) == asked
    figures = {
        "held_out_accuracy": (classifier.predict(read(held_out)) == held_out.labels).float().mean().item(),
        "num_held_out": len(held_out),
        "class_agreement": right.float().mean().item(),
        "num_samples": len(samples),
        "per_class": {
            name: right[asked == label].float().mean().item()
            for label, name in enumerate(classes)
            if (asked == label).any()
        },
    }
    print(
        f"The classifier is right about {figures['held_out_accuracy']:.2%} of {len(held_out)} held-out images, and "
        f"takes {figures['class_agreement']:.2%} of {len(samples)} samples for the class asked for."
    )
    if config.output:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        config.output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    with one_line_errors():
        main(parse(RecogniseConfig))
