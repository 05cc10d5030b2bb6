"""What a run leaves to look at: `log.jsonl`, and Accelerate's trackers."""

import json
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import WandBTracker

from experiment.settings import flatten
from machine.whole_files import write_whole

PROJECT = "latent-diffusion-backbones"  # of W&B; a run there has the name of the run here
TRACKER_OPTIONS = {"tensorboard": {"dataformats": "NHWC"}}


def is_due(step: int, every: int) -> bool:
    """What is wanted every so many steps, and never with 0."""
    return every > 0 and step % every == 0


class Log:
    """One line of JSON an event, mirrored to TensorBoard or W&B; written by the main process alone.

    Raises:
        ValueError: where a tracker cannot be started.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, config: dict) -> None:
        self.path, self.accelerator = folder / "log.jsonl", accelerator
        wandb = WandBTracker(PROJECT, name=folder.name)
        accelerator.log_with = [wandb if str(tracker) == "wandb" else tracker for tracker in accelerator.log_with]
        plain = (int, float, str, bool)
        settings = {flag: value if isinstance(value, plain) else str(value) for flag, value in flatten(config).items()}
        try:
            accelerator.init_trackers("tracking", config=settings)
        except Exception as error:  # each service has its own kinds
            remedy = "wandb login, set WANDB_MODE=offline, or leave it out"
            raise ValueError(f"--log.trackers {config['log']['trackers']}: {error}; {remedy}") from error

    def write(self, step: int, **values: int | float | list[int]) -> None:
        """Add an event at an optimizer step; lists are for the file alone."""
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        self.accelerator.log({name: value for name, value in values.items() if not isinstance(value, list)}, step=step)

    def picture(self, step: int, path: Path) -> None:
        """Show a grid in the trackers that can."""
        import numpy as np
        from PIL import Image

        with Image.open(path, formats=("PNG",)) as image:
            pixels = np.asarray(image.convert("RGB"))[None]
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                tracker.log_images({"samples": pixels}, step=step, **TRACKER_OPTIONS.get(tracker.name, {}))

    def truncate(self, step: int) -> None:
        """Drop events after `step`: a resumed run writes them again. A broken line is named, and left out."""
        if not self.accelerator.is_main_process:
            return
        written, kept = self.path.read_text(errors="replace").splitlines() if self.path.exists() else [], []
        for number, line in enumerate(written, start=1):
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                print(f"warning: {self.path}: line {number} is broken and left out: {line[:60]}", flush=True)
        write_whole(self.path, "".join(f"{line}\n" for line in kept))
