"""Settings shared by the training of backbones and autoencoders: length, logging and the run's folder."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from experiment.mappings import flatten
from machine.atomic_files import join_inside
from settings import SEEDS, within


@dataclass(frozen=True)
class BaseTrainConfig:
    """Length, batch size and precision of training.

    Args:
        num_steps: optimizer steps
        max_hours: save and stop after this time with exit status 75, as after SIGTERM, SIGUSR1 or Ctrl-C
        batch_size: images per optimizer step, over all processes and micro-batches
        ema_decay: decay of the EMA weights; (1 + step) / (10 + step) as long as that is smaller
        precision: 'fp32', 'bf16' (autocast), or 'auto': bf16 if the device has instructions for it, else fp32
        seed: seed of the initial weights and of all randomness in training
    """

    num_steps: int | None = within("[1, inf)", None)
    max_hours: float | None = within("(0, inf)", None)
    batch_size: int = within("[1, inf)", 128)
    ema_decay: float = within("[0, 1)", 0.9999)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = within(SEEDS, 0)


@dataclass(frozen=True)
class BaseLogConfig:
    """What is logged and saved during training, and how often (in optimizer steps unless stated otherwise; 0: never).

    Args:
        every: losses and speed, to log.jsonl and the trackers
        sample_every: a grid of samples
        num_validation: maximum number of held-out images used for validation
        checkpoint_minutes: minutes between checkpoints; the last step always writes one
        checkpoint_every: also write a checkpoint every so many steps
        keep_checkpoints: number of newest intact checkpoints to keep; saving verifies them
        keep_every: every so many steps, write a checkpoint that is never deleted
        trackers: 'tensorboard', 'wandb' (offline with WANDB_MODE=offline)
    """

    every: int = within("[0, inf)", 20)
    sample_every: int = within("[0, inf)", 2000)
    num_validation: int = within("[1, inf)", 1024)
    checkpoint_minutes: float = within("[0, inf)", 15.0)
    checkpoint_every: int = within("[0, inf)", 0)
    keep_checkpoints: int = within("[1, inf)", 2)
    keep_every: int = within("[0, inf)", 0)
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])


class RunConfig:
    """Base of a training configuration, a frozen dataclass; the run can be resumed from its folder."""

    name: str | None
    resume: str | None
    init_from: str | None
    if TYPE_CHECKING:  # which each subclass declares
        optim: Any
        train: Any
        log: Any
    fixed = tuple[str, ...]()  # settings, or groups of them, that must not change on resume

    @property
    def unread(self) -> set[str]:
        """Settings whose files this run does not read."""
        return {"init_from"} if self.resume else set()

    @property
    def folder(self) -> Path:
        """The run's folder, below `runs`."""
        return Path(self.resume) if self.resume else join_inside(Path("runs"), str(self.name), "--name")

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)  # pyright: ignore[reportArgumentType]
        values["optim"]["betas"] = list(values["optim"]["betas"])
        return values

    def identity(self) -> dict[str, Any]:
        """The settings, by flag, that a resumed run must keep. Paths may change: their content is checked elsewhere."""
        flags = flatten(self.to_dict())
        may_change = {"data.path", "data.cache", "data.on_error"}
        names = [flag for flag in flags if {flag, flag.partition(".")[0]} & {*self.fixed} and flag not in may_change]
        fixed = {flag: flags[flag] for flag in names}
        return fixed | {"optim.muon_lr": "null" if flags["optim.muon_lr"] is None else "set"}


R = TypeVar("R", bound=RunConfig)


def with_resume(config: R, run: Path | None) -> R:
    """The configuration with `resume` set to this run, or unset."""
    return replace(config, resume=run and str(run))  # pyright: ignore[reportArgumentType, reportReturnType]
