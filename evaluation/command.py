"""A command of `evaluate.py` that scores samples: what it opens, scores and writes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoencoders.codec import Codec, create_codec
from checkpoints.checkpoint import Checkpoint
from data.image_set import ImageSet
from data.subsets import map_labels
from evaluation import record, sources
from evaluation.baselines import Controls, baselines, open_controls
from evaluation.flags import EvaluateConfig, is_run
from evaluation.likelihood import held_out_likelihood
from evaluation.scoring import Memorisation, Reference, Row, Scorer
from evaluation.sources import Source, from_images
from evaluation.table import latex
from experiment.build import open_split
from experiment.config import DataConfig
from experiment.inputs import check_output
from machine.accelerator import from_main
from machine.atomic_files import keeping, write_atomic
from machine.lock import taking_turns
from metrics.fidelity import class_distances
from metrics.reference import read_adm, write_adm
from metrics.scores import check_per_image
from sampling.grids import save_grid
from settings import set_values

BESIDE = (".png", "-sweep.png", "-nearest.png", ".tex")  # endings of the files that go with a record


@dataclass(frozen=True)
class Inputs:
    """Everything that is opened before samples are scored."""

    codec: Codec
    reference: Reference
    held_out: ImageSet | None  # the images of the reference, unless it is a file
    rows: list[tuple[Sequence[Source], Sequence[str]]]  # trials of each row, and its metrics; baselines come last
    num_settings: int  # number of rows before the baselines
    controls: Controls | None  # of --memorisation
    labels: Tensor | None  # of the first samples, for --per_class


@dataclass(frozen=True)
class Results:
    """What was computed from the inputs; `extra` holds further entries of the record."""

    rows: list[Row]
    nearest: Memorisation | None
    extra: dict[str, Any]


@dataclass(frozen=True)
class Command:
    """A command, resolved: its flags, the checkpoint that samples are drawn from or held against, and what flags and
    checkpoint say of images and scoring."""

    flags: EvaluateConfig
    samples: str
    checkpoint: Checkpoint | None
    data: DataConfig
    scorer: Scorer

    @property
    def output(self) -> Path:
        """Path of the record; by default in the run's folder, under another name once there are newer weights, or
        next to a fixed set of samples."""
        if self.flags.output:
            return Path(self.flags.output)
        if self.checkpoint and is_run(self.samples):
            return self.checkpoint.run / f"scores{self.checkpoint.output_suffix}.json"
        path = Path(self.samples).resolve()
        return path.with_name(f"{path.name if path.is_dir() else path.stem}-scores.json")

    def open_inputs(self) -> Inputs:
        """Open the reference, which is a file or the held-out images, and the sources to score. Raises ValueError for
        flags that do not fit them, and for an output that cannot be written."""
        flags, data, evaluation, accelerator = self.flags, self.data, self.scorer.evaluation, self.scorer.accelerator
        from_main(accelerator, lambda: check_output("--output", self.output))
        for flag, is_given in (("--memorisation", flags.memorisation), ("--per_class", flags.per_class)):
            if is_given:
                check_per_image(flag, evaluation.metrics)
        test_images = self.open_test_images() if flags.memorisation or not flags.reference else None
        held_out = None if flags.reference else test_images
        name, checkpoint, path, size = flags.autoencoder, self.checkpoint, flags.reference, data.image_size
        file = read_adm(Path(path), self.scorer.extractor, (size, size)) if path else (None, None)  # moments, images
        codec = checkpoint.open_codec(name, accelerator.print) if checkpoint else create_codec(name or "pixel")
        codec = codec.to(accelerator.device)
        groups = self.open_samples(codec, file[1] if held_out is None else held_out)
        first = groups[0][0]
        rows: list[tuple[Sequence[Source], Sequence[str]]] = [(trials, evaluation.metrics) for trials in groups]
        if flags.baselines and held_out is not None:
            rows_of_images = baselines(first, data, held_out, codec, evaluation, accelerator)
            rows += [([source], metrics) for source, metrics in rows_of_images]
        controls = None
        if flags.memorisation and test_images is not None:
            controls = open_controls(first, test_images, data, evaluation, accelerator)
        labels = labels_among(first, held_out) if flags.per_class else None
        reference = self.scorer.npz_reference(path, *file) if path else self.scorer.reference(data)
        if controls:
            self.scorer.reference(data, "train", codec)  # for `memorisation`, so that errors come early
        return Inputs(codec, reference, held_out, rows, len(groups), controls, labels)

    def open_test_images(self) -> ImageSet:
        """Open the held-out images, and check that they are the checkpoint's."""
        test_images = open_split(self.data, "test", self.scorer.accelerator)
        if self.checkpoint and "test" in self.checkpoint.identity:
            self.checkpoint.check_identity(test=test_images.describe())
        return test_images

    def open_samples(self, codec: Codec, real: ImageSet | Tensor | None) -> list[list[Source]]:
        """Open the trials of each setting of the sampler, or the fixed set of samples. `real` are the images that they
        are held against, if there are any."""
        flags, evaluation, accelerator = self.flags, self.scorer.evaluation, self.scorer.accelerator
        if self.checkpoint and is_run(self.samples):
            settings, how = sources.sweep(flags.sampling), (accelerator, flags.trials, real, flags.compile)
            return sources.from_checkpoint(self.checkpoint, settings, evaluation, codec, *how)
        samples = sources.read_samples(self.samples, self.data.image_size, evaluation.num_samples, evaluation.seed)
        for message in samples.provenance.get("left_out", ()):
            accelerator.print(f"--samples {self.samples}: {message}")
        return [[samples]]

    def score(self, inputs: Inputs) -> Results:
        """Score all rows, and compute whatever else is requested; only the main process has the results."""
        flags, scorer, extra = self.flags, self.scorer, dict[str, Any]()
        is_main = scorer.accelerator.is_main_process
        if flags.likelihood and self.checkpoint and inputs.held_out:
            where, num = (self.checkpoint, inputs.codec, inputs.held_out), flags.likelihood
            bits = held_out_likelihood(*where, num, scorer.accelerator, seed=scorer.evaluation.seed)
            extra["bits_per_dimension"] = {**asdict(bits), "num_images": num}
            scorer.accelerator.print(record.LIKELIHOOD.format(**extra["bits_per_dimension"]))  # or an error takes it
        unfinished = record.unfinished_path(self.output, repr(flags))

        def keep(done: list[Row]) -> None:  # or hours of scoring are lost with the process
            if is_main:
                record.write_unfinished({**record.provenance(done, inputs.reference, scorer), **extra}, unfinished)

        rows, features = scorer.score_rows(inputs.rows, inputs.reference, keep)
        nearest = None
        if inputs.controls:
            nearest = scorer.memorisation(features, inputs.controls, self.data, inputs.codec)
            extra["memorisation"] = nearest.to_dict()
        if is_main and inputs.held_out is not None and inputs.labels is not None:
            features, classes = replace(features, labels=inputs.labels), inputs.held_out.classes
            distances = class_distances(features, inputs.reference.features)
            extra["per_class"] = {classes[label]: asdict(score) for label, score in distances.items()}
        return Results(rows, nearest, extra)

    def columns(self, inputs: Inputs) -> list[str]:
        """Settings of the sampler to show with the scores, if rows differ in them."""
        sampling = set_values(self.flags.sampling)
        swept = [name for name, value in sampling.items() if isinstance(value, str) and "," in value]
        return [*dict.fromkeys([*record.SWEPT, *swept])] if inputs.num_settings > 1 else []

    def report(self, inputs: Inputs, results: Results) -> str:
        columns, extractor = self.columns(inputs), self.scorer.extractor
        return record.format_report(results.rows, columns, inputs.reference, extractor, results.extra)

    def write(self, inputs: Inputs, results: Results) -> list[Path]:
        """Write the record, with everything needed to reproduce it, and the files that go with it; return the paths.
        Files that went with an earlier record are kept."""
        output = self.output  # by now there may be newer weights
        finished = {**record.provenance(results.rows, inputs.reference, self.scorer), **results.extra}
        beside = [output.with_name(f"{output.stem}{ending}") for ending in BESIDE]
        with taking_turns(output.parent), keeping(beside):  # or one's pictures could end up with another's record
            record.write_json(finished, output)
            record.remove_unfinished(finished, output)
            written = [output, *self.write_pictures(output, inputs, results)]
            if self.flags.latex:
                written.append(output.with_suffix(".tex"))
                write_atomic(written[-1], record.table(results.rows, self.columns(inputs), form=latex))
        if self.flags.write_reference and inputs.held_out:
            pixels = from_images(inputs.held_out, "held-out images").images(torch.arange(len(inputs.held_out)))
            written.append(Path(self.flags.write_reference))
            write_adm(written[-1], inputs.reference.features, pixels, self.scorer.extractor)
        return written

    def write_pictures(self, output: Path, inputs: Inputs, results: Results) -> list[Path]:
        """Save a grid of the first samples, the plot of a sweep, and samples above their nearest training images."""
        first, written = inputs.rows[0][0][0], [output.with_suffix(".png")]
        save_grid(first.images(torch.arange(min(24, first.num_images))), written[-1], columns=12)
        if inputs.num_settings > 1:
            written.append(output.with_name(f"{output.stem}-sweep.png"))
            record.draw_sweep(results.rows[: inputs.num_settings], written[-1], self.columns(inputs))
        if results.nearest and inputs.controls:
            written.append(output.with_name(f"{output.stem}-nearest.png"))
            record.draw_pairs(first, inputs.controls.train, results.nearest, written[-1])
        return written


def labels_among(samples: Source, held_out: ImageSet | None) -> Tensor:
    """Labels of samples among the classes of held-out images."""
    if held_out is None or samples.labels is None or not held_out.classes:
        raise ValueError("--per_class: it needs samples and held-out images of classes that have names")
    return map_labels(samples.labels, samples.classes, held_out.classes, "--per_class")
