"""Stopping before the end, so that a run can be gone on with, when a scheduler or a person asks for it."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from machine.accelerator import from_main
from machine.children import EXIT_CODE, STOPPED, on_stop
from machine.lock import Lock
from machine.stopping import BEFORE, SIGNALS
from machine.whole_files import write_whole

OVER = 1  # of what stops a run: its time; a signal, which counts more, is 1 + its number, and 0 nothing


class Stopped(BaseException):
    """Why a run ends before its end; not an error that anything on the way might take for its own."""


class Interruption:
    """Within, a run's folder is this run's alone, and signals or a time that is over stop it: status 75, and `stopped`.
    Before the first step and in `at_once` a signal is heeded on the spot; else all processes stop after the same step.
    A second Ctrl-C ends the run as it is."""

    def __init__(self, run: Path, accelerator: Accelerator, max_hours: float | None) -> None:
        self.run, self.accelerator, self.max_hours = run, accelerator, max_hours
        self.deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours
        self.received: int | None = None
        self.agreed = 0  # what stops all processes
        self.saves = False  # whether it is time for a checkpoint, on all
        self.leaves, self.alone, self.where = True, False, BEFORE

    def __enter__(self) -> "Interruption":
        from_main(self.accelerator, self._open)
        self.handling = on_stop(self._receive, SIGNALS, stays_ignored=[signal.SIGHUP])
        self.handling.__enter__()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        main = self.accelerator.is_main_process
        left_behind = isinstance(error, Exception) and bool(self.received) and not main
        if stops := isinstance(error, Stopped) or left_behind:
            words = f"{error}: stopped {self.where}"
            if main:
                write_whole(self.run / STOPPED, f"{words}\n")
            if not self.alone:
                self.accelerator.end_training()
            with suppress(OSError):  # a terminal that is gone
                self.accelerator.print(words)
        self.handling.__exit__(None, None, None)
        if main:
            if isinstance(error, Exception):  # which may have refused the very first step
                self.lock.leave_no_trace()
            self.lock.__exit__()
        if stops:
            raise SystemExit(EXIT_CODE) from None

    def begin(self) -> None:
        """Several processes stop together from here on: one that left alone would take the others' step with it."""
        self.leaves = self.accelerator.num_processes == 1

    def read(self, number: Float[Tensor, ""], *, saves: bool = False) -> float:
        """A number of each step, off the device, and in the same wait what stops any process, and whether the main one
        `saves`, on which all agree."""
        if self.accelerator.num_processes == 1:
            self.saves = saves
            return number.item()
        code = torch.full_like(number, 2 * self._code() + (saves and self.accelerator.is_main_process))
        torch.distributed.all_reduce(code, torch.distributed.ReduceOp.MAX)
        value, agreed = torch.stack([number, code]).tolist()
        self.agreed, self.saves = divmod(int(agreed), 2)  # who stops saves anyhow
        return value

    def reason(self, step: int, num_steps: int) -> str | None:
        """Why to stop now, the same on every process; None to go on. Call it after each step, and `read` in it."""
        self.leaves = False
        self.where = f"after {step} of {num_steps} steps; go on with --resume {self.run}"
        code = self._code() if self.accelerator.num_processes == 1 else self.agreed
        if code == OVER:
            return f"--train.max_hours {self.max_hours} are over"
        return signal.Signals(code - 1).name if code else None

    @contextmanager
    def at_once(self, *, can_save: bool, save: Callable[[], object] = lambda: None) -> Iterator[None]:
        """For what takes long and can be done again: a signal breaks it off and saves, if this process can."""
        self.leaves = can_save
        try:
            if self.received and can_save:
                self._leave(self.received)
            yield
        except Stopped:
            save()
            raise
        finally:
            self.leaves = False

    def _code(self) -> int:
        over = self.deadline is not None and time.monotonic() > self.deadline
        return 1 + self.received if self.received else OVER * over

    def _open(self) -> None:
        self.lock = Lock(self.run / "training.lock")
        (self.run / STOPPED).unlink(missing_ok=True)

    def _receive(self, number: signal.Signals) -> None:
        self.received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.leaves:
            self._leave(number)

    def _leave(self, number: int) -> NoReturn:
        self.leaves, self.alone = False, self.accelerator.num_processes > 1
        raise Stopped(signal.Signals(number).name)
