"""A training from its empty folder, or its newest checkpoint, to its last step, whatever is trained."""

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
from checkpoints.checkpoint import WEIGHTS, check_identity, metadata_of
from checkpoints.training_state import TrainingState, copy_checkpoint, resume
from experiment.run_config import R, resuming
from machine.accelerator import from_main, open_accelerator
from machine.background import Background
from machine.checkpoint_folder import Best, mark_best, rotate, to_resume
from machine.sharding import is_sharded
from machine.whole_files import write_whole
from sampling.image_files import save_grid
from training.guard import Guard
from training.interruption import Interruption, Stopped
from training.log import Log, draw_curve, is_due, warns_only
from training.meter import Meter
from training.resumption import other_measure, start_or_go_on, take_back

SECONDS_BETWEEN_CURVES = 10.0  # drawing takes as long as many a short training's saves
Look = Callable[[int], Mapping[str, float]]  # at what there is after a step: what it measured


@contextmanager
def open_run(config: R, **options: Any) -> Iterator["Run[R]"]:
    """A training's devices, its folder for as long as it lasts, and the checkpoint that it goes on from."""
    available = [str(tracker) for tracker in get_available_trackers()]
    for tracker in config.log.trackers:
        if tracker not in available:
            raise ValueError(f"--log.trackers {tracker}: not installed; there are {', '.join(available)}")
    options |= {"log_with": config.log.trackers or None, "project_dir": config.folder}
    accelerator = open_accelerator(config.train.precision, flag="--train.precision", **options)
    config = from_main(accelerator, lambda: config)
    with Interruption(config.folder, accelerator, config.train.max_hours) as interruption:
        config, checkpoint = from_main(accelerator, lambda: start_or_go_on(config, accelerator.print))
        set_seed(config.train.seed)
        run = Run(resuming(config, None), checkpoint, interruption)
        with run.writing:
            yield run


