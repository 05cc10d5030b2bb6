"""Stop a run early in a state from which it can be resumed, on a signal or after a time limit."""

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
from machine.atomic_files import write_atomic
from machine.children import EXIT_CODE, STOPPED, handling_signals
from machine.lock import Lock
from machine.stopping import BEFORE, SIGNALS
from training.log import end_training

TIME_LIMIT = 1  # code of a reason to stop; 0 stands for none, and 1 + n for signal n, which takes precedence


class Stopped(BaseException):
    """The run is stopped early; the message is the reason. Not an Exception, so that no error handler catches it."""


class Interruption:
    """Context that locks a run's folder and stops the run on a signal or after `max_hours`, with exit status 75 and the
    file `stopped`.

    All processes stop after the same step. Before the first step and in `interruptible`, a signal stops a process
    immediately. A second Ctrl-C kills the run.
    """

    def __init__(self, run: Path, accelerator: Accelerator, max_hours: float | None) -> None:
        self.run, self.accelerator, self.max_hours = run, accelerator, max_hours
        self.deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours
        self.received: int | None = None
        self.agreed = 0  # code of the reason to stop, the same on all processes
        self.save_due = False  # whether to save a checkpoint, the same on all processes
        self.stops_immediately, self.left_alone, self.progress = True, False, BEFORE

    def __enter__(self) -> "Interruption":
        from_main(self.accelerator, self._open)
        self.handling = handling_signals(self._receive, SIGNALS, stays_ignored=[signal.SIGHUP])
        self.handling.__enter__()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        is_main = self.accelerator.is_main_process
        main_has_left = isinstance(error, Exception) and bool(self.received) and not is_main
        if stops := isinstance(error, Stopped) or main_has_left:
            message = f"{error}: stopped {self.progress}"
            if is_main:
                write_atomic(self.run / STOPPED, f"{message}\n")
            if not self.left_alone:
                end_training(self.accelerator)
            with suppress(OSError):  # if the terminal is closed
                self.accelerator.print(message)
        self.handling.__exit__(None, None, None)
        if is_main:
            if isinstance(error, Exception):  # possibly before the first step
                self.lock.remove_if_unused()
            self.lock.__exit__()
        if stops:
            raise SystemExit(EXIT_CODE) from None

    def begin(self) -> None:
        """Start the loop: from here on several processes stop together, or one would break the others' step."""
        self.stops_immediately = self.accelerator.num_processes == 1

    def synchronize(self, numbers: Float[Tensor, " n"], *, save_due: bool = False) -> list[float]:
        """Transfer numbers from the device and, in the same synchronisation, let all processes agree on whether to
        stop, if any of them must, and whether to save, if it is due on the main one."""
        if self.accelerator.num_processes == 1:
            self.save_due = save_due
            return numbers.tolist()
        code = torch.full_like(numbers[:1], 2 * self._code() + (save_due and self.accelerator.is_main_process))
        torch.distributed.all_reduce(code, torch.distributed.ReduceOp.MAX)
        *values, agreed = torch.cat([numbers, code]).tolist()
        self.agreed, self.save_due = divmod(int(agreed), 2)  # a stop saves anyway
        return values

    def reason(self, step: int, num_steps: int) -> str | None:
        """The reason to stop, the same on all processes, or None. Call it after `synchronize`."""
        self.stops_immediately = False
        self.progress = f"after {step} of {num_steps} steps; continue with --resume {self.run}"
        code = self._code() if self.accelerator.num_processes == 1 else self.agreed
        if code == TIME_LIMIT:
            return f"--train.max_hours {self.max_hours} is over"
        return signal.Signals(code - 1).name if code else None

    @contextmanager
    def interruptible(self, *, can_save: bool, save: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Context for long, repeatable work: if a process `can_save`, a signal interrupts it and calls `save`."""
        self.stops_immediately = can_save
        try:
            if self.received and can_save:
                self._stop(self.received)
            yield
        except Stopped:
            save()
            raise
        finally:
            self.stops_immediately = False

    def _code(self) -> int:
        is_over = self.deadline is not None and time.monotonic() > self.deadline
        return 1 + self.received if self.received else TIME_LIMIT * is_over

    def _open(self) -> None:
        self.lock = Lock(self.run / "training.lock")
        (self.run / STOPPED).unlink(missing_ok=True)

    def _receive(self, number: signal.Signals) -> None:
        self.received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.stops_immediately:
            self._stop(number)

    def _stop(self, number: int) -> NoReturn:
        self.stops_immediately, self.left_alone = False, self.accelerator.num_processes > 1
        raise Stopped(signal.Signals(number).name)
