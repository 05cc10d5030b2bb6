"""Which learning rate to train with: a short training at rates that rise until its loss diverges (Smith 2017, section
3.3)."""

import math
from collections.abc import Sequence
from pathlib import Path

from machine.whole_files import whole

SMOOTHING = 0.9  # of a loss, by those before it
MARGIN = 10  # from the rate of the least loss down to one that a whole training bears


def rising_rates(lowest: float, highest: float, num_steps: int) -> list[float]:
    """Each the same multiple of the one before."""
    return [lowest * (highest / lowest) ** (step / (num_steps - 1)) for step in range(num_steps)]


def smoothed(losses: Sequence[float]) -> list[float]:
    """Running averages, each over the losses so far: Adam's, with the beginning corrected."""
    averages, average = [], 0.0
    for number, loss in enumerate(losses, start=1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        averages.append(average / (1 - SMOOTHING**number))
    return averages


def has_diverged(losses: Sequence[float]) -> bool:
    """Whether the last loss is not finite, or has risen from the least by as much as there was at first."""
    averages = smoothed(losses)
    return not averages[-1] <= min(averages) + abs(averages[0])


def suggest_rate(rates: Sequence[float], losses: Sequence[float]) -> float:
    """A tenth of the rate at which the smoothed loss is least; a ValueError where the rates do not show it."""
    if not has_diverged(losses):
        raise ValueError(f"--rates.highest {rates[-1]:g}: the loss does not diverge up to there; raise it")
    best = _least(losses)
    if best == 0:
        raise ValueError(f"--rates.lowest {rates[0]:g}: the loss only rises from there; lower it")
    return rates[best] / MARGIN


def draw_rates(path: Path, rates: Sequence[float], losses: Sequence[float]) -> None:
    """Loss against rate, smoothed in front, and a line at the suggestion."""
    from matplotlib.figure import Figure

    averages, tried, lr = smoothed(losses), rates[: len(losses)], rates[_least(losses)] / MARGIN
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="learning rate", ylabel="loss")
    axes.plot(tried, losses, linewidth=1, alpha=0.4, label="loss")
    axes.plot(tried, averages, linewidth=1.5, label="smoothed")
    axes.axvline(lr, color="black", linestyle="--", linewidth=1, label=f"{lr:.1e}: a tenth of the least loss's rate")
    axes.set_ylim(top=max(averages[0], min(averages) + abs(averages[0])) * 1.1)
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    with whole(path) as partial:
        figure.savefig(partial, dpi=150, format="png")


def _least(losses: Sequence[float]) -> int:
    """Where the smoothed loss is least."""
    averages = [loss if math.isfinite(loss) else math.inf for loss in smoothed(losses)]
    return averages.index(min(averages))
