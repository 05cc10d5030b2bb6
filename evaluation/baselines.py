"""Baselines for samples: real images (the floor) and their reconstructions by the autoencoder (the ceiling)."""

from collections.abc import Sequence
from dataclasses import replace

from accelerate import Accelerator

from autoencoders.codec import Codec
from data.image_set import ImageSet
from evaluation.sources import Source, from_dataset, matching_images, reconstructions
from experiment.build import open_split
from experiment.config import DataConfig, EvaluationConfig
from metrics.scores import METRICS


def baselines(
    samples: Source,
    data: DataConfig,
    held_out: ImageSet,
    codec: Codec,
    evaluation: EvaluationConfig,
    accelerator: Accelerator,
) -> list[tuple[Source, Sequence[str]]]:
    """List the baselines, each with the metrics to compute for it.

    Most metrics are computed for training images that match the samples in number and classes. Metrics of a probe that
    was fitted to the training images are computed for held-out images instead. Except in pixel space, each is followed
    by its reconstructions.
    """
    by_class = [name for name in evaluation.metrics if METRICS[name].needs == "labelled" and not METRICS[name].teaches]
    others = [name for name in evaluation.metrics if name not in by_class]
    floors: list[tuple[Source, str, list[str]]] = []  # images, name of their reconstructions, metrics
    if others:
        train = open_split(data, "train", accelerator)
        images, _ = matching_images(samples, train, "training images", "--baselines", evaluation.seed)
        floors.append((images, "reconstructions", others))
    if by_class:
        images = from_dataset(held_out, "held-out images", evaluation.num_samples, evaluation.seed)
        floors.append((images, "reconstructions of held-out images", by_class))
    rows: list[tuple[Source, Sequence[str]]] = []
    for floor, name, metrics in floors:
        rows.append((floor, metrics))
        if codec.source != "pixel":
            ceiling = reconstructions(floor, codec, accelerator.device, evaluation.seed)
            rows.append((replace(ceiling, name=name), metrics))
    return rows
