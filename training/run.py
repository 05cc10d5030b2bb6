"""The training loop that backbones and autoencoders share: logging, checkpoints, inspections, rollbacks and stops."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Generic

import yaml
from accelerate.tracking import get_available_trackers
from accelerate.utils import set_seed
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from autoencoders.codec import AutoencoderError
from checkpoints.checkpoint import WEIGHTS, check_identity, make_metadata
from checkpoints.training_state import TrainingState, copy_checkpoint, resume
from experiment.run_config import R, with_resume
from machine.accelerator import from_main, open_accelerator
from machine.atomic_files import write_atomic
from machine.background import Background
from machine.checkpoint_folder import Best, check_links, checkpoint_to_resume, mark_best, rotate
from machine.sharding import is_sharded
from metrics.extractors import ExtractorError
from sampling.grids import save_grid
from training.curves import draw_curve
from training.guard import Guard
from training.interruption import Interruption, Stopped
from training.log import Log, errors_as_warnings, is_due
from training.meter import Meter
from training.resumption import changed_metric, discard_later_results, former_settings, start_or_resume

SECONDS_BETWEEN_CURVES = 10.0  # plotting takes as long as a save in short trainings
Inspection = Callable[[int], Mapping[str, float]]  # an inspection: takes the step, returns measured values


@contextmanager
def open_run(config: R, **options: Any) -> Iterator["Run[R]"]:
    """Context of a training: Accelerator (with `options`), locked folder, and the checkpoint to resume."""
    available = [str(tracker) for tracker in get_available_trackers()]
    for tracker in config.log.trackers:
        if tracker not in available:
            raise ValueError(f"--log.trackers {tracker}: not installed; there are {', '.join(available)}")
    options |= {"log_with": config.log.trackers or None, "project_dir": config.folder}
    accelerator = open_accelerator(config.train.precision, flag="--train.precision", **options)
    config = from_main(accelerator, lambda: config)
    with Interruption(config.folder, accelerator, config.train.max_hours) as interruption:
        config, checkpoint = from_main(accelerator, lambda: start_or_resume(config, accelerator.print))
        set_seed(config.train.seed)
        run = Run(with_resume(config, None), checkpoint, interruption)
        with run.writing:
            yield run


class Run(Generic[R]):
    """A training run. After `begin`, iterating over `steps` runs the loop; between steps the run inspects, saves,
    rolls back or stops. All processes must make the same calls."""

    # Set by `begin`.
    training: TrainingState
    guards: Mapping[str, Guard]  # of each trained network, by its name
    due: Callable[[int, int], Sequence[Inspection]]  # inspections after a step, given the step and the total number
    num_steps: int
    best: Best  # the metric by which the best checkpoint is kept
    metadata: Mapping[str, str]
    is_sharded: bool
    log: Log

    def __init__(self, config: R, checkpoint: Path | None, interruption: Interruption) -> None:
        self.config, self.checkpoint, self.interruption = config, checkpoint, interruption
        self.folder, self.accelerator = interruption.run, interruption.accelerator
        self.is_main, self.checkpoints = self.accelerator.is_main_process, self.folder / "checkpoints"
        self.meter, self.writing = Meter(self.accelerator), Background()
        self.step = 0  # number of optimizer steps taken
        self.identity: dict[str, Mapping[str, Any]] = {}
        self._saved: int | None = None  # step of the newest checkpoint, which may not be written completely yet
        self._saved_at = time.monotonic()  # time of the newest checkpoint, or of the start
        self._inspected = True  # False if the inspections of this step were interrupted; a resumed run repeats them
        self._stop_reason: str | None = None
        self._plotted_at = time.monotonic()  # time of the newest plot of the losses, or of the start

    def check_identity(self, **parts: Mapping[str, Any]) -> None:
        """Check that latents and splits are those of the resumed checkpoint, by `checkpoint.check_identity`."""
        self.identity = parts
        if self.checkpoint is not None:
            check_identity(self.checkpoint / WEIGHTS, parts, any_decoder=True)

    def begin(
        self,
        training: TrainingState,
        guards: Mapping[str, Guard],
        due: Callable[[int, int], Sequence[Inspection]],
        num_steps: int,
        *,
        best: Best | None = None,
        **metadata: Any,
    ) -> None:
        """Load the checkpoint's state, if the run is resumed, and open the log; `metadata` is for checkpoints."""
        self.training, self.guards, self.due, self.num_steps = training, guards, due, num_steps
        self.best = best or Best()
        if self.best.metric:
            from_main(self.accelerator, lambda: check_links(self.folder))
        if (checkpoint := self.checkpoint) is not None:
            history = from_main(self.accelerator, lambda: former_settings(checkpoint, self.config))
            metadata |= {"history": history} if history else {}
        self.metadata = make_metadata(self.config, self.step, self.identity, **metadata)  # now, as the code may change
        named_guards = {f"guard.{name}": guard for name, guard in guards.items()}
        training.others.update({"meter": self.meter, "best": self.best, **named_guards})
        self.is_sharded = any(is_sharded(network) for network in training.networks.values())
        if checkpoint is not None:
            self._restore(checkpoint)
            changed = from_main(self.accelerator, lambda: changed_metric(checkpoint, self.config, self.identity))
            changed += ["content of --evaluation.extractor or of files of --sampling"] * self.best.lost
            if changed and (self.best.lost or self.best.value is not None):
                self.best.value = None
                note = f"{self.checkpoints}/best is kept until there is another: earlier values are not comparable"
                self.accelerator.print(f"{note}, because of other {', '.join(changed)}")
        if self.is_main:
            text, path = yaml.safe_dump(self.config.to_dict(), sort_keys=False), self.folder / "config.yaml"
            is_other = checkpoint is None and path.is_file() and path.read_text() != text
            write_atomic(path, text, keep=is_other)  # of a training whose checkpoints were deleted, or of the user
        self.accelerator.wait_for_everyone()
        self.interruption.begin()
        self._saved_at = time.monotonic()
        self.log = Log(self.folder, self.accelerator, self.config.to_dict(), self.step, self.rollbacks)

    @property
    def rollbacks(self) -> int:
        """Number of rollbacks so far; the order of the data depends on it."""
        return sum(guard.rollbacks for guard in self.guards.values())

    def steps(self) -> Iterator[int]:
        """Yield the index of each optimizer step to take. A rollback repeats steps. Raises TrainingDivergedError, or
        Stopped if the run is stopped early, after saving."""
        if not self._inspected and (due := self.due(self.step, self.num_steps)):
            self.inspect(*due)
            self._save_again()
        self.bar = tqdm(
            initial=self.step, total=self.num_steps, desc=self.folder.name, unit="step", disable=not self.is_main
        )
        self.meter.start()  # images that are encoded, a model that is built, are no steps
        while self.step < self.num_steps:
            yield self.step
            self.step += 1
            self.bar.update()
            self._stop_reason = self.interruption.reason(self.step, self.num_steps)
            if self._stop_reason and not self._is_skipping:  # else a good step or a rollback must come first
                break
            start = time.perf_counter()
            if not self._stop_reason:
                self.inspect(*self.due(self.step, self.num_steps))
            log = self.config.log
            by_step = any(is_due(self.step, every) for every in (log.checkpoint_every, log.keep_every))
            if (by_step or self.interruption.save_due) and self.step < self.num_steps:
                self.save()
            self.writing.check()
            self.meter.paused += time.perf_counter() - start
            if any(guard.must_roll_back(has_checkpoint=self._saved is not None) for guard in self.guards.values()):
                self._roll_back()
        self.bar.close()
        self._save_at_once(last=True)
        if self.is_main:
            draw_curve(self.folder)
        if self._stop_reason:
            raise Stopped(self._stop_reason)

    def synchronize(self, numbers: Float[Tensor, " n"]) -> list[float]:
        """Transfer the gradients' norms from the device. This is the only synchronisation of a step; in it, processes
        also agree on whether to stop and whether to save."""
        seconds, minutes = time.monotonic() - self._saved_at, self.config.log.checkpoint_minutes
        return self.interruption.synchronize(numbers, save_due=seconds > 60 * minutes > 0)

    def log_means(self, **values: float) -> None:
        """Log the means since the last call and these values, unless all steps were skipped."""
        if means := self.meter.summary():
            self.log.write(self.step + 1, **means, **values)
            self.bar.set_postfix(loss=f"{means['loss']:.4f}", img_s=f"{means['images_per_second']:.0f}")
            self.meter.reset()

    def skip(self, guard: Guard, source_indices: list[int]) -> None:
        """Log a skipped step and its images."""
        self.meter.skip()
        images = {"source_indices": source_indices, "rollbacks": self.rollbacks}  # which decide on the data's order
        self.log.write(self.step + 1, skipped=guard.skipped, **images)

    def inspect(self, *inspections: Inspection) -> None:
        """Run inspections, log their values, save if one is the best; interrupted ones are repeated on resuming."""
        self._inspected = not inspections
        if not inspections:
            return
        may_save, progress, measured = self._may_save(), self._progress(), {}
        can_save = self.is_main and not self.is_sharded  # without the other processes, which may be anywhere
        with self.interruption.interruptible(can_save=can_save, save=lambda: may_save and self.save(progress=progress)):
            for inspect in inspections:
                try:
                    measured |= inspect(self.step)
                except (AutoencoderError, ExtractorError) as error:  # of what is not finite, on all processes alike
                    self.accelerator.print(f"step {self.step}: nothing to {inspect.__name__}: {error}")
        self._inspected = True
        if measured:
            self.log.write(self.step, **measured)
        value = measured.get(self.best.metric or "")
        if value is not None and may_save and self.best.improves(value, self.step):
            self.save()
            if self.is_main:
                self.writing.start(partial(mark_best, self.checkpoints, self.step))

    def log_grid(self, images: Any, **layout: Any) -> None:
        """Save a grid as samples/<step>.png and send it to the trackers. Errors become warnings."""
        path = self.folder / "samples" / f"{self.step:08d}.png"
        with errors_as_warnings(path):
            save_grid(images, path, **layout)
            self.log.image(self.step, path)

    def save(self, *, last: bool = False, progress: Mapping[str, Any] | None = None) -> None:
        """Save a checkpoint of this step, unless there is one or the guards forbid it. The files are written in the
        background while training continues. With `progress`, which was collected from all processes before, the main
        process saves alone and waits for the files."""
        if self._saved == self.step or (progress is None and not self._may_save(last=last)):
            return
        self.writing.wait()  # as the buffers of the copy still hold the previous checkpoint
        metadata, state = {**self.metadata, "step": json.dumps(self.step)}, progress or self._progress()
        write = copy_checkpoint(self.checkpoints, self.step, self.training, metadata, state, keep=self.is_main)
        self._saved, self._saved_at = self.step, time.monotonic()
        if self.is_main:
            self.writing.start(partial(self._write, write, rotates=not self._is_skipping))
        if progress is not None:
            self.writing.wait()

    def _save_at_once(self, *, last: bool = False) -> None:
        self.save(last=last)
        self.writing.wait()
        self.accelerator.wait_for_everyone()

    def _write(self, write: Callable[[], None], *, rotates: bool) -> None:
        write()
        if rotates:
            rotate(self.checkpoints, keep=self.config.log.keep_checkpoints, keep_every=self.config.log.keep_every)
        if time.monotonic() - self._plotted_at > SECONDS_BETWEEN_CURVES:
            draw_curve(self.folder)
            self._plotted_at = time.monotonic()

    def _save_again(self) -> None:
        self._saved = None
        self._save_at_once()

    @property
    def _is_skipping(self) -> bool:
        return any(guard.in_a_row for guard in self.guards.values())

    def _may_save(self, *, last: bool = False) -> bool:
        networks = self.training.networks
        return all(guard.may_save(self.accelerator, networks[name], last=last) for name, guard in self.guards.items())

    def _progress(self) -> dict[str, Any]:
        return {"inspected": self._inspected and not self._stop_reason, **self.training.progress()}

    def _roll_back(self) -> None:
        self.writing.wait()
        self._restore(from_main(self.accelerator, lambda: checkpoint_to_resume(self.folder)))
        self.log.roll_back(self.step, self.rollbacks)
        self._save_again()  # so that a run that is killed remembers the rollback
        self.bar.reset(total=self.num_steps)
        self.bar.update(self.step)

    def _restore(self, checkpoint: Path) -> None:
        progress = resume(checkpoint, self.training)
        self.step = self._saved = progress["step"]
        self._inspected = progress["inspected"]

        def tidy() -> bool:
            discard_later_results(self.folder, self.step)
            return mark_best(self.checkpoints, self.best.step)

        if not from_main(self.accelerator, tidy):  # the best checkpoint no longer exists
            self.best.value = self.best.step = None
