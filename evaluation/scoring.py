"""The one path to a score: a source of images, a reference's features, an extractor.

`evaluate.py`, evaluation during training and ablations all come through a `Scorer`: the same weights and the same
`EvaluationConfig` give the same numbers. Images go from the sampler to the extractor in memory; processes share them.
"""

from collections.abc import Sequence
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
from data.subsets import by_name
from evaluation.sources import Source, from_dataset, from_images, reconstructions
from experiment.build import open_split
from experiment.config import DataConfig, EvaluationConfig
from machine.accelerator import from_main, share
from metrics.agreement import fit_probe
from metrics.features import Extractor, Features
from metrics.fidelity import Scores, compare
from metrics.frechet import frechet_distance
from metrics.manifold import nearest, share_of_pairs_closer
from metrics.reference import load_features, reference_path, save_features
from metrics.scores import Score, check_metrics, metric_name, needs_of


@dataclass(frozen=True)
class Reference:
    """What samples are held against: its features, and what they are of."""

    features: Features
    provenance: dict[str, Any]
    classes: Sequence[str] = ()  # of its labels


@dataclass(frozen=True)
class Memorisation:
    """Whether samples lie closer to the training images than held-out images do, in feature space.

    `closer` is the chance that a random sample lies closer to its nearest training image than a random held-out image
    does: 0.5 where samples are as near as new photographs, 1 where each repeats one. `copies` is the same of training
    images planted in the samples' place, `found` the share of those whose nearest is the image itself: where these are
    not near 1, `closer` can tell nothing.
    """

    closer: float
    copies: float
    found: float
    distances: Float[Tensor, " n"]
    nearest: Int64[Tensor, " n"]


