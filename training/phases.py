"""The parts of a training: which one a step belongs to is a function of the step alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Phase:
    """Where a step lies: in the phase `number`, from 0, at its step `step` of `num_steps`; `end` is the first step of
    the whole training that lies behind it."""

    number: int
    step: int
    num_steps: int
    end: int

    @property
    def progress(self) -> float:
        """0 at its first step, 1 at its last."""
        return self.step / max(1, self.num_steps - 1)


def phase_at(lengths: Sequence[int | float], step: int, num_steps: int) -> Phase:
    """Of a training of `num_steps` steps in phases of these relative lengths."""
    ends = [round(num_steps * done / sum(lengths)) for done in accumulate(lengths)]
    number = next(number for number, end in enumerate(ends) if step < end)
    start = ends[number - 1] if number else 0
    return Phase(number, step - start, ends[number] - start, ends[number])
