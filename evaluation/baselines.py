"""What samples stand beside: real images, as the floor, and what the autoencoder makes of them, as the ceiling."""

from collections.abc import Sequence
from dataclasses import replace

from accelerate import Accelerator

from autoencoders.codec import Codec
from data.image_set import ImageSet
from evaluation.sources import Source, from_dataset, like, reconstructions
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
    """Each with the metrics that it is asked for: training images, as many as there are samples and of the same
    classes; for metrics by class held-out images, which the probe of the training images has not seen. In pixel space
    there is nothing to reconstruct."""
    by_class = [name for name in evaluation.metrics if METRICS[name].needs == "labelled" and not METRICS[name].teaches]
    others = [name for name in evaluation.metrics if name not in by_class]
    floors: list[tuple[Source, str, list[str]]] = []  # with what their reconstructions are called
    if others:
        train = open_split(data, "train", accelerator)
        photographs, _ = like(samples, train, "training images", "--baselines", evaluation.seed)
        floors.append((photographs, "reconstructions", others))
    if by_class:
        photographs = from_dataset(held_out, "held-out images", evaluation.num_samples, evaluation.seed)
        floors.append((photographs, "reconstructions of held-out images", by_class))
    rows: list[tuple[Source, Sequence[str]]] = []
    for floor, name, metrics in floors:
        rows.append((floor, metrics))
        if codec.source != "pixel":
            ceiling = reconstructions(floor, codec, accelerator.device, evaluation.seed)
            rows.append((replace(ceiling, name=name), metrics))
    return rows