class Scorer:
    """Sources of images to features, by all processes, and to scores, by the main one for all."""

    def __init__(self, evaluation: EvaluationConfig, accelerator: Accelerator) -> None:
        check_metrics(evaluation.metrics)
        self.evaluation, self.accelerator = evaluation, accelerator
        device = accelerator.device
        self.extractor = Extractor(evaluation.extractor, weights_path=evaluation.weights_path, device=device)

    def extract(self, source: Source) -> Features:
        """A source's features, with what the metrics need of them."""
        mine = share(source.num_images, self.accelerator)
        return self.extractor(
            source.batches(mine, self.evaluation.batch_size),
            len(mine),
            metrics=self.evaluation.metrics,
            gather=gather_object,
            progress=self.accelerator.is_main_process,
            desc=source.name,
        )

    def reference(self, data: DataConfig, split: str = "test", codec: Codec | None = None) -> Reference:
        """Features of a split, or of what a codec makes of it, computed once and kept in the cache folder. Where
        metrics ask for classes, held-out images have a probe of the training images beside them."""
        dataset = open_split(data, split, self.accelerator)
        for words in left_out(dataset):
            self.accelerator.print(f"{split} images: {words}")
        key = {
            **dataset.describe(),
            "extractor": self.extractor.name,
            "extractor_sha256": self.extractor.sha256,
            "needs": sorted(needs_of(self.evaluation.metrics)),
            **({"codec": codec.provenance} if codec else {}),
        }
        path = reference_path(Path(data.cache) / "references", key)
        if from_main(self.accelerator, lambda: not path.exists()):
            source = from_dataset(dataset, f"{split} images")
            source = reconstructions(source, codec, self.accelerator.device) if codec else source
            features = self.extract(source)
            if self.accelerator.is_main_process:
                save_features(features, path, key)
            self.accelerator.wait_for_everyone()
        features = load_features(path, key)
        if split == "test" and "labelled" in key["needs"] and dataset.classes:
            train: Any = self.reference(data, "train").features
            probe = from_main(self.accelerator, lambda: fit_probe(train.features, train.labels, len(dataset.classes)))
            features = replace(features, probe=probe)
        return Reference(features, {**key, "features": path.name}, dataset.classes)

    def npz_reference(self, path: str, moments: Features | None, images: UInt8[Tensor, "n 3 h w"] | None) -> Reference:
        """Of what `read_adm` reads, moments, images or both; where there are images, those give what moments cannot."""
        name, features = Path(path).name, moments
        if images is not None:
            features = self.extract(from_images(images, name))
            if moments is not None:
                features = replace(features, moments=moments.moments, spatial=moments.spatial or features.spatial)
        assert features is not None  # read_adm saw to it
        return Reference(features, {"source": name, "moments": "of the file" if moments else "of its images"})

    def score(
        self, source: Source, reference: Reference, metrics: Sequence[str] | None = None
    ) -> tuple[Scores, Features]:
        """Scores of a source against a reference, and the features that they came from. Beside the Fréchet distance
        stands that of half the images: mean and half the difference of two halves."""
        metrics = metrics or self.evaluation.metrics
        features = self.extract(source)
        if "labelled" in needs_of(metrics) and features.labels is not None and reference.classes:
            labels = None
            if source.classes:
                labels = by_name(features.labels, source.classes, reference.classes, "--metrics agreement")
            features = replace(features, labels=labels)
        return from_main(self.accelerator, lambda: self._scores(features, reference, metrics)), features

    def _scores(self, features: Features, reference: Reference, metrics: Sequence[str]) -> Scores:
        extractor = self.extractor
        scores = compare(features, reference.features, extractor, metrics=metrics, seed=self.evaluation.seed)
        if "fid" in metrics and features.halves and min(half.num or 0 for half in features.halves) > 1:
            first, second = (frechet_distance(half, reference.features.moments) for half in features.halves)
            scores.scores[f"{metric_name('fid', extractor.kind, extractor.name)}, halves"] = Score(
                (first + second) / 2, abs(first - second) / 2, spread="half the difference of two random halves"
            )
        return scores

    def memorisation(
        self,
        features: Features,
        copies: Source,
        originals: Int64[Tensor, " n"],
        held_out: Source,
        data: DataConfig,
        codec: Codec,
    ) -> Memorisation:
        """Nearest training images, decoded from posteriors' means, of samples with these features; of `copies` of
        training images (their `originals` by index); of held-out images, decoded draws."""
        train: Any = self.reference(data, "train", codec).features.features

        def nearest_to(features: Features) -> tuple[Tensor, Tensor]:
            device, mine = self.extractor.device, features.features
            assert mine is not None
            return from_main(self.accelerator, lambda: nearest(mine.to(device), train))

        def through_codec(source: Source) -> Features:
            return self.extract(reconstructions(source, codec, self.accelerator.device, seed=self.evaluation.seed))

        distances, index = nearest_to(features)
        of_copies, nearest_to_copies = nearest_to(through_codec(copies))
        of_held_out, _ = nearest_to(through_codec(held_out))
        closer, copied = (share_of_pairs_closer(each, of_held_out) for each in (distances, of_copies))
        found = (nearest_to_copies == originals).double().mean().item()
        return Memorisation(closer, copied, found, distances, index)


def open_scorer(data: DataConfig, accelerator: Accelerator, evaluation: EvaluationConfig) -> tuple[Scorer, Reference]:
    """A scorer and the held-out images' features: what says early on that an extractor or a metric is not there."""
    scorer = Scorer(evaluation, accelerator)
    return scorer, scorer.reference(data)


@dataclass(frozen=True)
class Row:
    """One line of the table: a source's scores, over trials where there were several."""

    name: str
    scores: dict[str, Score]
    settings: dict[str, Any]
    trials: list[Scores]

    def to_dict(self) -> dict[str, Any]:
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
    for metric in trials[0].scores:
        scores = [trial.scores[metric] for trial in trials]
        if lacking := next((score for score in scores if score.value is None), None):  # a trial's alone is no mean
            summary[metric] = lacking
            continue
        values = torch.tensor([score.value for score in scores], dtype=torch.float64)
        over = f"standard deviation over {len(trials)} trials"
        summary[metric] = Score(values.mean().item(), values.std().item(), spread=over)
    return Row(source.name, summary, source.provenance, trials)
