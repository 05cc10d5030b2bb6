"""The one path to a score: a source of images, a reference's features, an extractor.

`evaluate.py`, evaluation during training and ablations all come through `evaluate`: the same weights and the same
`EvaluationConfig` give the same numbers. Images go from the sampler to the extractor in memory; processes share them.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from autoencoders.codec import Codec
from data import left_out
from evaluation.sources import Source, from_dataset, from_images, reconstructions
from experiment.config import DataConfig, EvaluationConfig
from experiment.datasets import open_split
from machine.accelerator import from_main
from metrics.features import Extractor, Features
from metrics.fidelity import Scores, compare
from metrics.frechet import frechet_distance
from metrics.manifold import nearest, share_of_pairs_closer
from metrics.reference import load_features, reference_path, save_features
from metrics.scores import Score, check_metrics, metric_name, needs_of
from sampling.generation import share


@dataclass(frozen=True)
class Reference:
    """What samples are held against: its features, and what they are of."""

    features: Features
    provenance: dict[str, Any]


def dataset_reference(
    data: DataConfig,
    split: str,
    extractor: Extractor,
    accelerator: Accelerator,
    evaluation: EvaluationConfig,
    codec: Codec | None = None,
) -> Reference:
    """Features of a split, or of what a codec makes of it, computed once for each (images, split, size, extractor,
    codec) and kept in the cache folder."""
    dataset = open_split(data, split)
    for words in left_out(dataset):
        accelerator.print(f"{split} images: {words}")
    key = {
        **dataset.describe(),
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "needs": sorted(needs_of(evaluation.metrics)),
        **({"codec": codec.provenance} if codec else {}),
    }
    path = reference_path(Path(data.cache) / "references", key)
    if from_main(accelerator, lambda: not path.exists()):
        source = from_dataset(dataset, f"{split} images")
        source = reconstructions(source, codec, accelerator.device) if codec else source
        features = extract(source, extractor, accelerator, evaluation)
        if accelerator.is_main_process:
            save_features(features, path, key)
        accelerator.wait_for_everyone()
    return Reference(load_features(path, key), {**key, "features": path.name})


def open_scorer(
    data: DataConfig, accelerator: Accelerator, evaluation: EvaluationConfig
) -> tuple[Reference, Extractor]:
    """The held-out images' features and the extractor: what `evaluate` wants beside a source.

    Raises:
        ValueError: for an extractor or metric that there is not, before any work is done.
    """
    check_metrics(evaluation.metrics)
    extractor = Extractor(evaluation.extractor, weights_path=evaluation.weights_path, device=accelerator.device)
    return dataset_reference(data, "test", extractor, accelerator, evaluation), extractor


def npz_reference(
    path: str,
    moments: Features | None,
    images: UInt8[Tensor, "n 3 h w"] | None,
    extractor: Extractor,
    accelerator: Accelerator,
    evaluation: EvaluationConfig,
) -> Reference:
    """Of what `read_adm` reads, moments, images or both; where there are images, those give what moments cannot."""
    name, features = Path(path).name, moments
    if images is not None:
        features = extract(from_images(images, name), extractor, accelerator, evaluation)
        if moments is not None:
            features = replace(features, moments=moments.moments, spatial=moments.spatial or features.spatial)
    assert features is not None  # read_adm saw to it
    return Reference(features, {"source": name, "moments": "of the file" if moments else "of its images"})


def extract(source: Source, extractor: Extractor, accelerator: Accelerator, evaluation: EvaluationConfig) -> Features:
    """A source's features, on every process; the work is shared by all of them."""
    mine = share(source.num_images, accelerator)
    return extractor(
        source.batches(mine, evaluation.batch_size),
        len(mine),
        metrics=evaluation.metrics,
        gather=gather_object,
        progress=accelerator.is_main_process,
        desc=source.name,
    )


