"""Stopping between two steps when a scheduler or a person asks for it, on all processes at the same one."""

from __future__ import annotations

import signal
import time
from types import FrameType

import torch
from accelerate import Accelerator

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: stopped before the end, saved; run it again with --resume auto
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]


class Interruption:
    """Turns SIGTERM, SIGUSR1 and Ctrl-C, or a time that is over, into a reason to stop after the current step.

    A second Ctrl-C stops at once, as without it.
    """

    def __init__(self, accelerator: Accelerator, max_hours: float | None) -> None:
        self.accelerator = accelerator
        self.deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours
        self.max_hours = max_hours
        self.received: int | None = None
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def reason(self) -> str | None:
        """Why to stop now, the same on every process; None to go on. Call it once a step."""
        over = self.deadline is not None and time.monotonic() > self.deadline
        code = self.received or (-1 if over else 0)
        if self.accelerator.num_processes > 1:  # a signal may reach one process alone, and clocks differ
            codes = self.accelerator.gather(torch.tensor([code], device=self.accelerator.device))
            code = int(codes[codes.abs().argmax()])  # pyright: ignore
        if code == 0:
            return None
        if code < 0:
            return f"--train.max_hours {self.max_hours} are over"
        return signal.Signals(code).name
