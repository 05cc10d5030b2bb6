"""Score a source of images against the features of a reference.

`evaluate.py`, evaluation during training and ablations all use a `Scorer`, so the same weights and the same
`EvaluationConfig` give the same numbers. Images pass from the sampler to the extractor in memory, distributed over all
processes.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from autoencoders.codec import Codec
from checkpoints.checkpoint import current_commit
from data import summarize_left_out
from data.subsets import map_labels
from evaluation.baselines import Controls
from evaluation.sources import Source, from_dataset, from_images, reconstructions
from experiment.build import open_split
from experiment.config import DataConfig, EvaluationConfig
from experiment.inputs import check_output
from machine.accelerator import from_main, indices_of_process
from metrics.features import Extractor, Features
from metrics.fidelity import Scores, compute_scores
from metrics.frechet import frechet_distance
from metrics.manifold import nearest_neighbours, probability_closer
from metrics.reference import fit_cached_probe, hash_adm, load_features, reference_path, save_features
from metrics.scores import Score, check_metrics, metric_name, required_features


@dataclass(frozen=True)
class Reference:
    """Features of the images that samples are compared with."""

    features: Features
    provenance: dict[str, Any]
    classes: Sequence[str] = ()  # names of the features' labels


@dataclass(frozen=True)
class Memorisation:
    """Whether samples lie closer to the training images than held-out images do, in feature space. `closer` only has a
    meaning if the control experiment with copies of training images gives values near 1."""

    closer: float  # probability that a sample is closer than a held-out image: 0.5 for novel samples, 1 for copies
    copies: float  # the same for copies of training images in place of the samples
    found: float  # fraction of these copies whose nearest training image is their original
    distances: Float[Tensor, " n"]  # from each sample to its nearest training image
    nearest: Int64[Tensor, " n"]  # index of that image

    def to_dict(self) -> dict[str, float]:
        planted = {"planted_copies_closer": self.copies, "planted_copies_found": self.found}
        return {"closer_to_training_than_held_out": self.closer, **planted}


class Scorer:
    """Computes features with all processes, and scores on the main process, which broadcasts them."""

    def __init__(self, evaluation: EvaluationConfig, accelerator: Accelerator) -> None:
        check_metrics(evaluation.metrics)
        self.evaluation, self.accelerator = evaluation, accelerator
        self.commit = current_commit()  # now, as the code may change while hours of scoring run
        device = accelerator.device
        self.extractor = Extractor(evaluation.extractor, weights_path=evaluation.weights_path, device=device)

    def extract(self, source: Source) -> Features:
        """Compute the features of a source that the metrics need."""
        indices = indices_of_process(source.num_images, self.accelerator)
        return self.extractor(
            source.batches(indices, self.evaluation.batch_size),
            len(indices),
            metrics=self.evaluation.metrics,
            gather=gather_object,
            progress=self.accelerator.is_main_process,
            desc=source.name,
        )

    def reference(self, data: DataConfig, split: str = "test", codec: Codec | None = None) -> Reference:
        """Load the features of a split, or of its reconstructions by `codec`; on first use compute and cache them. If a
        metric needs classes, those of the test split include a linear probe fitted to the whole training split."""
        dataset = open_split(data, split, self.accelerator)
        for message in summarize_left_out(dataset):
            self.accelerator.print(f"{split} images: {message}")
        key = {
            **dataset.describe(),
            "extractor": self.extractor.name,
            "extractor_sha256": self.extractor.sha256,
            "needs": sorted(required_features(self.evaluation.metrics)),
            **({"codec": codec.provenance} if codec else {}),
        }
        path = reference_path(Path(data.cache) / "references", key)
        if from_main(self.accelerator, lambda: not path.exists()):
            from_main(self.accelerator, lambda: check_output("--data.cache", path))
            source = from_dataset(dataset, f"{split} images")
            source = reconstructions(source, codec, self.accelerator.device) if codec else source
            features = self.extract(source)
            if self.accelerator.is_main_process:
                save_features(features, path, key)
            self.accelerator.wait_for_everyone()
        features = load_features(path, key)
        if split == "test" and "labelled" in key["needs"] and dataset.classes:
            train = self.reference(replace(data, train_fraction=1.0), "train")
            file = path.with_name(train.provenance["features"])
            probe = from_main(
                self.accelerator,
                lambda: fit_cached_probe(train.features, len(dataset.classes), file, train.provenance),
            )
            features = replace(features, probe=probe)
        return Reference(features, {**key, "features": path.name}, dataset.classes)

    def npz_reference(self, path: str, moments: Features | None, images: UInt8[Tensor, "n 3 h w"] | None) -> Reference:
        """Create the reference of a file that `read_adm` read; its moments go before features of its images."""
        name, features = Path(path).name, moments
        if images is not None:
            features = self.extract(from_images(images, name))
            if moments is not None:
                features = replace(features, moments=moments.moments, spatial=moments.spatial or features.spatial)
        assert features is not None  # read_adm returns at least one of them
        about = {"source": name, "source_hash": hash_adm(moments, images)}
        return Reference(features, {**about, "moments": "of the file" if moments else "of its images"})

    def score(
        self, source: Source, reference: Reference, metrics: Sequence[str] | None = None
    ) -> tuple[Scores, Features]:
        """Score a source against a reference, and also return its features. The Fréchet distance is accompanied by that
        of half the images: the mean of two halves, and half their difference."""
        metrics = metrics or self.evaluation.metrics
        features = self.extract(source)
        if "labelled" in required_features(metrics) and features.labels is not None and reference.classes:
            labels = None
            if source.classes:
                labels = map_labels(features.labels, source.classes, reference.classes, "--metrics agreement")
            features = replace(features, labels=labels)
        return from_main(self.accelerator, lambda: self._scores(features, reference, metrics)), features

    def _no_scores(self, source: Source, metrics: Sequence[str], reason: str) -> Scores:
        """The scores of a source that could not be scored: none, with the reason."""
        names = [metric_name(metric, self.extractor.kind, self.extractor.name) for metric in metrics]
        names += [f"{name}, halves" for metric, name in zip(metrics, names, strict=True) if metric == "fid"]
        return Scores({name: Score(None, reason=reason) for name in names}, source.num_images)

    def _scores(self, features: Features, reference: Reference, metrics: Sequence[str]) -> Scores:
        extractor = self.extractor
        scores = compute_scores(features, reference.features, extractor, metrics=metrics, seed=self.evaluation.seed)
        if "fid" in metrics and features.halves and min(half.num or 0 for half in features.halves) > 1:
            first, second = (frechet_distance(half, reference.features.moments) for half in features.halves)
            scores.scores[f"{metric_name('fid', extractor.kind, extractor.name)}, halves"] = Score(
                (first + second) / 2, abs(first - second) / 2, spread="half the difference of two random halves"
            )
        return scores

    def score_rows(
        self,
        rows: Sequence[tuple[Sequence[Source], Sequence[str]]],
        reference: Reference,
        keep: Callable[[list["Row"]], object] = lambda done: None,
    ) -> tuple[list["Row"], Features]:
        """Score rows of the table, given as trials and metrics, and also return the features of the first trial.

        `keep` is called with what is done after each trial. Trials after the first that cannot be scored, such as those
        of settings that diverge, have no scores.
        """
        features = None
        summaries: list[Row] = []
        for trials, metrics in rows:
            scores = []
            for source in trials:
                try:
                    trial_scores, trial_features = self.score(source, reference, metrics)
                    features = features or trial_features
                except ValueError as error:  # the same on all processes
                    if features is None:
                        raise
                    self.accelerator.print(f"{source.name}: no scores: {error}")
                    trial_scores = self._no_scores(source, metrics, str(error))
                scores.append(trial_scores)
                keep([*summaries, summarise(trials[0], scores)])
            summaries.append(summarise(trials[0], scores))
        assert features is not None
        return summaries, features

    def memorisation(self, features: Features, controls: Controls, data: DataConfig, codec: Codec) -> Memorisation:
        """Compare the distances of samples, given by their features, and of held-out images to their nearest training
        images.

        All images pass through the codec, so that its artefacts do not matter: training images are decoded from the
        posterior's mean, copies and held-out images from a sample of the posterior.
        """
        train: Any = self.reference(data, "train", codec).features.features

        def find_nearest(features: Features) -> tuple[Tensor, Tensor]:
            queries = features.features
            assert queries is not None
            return from_main(self.accelerator, lambda: nearest_neighbours(queries.to(self.extractor.device), train))

        def through_codec(source: Source) -> Features:
            return self.extract(reconstructions(source, codec, self.accelerator.device, seed=self.evaluation.seed))

        distances, indices = find_nearest(features)
        copy_distances, copy_indices = find_nearest(through_codec(controls.copies))
        held_out_distances, _ = find_nearest(through_codec(controls.held_out))
        return Memorisation(
            closer=probability_closer(distances, held_out_distances),
            copies=probability_closer(copy_distances, held_out_distances),
            found=(copy_indices == controls.originals).double().mean().item(),
            distances=distances,
            nearest=indices,
        )


def open_scorer(data: DataConfig, accelerator: Accelerator, evaluation: EvaluationConfig) -> tuple[Scorer, Reference]:
    """Create a scorer and the reference of held-out images, early enough to notice a missing extractor."""
    scorer = Scorer(evaluation, accelerator)
    return scorer, scorer.reference(data)


@dataclass(frozen=True)
class Row:
    """A row of the table: a source's scores, summarised over its trials."""

    name: str
    scores: dict[str, Score]
    settings: dict[str, Any]
    trials: list[Scores]

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "scores": {name: asdict(score) for name, score in self.scores.items()},
            "samples": self.settings,
            "trials": [{name: asdict(score) for name, score in trial.scores.items()} for trial in self.trials],
        }


def summarise(source: Source, trials: list[Scores]) -> Row:
    """Combine trials into a row: a single trial's scores, or the mean and standard deviation (n - 1) of several."""
    if len(trials) == 1:
        return Row(source.name, trials[0].scores, source.provenance, trials)
    summary = {}
    for metric in trials[0].scores:
        scores = [trial.scores[metric] for trial in trials]
        if missing := next((score for score in scores if score.value is None), None):  # no mean over fewer trials
            summary[metric] = missing
            continue
        values = torch.tensor([score.value for score in scores], dtype=torch.float64)
        over = f"standard deviation over {len(trials)} trials"
        summary[metric] = Score(values.mean().item(), values.std().item(), spread=over)
    return Row(source.name, summary, source.provenance, trials)
