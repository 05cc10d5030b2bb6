"""Images that samples are compared with: baselines, which are real images (the floor) and their reconstructions by the
autoencoder (the ceiling), and the controls of memorisation."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from accelerate import Accelerator
from jaxtyping import Int64
from torch import Tensor

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
        train = open_split(replace(data, train_fraction=1.0), "train", accelerator)
        images, _ = matching_images(samples, train, "training images", "--baselines", evaluation.seed)
        floors.append((images, "reconstructions", others))
    if by_class:
        images = from_dataset(held_out, "held-out images", evaluation.num_samples, evaluation.seed)
        floors.append((images, "reconstructions of held-out images", by_class))
    rows: list[tuple[Source, Sequence[str]]] = []
    for floor, name, metrics in floors:
        rows.append((floor, metrics))
        if not codec.in_pixel_space:
            ceiling = reconstructions(floor, codec, accelerator.device, evaluation.seed)
            rows.append((replace(ceiling, name=name), metrics))
    return rows


class Controls(NamedTuple):
    """Images that show whether memorisation would be noticed; they match the samples in number and classes."""

    train: Source  # all training images
    copies: Source  # training images, as if a model had copied them
    originals: Int64[Tensor, " n"]  # their indices in the training split
    held_out: Source


def open_controls(
    samples: Source, held_out: ImageSet, data: DataConfig, evaluation: EvaluationConfig, accelerator: Accelerator
) -> Controls:
    train = open_split(data, "train", accelerator)
    copies, originals = matching_images(samples, train, "training images", "--memorisation", evaluation.seed)
    unseen, _ = matching_images(samples, held_out, "held-out images", "--memorisation", evaluation.seed)
    return Controls(from_dataset(train, "training images"), copies, originals, unseen)
