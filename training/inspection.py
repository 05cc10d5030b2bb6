"""Inspections during a training: validation loss, scores and grids of samples."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Int64
from torch import Tensor, nn

from autoencoders.codec import Codec
from checkpoints.averages import EMA
from data.latents import LatentCache
from data.subsets import stratified
from evaluation.scoring import Reference, Scorer
from evaluation.sources import from_generator
from experiment.config import EvaluationConfig, ExperimentConfig, LogConfig, SamplingConfig
from machine.accelerator import from_main, indices_of_process
from machine.checkpoint_folder import Best, paths_by_step
from machine.randomness import generator_for
from metrics.extractors import kind_and_name
from metrics.scores import is_lower_better, metric_name
from sampling.checks import files_in_record
from sampling.generation import Generator, generate
from sampling.labels import balanced_labels, sample_labels
from training.batches import Batch
from training.curves import draw_progress
from training.log import is_due
from training.objective import Objective
from training.run import Run


def open_best(log: LogConfig, evaluation: EvaluationConfig) -> Best:
    """Create the record of `log.best`. Raises ValueError if this training does not measure it."""
    if log.best is None:
        return Best()
    extractor = kind_and_name(evaluation.extractor)
    scores = [metric_name(metric, *extractor) for metric in evaluation.metrics]
    measured_every = {"validation_loss": "validate_every", **dict.fromkeys(scores, "evaluate_every")}
    if log.best not in measured_every:
        raise ValueError(f"--log.best {log.best}: not measured in this training; there are {', '.join(measured_every)}")
    if not getattr(log, needed := measured_every[log.best]) > 0:
        raise ValueError(f"--log.best {log.best}: it is never measured; set --log.{needed} to a number of steps")
    return Best(log.best, lower=bool(is_lower_better(log.best)))


def measured_by(extractor: str, sampling: SamplingConfig, accelerator: Accelerator) -> str:
    """Hashes of the files that scores depend on: that of the extractor, and of those that sampling settings name."""
    files = from_main(accelerator, lambda: files_in_record(sampling))  # a guide may be training
    return "-".join([extractor, *filter(None, files.values())])


@dataclass(frozen=True)
class Inspections:
    """Inspects the EMA weights, with the same images, noise and labels each time. All processes take part."""

    run: Run[ExperimentConfig]
    ema: EMA
    objective: Objective
    codec: Codec
    held_out: LatentCache
    sampling: SamplingConfig
    guide_model: nn.Module | None
    scorer: Scorer | None
    reference: Reference | None

    def due(self, step: int, num_steps: int) -> list[Callable[[int], dict[str, float]]]:
        """The inspections that are due after a step. The grid of the last step is left to the end of the training."""
        log = self.run.config.log
        inspections = {self.draw: log.sample_every if step < num_steps else 0}
        inspections |= {self.validate: log.validate_every, self.score: log.evaluate_every}
        return [inspect for inspect, every in inspections.items() if is_due(step, every)]

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """Compute the mean of each loss term on a stratified sample of held-out images."""
        config, accelerator, cache = self.run.config.train, self.run.accelerator, self.held_out
        num_images, device = min(self.run.config.log.num_validation, len(cache)), accelerator.device
        index = stratified(cache.labels, num_images, config.seed)
        generator = generator_for(config.seed, "validation")
        shape = (num_images, *self.codec.latent_shape(*cache.image_size))
        posterior_noise, noise = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
        t = self.objective.diffusion.sample_timesteps(num_images, generator=generator)
        extras = self.objective.draw_loss_args(shape, generator)

        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=device))
        for part in indices_of_process(num_images, accelerator).split(config.batch_size):
            stored = cache.read(index[part], torch.zeros_like(part)).to(device)
            x_0 = self.codec.draw(stored, posterior_noise[part].to(device))
            y = cache.labels[index[part]].to(device)
            extras_part = {name: values[part].to(device) for name, values in extras.items()}
            batch = Batch(x_0, y, t[part].to(device), noise[part].to(device), extras_part)
            with accelerator.autocast():
                terms = self.objective(self.ema.model, batch)
            for name, values in terms.items():
                sums[name] = sums[name] + values.sum()
        totals: Any = accelerator.reduce(dict(sums), "sum")
        return {f"validation_{name}": total.item() / num_images for name, total in totals.items()}

    def score(self, step: int) -> dict[str, float]:
        """Score samples against the held-out images."""
        assert self.scorer is not None
        assert self.reference is not None
        evaluation = self.run.config.evaluation
        labels = sample_labels(evaluation, len(self.held_out), self.held_out.num_classes, self.held_out.labels)
        generator = self._generator(labels, evaluation.seed)
        source = from_generator(generator, self.run.config.model, self.held_out.classes)
        scores, _ = self.scorer.score(source, self.reference)
        return {name: score.value for name, score in scores.scores.items() if score.value is not None}

    def draw(self, step: int) -> dict[str, float]:
        """Save a grid with four samples of each of the first ten classes, or forty without classes."""
        classes = self.held_out.classes[:10]
        columns = len(classes) or 10
        labels = balanced_labels(4 * columns, len(classes))
        images = generate(self._generator(labels, self.run.config.train.seed), batch_size=len(labels))
        if self.run.is_main:
            self.run.log_grid(images, columns=columns, column_names=classes)
            if len(paths_by_step(self.run.folder / "samples", ".png")) > 1:
                draw_progress(self.run.folder)
        return {}

    def _generator(self, labels: Int64[Tensor, " n"], seed: int) -> Generator:
        return Generator(
            self.ema.model,
            self.objective.diffusion,
            self.codec,
            labels,
            self.sampling,
            self.held_out.image_size,
            seed,
            self.run.accelerator,
            guide_model=self.guide_model,
        )