class Run(Generic[R]):
    """A training's folder, devices, log and checkpoints, the number of its steps, and what watches over them. `begin`
    takes in what is trained; between two `steps` it looks, saves, goes back, or stops. All processes call alike."""

    def __init__(self, config: R, checkpoint: Path | None, interruption: Interruption) -> None:
        self.config, self.checkpoint, self.interruption = config, checkpoint, interruption
        self.folder, self.accelerator = interruption.run, interruption.accelerator
        self.is_main, self.checkpoints = self.accelerator.is_main_process, self.folder / "checkpoints"
        self.meter, self.best, self.writing = Meter(self.accelerator), Best(), Background()
        self.step = 0  # optimizer steps that were taken
        self.identity: dict[str, Mapping[str, Any]] = {}
        self._saved: int | None = None  # the step of the newest checkpoint, which may still be being written
        self._saved_at = time.monotonic()  # that one, or else when the run was opened
        self._inspected = True  # else what is due at this step was broken off, and a resumed run begins with it
        self._why: str | None = None  # to stop before the end
        self._drawn = time.monotonic()  # the curve, or else when the run began

    def check_identity(self, **parts: Mapping[str, Any]) -> None:
        """That latents and splits are those of the run so far; see `checkpoints.checkpoint.check_identity`."""
        self.identity = parts
        if self.checkpoint is not None:
            check_identity(self.checkpoint / WEIGHTS, parts, any_decoder=True)

    def begin(
        self,
        training: TrainingState,
        guards: Mapping[str, Guard],
        due: Callable[[int, int], Sequence[Look]],
        num_steps: int,
        *,
        best: str | None = None,
        lower_is_best: bool = True,
        keep_every: int = 0,
        **metadata: Any,
    ) -> None:
        """Start with all that is trained as it is, or go on as the checkpoint says, and open the log.

        `guards` go by the network that each watches; `due` says what to look at after a step, before it is saved; the
        best checkpoint by `best` stays, as does every one whose step `keep_every` divides; checkpoints say `metadata`
        of themselves.
        """
        self.training, self.guards, self.due, self.num_steps = training, guards, due, num_steps
        self.watched, self.lower_is_best, self.keep_every = best, lower_is_best, keep_every
        self.metadata = metadata_of(self.config, self.step, self.identity, **metadata)  # of the code that was loaded
        named_guards = {f"guard.{name}": guard for name, guard in guards.items()}
        training.others.update({"meter": self.meter, "best": self.best, **named_guards})
        self.is_sharded = any(is_sharded(network) for network in training.networks.values())
        if (checkpoint := self.checkpoint) is not None:
            self._restore(checkpoint)
            others = from_main(self.accelerator, lambda: other_measure(checkpoint, self.config, self.identity))
            if others and self.best.value is not None:
                self.best.value = None
                words = f"{self.checkpoints}/best is kept until there is another: values so far do not compare"
                self.accelerator.print(f"{words}, they are of other {', '.join(others)}")
        if self.is_main:
            write_whole(self.folder / "config.yaml", yaml.safe_dump(self.config.to_dict(), sort_keys=False))
        self.accelerator.wait_for_everyone()
        self.interruption.begin()
        self._saved_at = time.monotonic()
        self.log = Log(self.folder, self.accelerator, self.config.to_dict(), self.step)

    @property
    def rollbacks(self) -> int:
        """How often training went back to a checkpoint: each time with another order of the data."""
        return sum(guard.rollbacks for guard in self.guards.values())

    def steps(self) -> Iterator[int]:
        """The number of each optimizer step to take, from 0; after a rollback some again. Raises Stopped, when all is
        saved, or TrainingDivergedError."""
        if not self._inspected and (due := self.due(self.step, self.num_steps)):
            self.look(*due)
            self._save_again()
        self.bar = tqdm(
            initial=self.step, total=self.num_steps, desc=self.folder.name, unit="step", disable=not self.is_main
        )
        self.meter.start()  # images that are encoded, a model that is built, are no steps
        while self.step < self.num_steps:
            yield self.step
            self.step += 1
            self.bar.update()
            self._why = self.interruption.reason(self.step, self.num_steps)
            if self._why and not self._is_skipping:  # else it must be known first what becomes of it
                break
            began = time.perf_counter()
            if not self._why:
                self.look(*self.due(self.step, self.num_steps))
            by_step = any(is_due(self.step, every) for every in (self.config.log.checkpoint_every, self.keep_every))
            if (by_step or self.interruption.saves) and self.step < self.num_steps:
                self.save()
            self.writing.check()
            self.meter.paused += time.perf_counter() - began
            if any(guard.must_roll_back(can=self._saved is not None) for guard in self.guards.values()):
                self._roll_back()
        self.bar.close()
        self._save_at_once(last=True)
        if self.is_main:
            draw_curve(self.folder)
        if self._why:
            raise Stopped(self._why)

    def read(self, number: Float[Tensor, ""]) -> float:
        """The number that decides on a step, off the device: the step's one wait; several processes agree in it on
        whether to stop, and whether it is time to save."""
        seconds, minutes = time.monotonic() - self._saved_at, self.config.log.checkpoint_minutes
        return self.interruption.read(number, saves=seconds > 60 * minutes > 0)

    def write_means(self, **values: float) -> None:
        """To the log: means since the last time, and these values; nothing where all steps were skipped."""
        if means := self.meter.summary():
            self.log.write(self.step + 1, **means, **values)
            self.bar.set_postfix(loss=f"{means['loss']:.4f}", img_s=f"{means['images_per_second']:.0f}")
            self.meter.reset()

    def skip(self, guard: Guard, source_indices: list[int]) -> None:
        self.meter.skip()
        self.log.write(self.step + 1, skipped=guard.skipped, source_indices=source_indices)

    def look(self, *looks: Look) -> None:
        """Write what they measure to the log, and save the best. A signal breaks them off: a resumed run begins with
        them."""
        self._inspected = not looks
        if not looks:
            return
        is_sound, progress, measured = self._is_sound(), self._progress(), {}
        can_save = self.is_main and not self.is_sharded  # without the others, who may be anywhere
        with self.interruption.at_once(can_save=can_save, save=lambda: is_sound and self.save(progress=progress)):
            for look in looks:
                try:
                    measured |= look(self.step)
                except AutoencoderError as error:  # images that are not finite, on all processes
                    self.accelerator.print(f"step {self.step}: nothing to {look.__name__}: {error}")
        self._inspected = True
        if measured:
            self.log.write(self.step, **measured)
        value = measured.get(self.watched or "")
        if value is not None and is_sound and self.best.improves(value, self.step, lower=self.lower_is_best):
            self.save()
            if self.is_main:
                self.writing.start(partial(mark_best, self.checkpoints, self.step))

    def show(self, images: Any, **layout: Any) -> None:
        """A grid, as samples/<step>.png and in the trackers. What goes wrong there is said, and training goes on."""
        path = self.folder / "samples" / f"{self.step:08d}.png"
        with warns_only(path):
            save_grid(images, path, **layout)
            self.log.picture(self.step, path)

    def save(self, *, last: bool = False, progress: Mapping[str, Any] | None = None) -> None:
        """A checkpoint of this step, if worth it: by all processes, and written while training goes on; or by the main
        one with all's `progress`, at once."""
        if self._saved == self.step or (progress is None and not self._is_sound(last=last)):
            return
        self.writing.wait()  # until then the copy is of the one before
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
            rotate(self.checkpoints, keep=self.config.log.keep_checkpoints, keep_every=self.keep_every)
        if time.monotonic() - self._drawn > SECONDS_BETWEEN_CURVES:
            draw_curve(self.folder)
            self._drawn = time.monotonic()

    def _save_again(self) -> None:
        self._saved = None
        self._save_at_once()

    @property
    def _is_skipping(self) -> bool:
        return any(guard.in_a_row for guard in self.guards.values())

    def _is_sound(self, *, last: bool = False) -> bool:
        networks = self.training.networks
        return all(guard.may_save(self.accelerator, networks[name], last=last) for name, guard in self.guards.items())

    def _progress(self) -> dict[str, Any]:
        return {"inspected": self._inspected and not self._why, **self.training.progress()}

    def _roll_back(self) -> None:
        self.writing.wait()
        self._restore(from_main(self.accelerator, lambda: to_resume(self.folder)))
        self._save_again()  # a kill does not forget that it went back
        self.bar.reset(total=self.num_steps)
        self.bar.update(self.step)

    def _restore(self, checkpoint: Path) -> None:
        progress = resume(checkpoint, self.training)
        self.step = self._saved = progress["step"]
        self._inspected = progress["inspected"]

        def tidy() -> bool:
            take_back(self.folder, self.step)
            return mark_best(self.checkpoints, self.best.step)

        if not from_main(self.accelerator, tidy):  # the best one is gone
            self.best.value = self.best.step = None