def evaluate(
    source: Source,
    reference: Reference,
    extractor: Extractor,
    accelerator: Accelerator,
    evaluation: EvaluationConfig,
) -> tuple[Scores, Features]:
    """Scores of a source against a reference, and the features that they came from.

    Beside the Fréchet distance stands that of half the images: mean and half the difference of two halves, which
    tells how far a finite sample moves it.
    """
    features = extract(source, extractor, accelerator, evaluation)
    scores = compare(features, reference.features, extractor, metrics=evaluation.metrics, seed=evaluation.seed)
    if "fid" in evaluation.metrics and features.halves and min(half.num or 0 for half in features.halves) > 1:
        first, second = (frechet_distance(half, reference.features.moments) for half in features.halves)
        scores.scores[f"{metric_name('fid', extractor.kind, extractor.name)}, halves"] = Score(
            (first + second) / 2, abs(first - second) / 2, spread="half the difference of two random halves"
        )
    return scores, features


@dataclass(frozen=True)
class Memorisation:
    """Whether samples lie closer to the training images than held-out images do, in feature space; all of them through
    the autoencoder that the samples came through.

    `closer` is the chance that a random sample lies closer to its nearest training image than a random held-out image
    of the samples' classes does to its own: 0.5 where the samples are as near to them as new photographs are, 1 where
    each repeats one, below 0.5 where they are unlike any photograph, copied or not. `copies` is the same of as many
    training images planted in the samples' place, `found` the share of those whose nearest is the image itself: where
    these are not near 1, `closer` can tell nothing. `nearest` holds, for each sample, its nearest training image,
    `distances` how far away it is.
    """

    closer: float
    copies: float
    found: float
    distances: Float[Tensor, " n"]
    nearest: Int64[Tensor, " n"]


def memorisation(
    features: Features,
    copies: Source,
    originals: Int64[Tensor, " n"],
    held_out: Source,
    data: DataConfig,
    codec: Codec,
    extractor: Extractor,
    accelerator: Accelerator,
    evaluation: EvaluationConfig,
) -> Memorisation:
    """Nearest neighbours among the training images of samples, whose features these are. `copies` of training images,
    with the indices of their `originals`, and held-out images are `like` them.

    The training images are the decoded means of their posteriors; held-out images and planted copies are decoded draws,
    as samples are that a model made of such draws. The metrics have to keep the features of each image.
    """
    train = dataset_reference(data, "train", extractor, accelerator, evaluation, codec).features.features

    def nearest_to(features: Features) -> tuple[Tensor, Tensor]:
        assert features.features is not None
        assert train is not None
        return nearest(features.features, train)

    def through_codec(source: Source) -> Features:
        drawn = reconstructions(source, codec, accelerator.device, seed=evaluation.seed)
        return extract(drawn, extractor, accelerator, evaluation)

    distances, index = nearest_to(features)
    of_copies, nearest_to_copies = nearest_to(through_codec(copies))
    of_held_out, _ = nearest_to(through_codec(held_out))
    return Memorisation(
        closer=share_of_pairs_closer(distances, of_held_out),
        copies=share_of_pairs_closer(of_copies, of_held_out),
        found=(nearest_to_copies == originals).double().mean().item(),
        distances=distances,
        nearest=index,
    )


@dataclass(frozen=True)
class Row:
    """One line of the table: a source's scores, over trials where there were several."""

    name: str
    scores: dict[str, Score]
    settings: dict[str, Any]
    trials: list[Scores]

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as JSON takes them."""
        return {
            "name": self.name,
            "scores": {name: asdict(score) for name, score in self.scores.items()},
            "samples": self.settings,
            "trials": [{name: asdict(one) for name, one in trial.scores.items()} for trial in self.trials],
        }


def summarise(source: Source, trials: list[Scores]) -> Row:
    """One trial's scores as they are; of several, their mean and standard deviation (n - 1)."""
    if len(trials) == 1:
        return Row(source.name, trials[0].scores, source.provenance, trials)
    summary = {}
    for metric, score in trials[0].scores.items():
        values = [trial.scores[metric].value for trial in trials]
        known = torch.tensor([value for value in values if value is not None], dtype=torch.float64)
        complete = len(known) == len(trials)
        over = f"standard deviation over {len(trials)} trials"
        summary[metric] = Score(known.mean().item(), known.std().item(), spread=over) if complete else score
    return Row(source.name, summary, source.provenance, trials)
