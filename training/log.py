"""The log of a run: `log.jsonl` and Accelerate's trackers."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import WandBTracker

from experiment.mappings import flatten
from machine.atomic_files import write_atomic


def is_due(step: int, every: int) -> bool:
    """Whether `step` is a multiple of `every`; never if that is 0."""
    return every > 0 and step % every == 0


def read_log(path: Path) -> list[dict[str, Any]]:
    """Events of a log, without broken lines, such as the last one of a training that was killed."""
    events = []
    for line in path.read_text(errors="replace").splitlines():
        with suppress(ValueError):
            events.append(json.loads(line))
    return [event for event in events if isinstance(event, dict) and "step" in event]


@contextmanager
def errors_as_warnings(what: object) -> Iterator[None]:
    """Context that turns an error into a warning, so that a plot that fails does not stop a training."""
    try:
        yield
    except Exception as error:  # fonts, texts and foreign files fail in many ways
        print(f"warning: {what} is left out: {error}", flush=True)


def end_training(accelerator: Accelerator) -> None:
    """End the trackers, whose errors become warnings, and the group of processes."""
    with errors_as_warnings("the end of a tracker"):
        accelerator.end_training()


class Log:
    """Writes events as lines of JSON and sends them to the trackers. A run that continues at a `step`, after that many
    `rollbacks`, removes later events."""

    def __init__(self, folder: Path, accelerator: Accelerator, config: dict, step: int = 0, rollbacks: int = 0) -> None:
        self.path, self.accelerator = folder / "log.jsonl", accelerator
        wandb = WandBTracker("latent-diffusion-backbones", name=folder.name)  # names of the project and of the run
        accelerator.log_with = [wandb if str(tracker) == "wandb" else tracker for tracker in accelerator.log_with]
        simple = (int, float, str, bool)
        settings = {flag: value if isinstance(value, simple) else str(value) for flag, value in flatten(config).items()}
        try:
            options = {"tensorboard": {"purge_step": step + 1}}
            accelerator.init_trackers("tracking", config=settings, init_kwargs=options)
        except Exception as error:  # each tracker raises its own errors
            remedy = "wandb login, set WANDB_MODE=offline, or leave it out"
            raise ValueError(f"--log.trackers {config['log']['trackers']}: {error}; {remedy}") from error
        self._truncate(step, rollbacks)

    def write(self, step: int, **values: int | float | list[int]) -> None:
        """Log values at an optimizer step. Lists are written to the file only."""
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        with errors_as_warnings(f"step {step} in a tracker"):  # whose own process may have died
            self.accelerator.log({name: each for name, each in values.items() if not isinstance(each, list)}, step=step)

    def image(self, step: int, path: Path) -> None:
        """Send a grid to the trackers that accept images."""
        import numpy as np
        from PIL import Image

        with Image.open(path, formats=("PNG",)) as image:
            pixels = np.asarray(image.convert("RGB"))[None]
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": pixels}, step=step, **layout)

    def roll_back(self, step: int, rollbacks: int) -> None:
        """Remove events after `step`, as these steps will be taken again, except for skipped ones and their images."""
        self._truncate(step, rollbacks)
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard" and self.accelerator.is_main_process:
                writer: Any = tracker.tracker  # opens another file with its next event, as after a resumption
                writer.close()
                writer.purge_step = step + 1

    def _truncate(self, step: int, rollbacks: int) -> None:
        """Remove events after `step`, except for steps skipped before one of the `rollbacks`, which come with other
        images next time; and broken lines, with a warning."""
        if not self.accelerator.is_main_process:
            return
        lines, kept = self.path.read_text(errors="replace").splitlines() if self.path.exists() else [], []
        for number, line in enumerate(lines, start=1):
            try:
                event = json.loads(line)
                if event["step"] <= step or event.get("rollbacks", rollbacks) < rollbacks:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                print(f"warning: {self.path}: line {number} is broken and left out: {line[:60]}", flush=True)
        write_atomic(self.path, "".join(f"{line}\n" for line in kept))
