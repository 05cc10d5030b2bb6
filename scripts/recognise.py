"""Measure how often a small classifier, trained on real images, assigns samples to their class, and how confidently.

python scripts/recognise.py --samples samples.npz --data.path mnist.zip --data.image_size 28
python scripts/recognise.py --data.path cifar10.zip --data.image_size 32 --width 48 --mirror true --thorough true \
    --epochs 16 --classifier cifar10.pt2 --perceptual cifar10-features.pt2
"""

import json
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiment.cli import run_main
from experiment.config import DataConfig
from settings import SEEDS, reads, within, writes


@dataclass(frozen=True)
class RecogniseConfig:
    """Train a small classifier on real images, and measure its accuracy on held-out images and on labelled samples. Of
    samples with and without labels, it also measures how sure it is, and how many classes they show.

    Args:
        samples: npz of sample.py; without it only the classifier is trained
        data: real images
        classifier: file for the classifier, which can also be an --extractor: .pt2, or .pt (TorchScript)
        perceptual: file of the same kind with the features of its stages, for --auxiliary's `network` and an
            autoencoder's --loss.perceptual
        output: JSON file for the results, which are printed anyway
        epochs: passes over the real images; by default 4, or as many as make 125 steps of 64 images
        side: side in pixels of the classifier's input, a power of two; larger ones distinguish more classes
        width: channels of the first stage; 48 takes four times as long as 24
        mirror: also train on mirrored images; not for digits and letters
        thorough: keep the full resolution in the first layers, and hide a part of each image in training; better on
            photographs, but takes three times as long
        seed: seed of the classifier
    """

    samples: Path | None = reads("file", None)
    data: DataConfig = field(default_factory=DataConfig)
    classifier: Path | None = writes(".pt2 .pt", None)
    perceptual: Path | None = writes(".pt2 .pt", None)
    output: Path | None = writes(".json", None)
    epochs: int | None = within("[1, inf)", None)
    side: int = within("[8, 512]", 32)
    width: int = within("[1, 1024]", 24)
    mirror: bool = False
    thorough: bool = False
    seed: int = within(SEEDS, 0)


def main(config: RecogniseConfig) -> None:
    """Train the classifier, and apply it to held-out images and to the samples."""
    import torch

    from experiment.build import open_split
    from machine.atomic_files import write_atomic
    from metrics.classifier import train_classifier
    from metrics.image_batches import image_batches

    if not (config.samples or config.classifier or config.perceptual or config.output):
        raise ValueError("nothing to do: give --samples NPZ, or --classifier FILE or --output JSON to keep")
    real, held_out = (open_split(config.data, split) for split in ("train", "test"))
    classes = real.classes
    samples, labels, origin = read_samples(config.samples, classes) if config.samples else (None, None, {})
    check_samples(config, samples, labels, classes)

    def read(dataset):
        return torch.cat([batch.images for batch in image_batches(dataset, 256)])

    settings = {name: getattr(config, name) for name in ("seed", "side", "width", "mirror", "thorough")}
    epochs = config.epochs or default_epochs(len(real))
    classifier = train_classifier(read(real), real.labels, len(classes), epochs=epochs, **settings)
    real_probabilities = classifier.probabilities(read(held_out))
    accuracy = (real_probabilities.argmax(dim=1) == held_out.labels).float().mean().item()
    figures: dict[str, Any] = {"held_out_accuracy": accuracy, "num_held_out": len(held_out)}
    guessing = held_out.labels.bincount().max().item() / len(held_out)
    print(
        f"The classifier's accuracy is {accuracy:.2%} on {len(held_out)} held-out images; "
        f"always guessing the most frequent class would give {guessing:.2%}."
    )
    for path, save in (
        (config.classifier, partial(classifier.save, classes=classes)),
        (config.perceptual, classifier.save_perceptual),
    ):
        if path:
            print(f"saved: {save(path)}")
    if samples is not None:
        figures |= {"num_samples": len(samples), "samples": origin}
        figures |= measure(classifier.probabilities(samples), labels, real_probabilities, classes)
    if config.output:
        write_atomic(config.output, json.dumps(figures, indent=2) + "\n", keep=True)


def check_samples(config: RecogniseConfig, samples: Any, labels: Any, classes: list[str]) -> None:
    """Raise ValueError unless there are classes to distinguish, and samples are of these and as large as the images."""
    largest = 1 if labels is None else int(labels.max())
    if len(classes) < 2 or largest >= len(classes):
        raise ValueError(
            f"--data.path {config.data.path}: its classes are {', '.join(classes) or 'none'}, and the samples' labels "
            f"run up to {largest}; give the images that the model was trained on"
        )
    if samples is not None and (size := samples.shape[-1]) != (side := config.data.image_size):
        raise ValueError(f"--samples {config.samples}: {size} pixels wide, not {side}; give --data.image_size {size}")


def measure(probabilities: Any, labels: Any, real_probabilities: Any, classes: list[str]) -> dict[str, Any]:
    """Compare the class probabilities of samples with their labels, if they have any, and with those of held-out
    images; print and return the figures."""
    figures: dict[str, Any] = {}
    if labels is not None:
        correct = (probabilities.argmax(dim=1) == labels).float()
        per_class = {classes[label]: correct[labels == label].mean().item() for label in labels.unique().tolist()}
        figures |= {"class_agreement": correct.mean().item(), "per_class": per_class}
        print(f"It recognises {correct.mean():.2%} of {len(labels)} samples as the requested class.")
    (sure, shown), (real_sure, real_shown) = map(sureness, (probabilities, real_probabilities))
    print(
        f"Its mean confidence is {sure:.2f} on {len(probabilities)} samples and {real_sure:.2f} on held-out images; "
        f"they cover {shown:.1f} and {real_shown:.1f} of {len(classes)} classes."
    )
    figures |= {"confidence": sure, "held_out_confidence": real_sure}
    return {**figures, "classes_shown": shown, "held_out_classes_shown": real_shown}


def default_epochs(num_images: int) -> int:
    return max(4, -(-125 // -(-num_images // 64)))


def sureness(probabilities: Any) -> tuple[float, float]:
    """Return the mean of the largest of the class probabilities [n k], and the effective number of classes that are
    named: the exponential of the entropy of their shares, k if all are named equally often, 1 if always the same is."""
    import torch

    sure, named = probabilities.max(dim=1)
    shares = named.bincount(minlength=probabilities.shape[1]) / len(named)
    return sure.mean().item(), torch.special.entr(shares).sum().exp().item()


def read_samples(path: Path, classes: list[str]) -> tuple[Any, Any, dict[str, str]]:
    """Read images [n 3 h w], their labels, or None without, and hashes of the file and of the weights that generated
    them. Labels are translated to `classes` by name or, if the file names none, taken to number these."""
    from data.subsets import map_labels
    from machine.atomic_files import sha256_of
    from metrics.npz import images_in, labels_in, read_arrays, weights_in

    arrays = read_arrays(path, f"--samples {path}")
    images, origin = images_in(arrays, f"--samples {path}"), {"sha256": sha256_of(path), **weights_in(arrays)}
    if "arr_1" not in arrays:
        return images, None, origin
    labels, names = labels_in(arrays, f"--samples {path}")
    if not names:
        origin["classes"] = "none are named: labels number those of the images"
        print(f"--samples {path}: it names no classes; its labels are taken to number {', '.join(classes)}")
    return images, map_labels(labels, names, classes, f"--samples {path}") if names else labels, origin


if __name__ == "__main__":
    run_main(main, RecogniseConfig)
