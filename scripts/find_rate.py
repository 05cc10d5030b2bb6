"""Find a learning rate by a short training in which it rises until the loss diverges (Smith 2017, section 3.3).

python scripts/find_rate.py --config configs/caltech101/xswin_fast.yaml
python scripts/find_rate.py --model DiT-S/2 --optim.muon_lr 1e-3 --rates.highest 10       (Muon's rises with it)

It prints a command line for train.py with a tenth of the rate at which the smoothed loss was lowest, and plots the
losses.
"""

import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiment.cli import run_main
from experiment.config import ExperimentConfig
from settings import within

SMOOTHING = 0.9  # decay of the running average of losses
MARGIN = 10  # the rate of the lowest loss is divided by this, to be stable in a full training


@dataclass(frozen=True)
class RatesConfig:
    """The rates to try.

    Args:
        lowest: first rate
        highest: last rate, unless the loss diverges before
        num_steps: number of rates, each used for one optimizer step
    """

    lowest: float = within("(0, inf)", 1e-6)
    highest: float = within("(0, inf)", 1.0)
    num_steps: int = within("[2, inf)", 200)

    def check(self, prefix: str) -> None:
        if not self.lowest < self.highest:
            raise ValueError(f"{prefix}lowest {self.lowest} must lie below {prefix}highest {self.highest}")


@dataclass(frozen=True)
class FindRateConfig(ExperimentConfig):
    """Find a learning rate for a training. All settings of train.py apply, except for its length and schedule.

    Args:
        rates: the rates to try
    """

    rates: RatesConfig = field(default_factory=RatesConfig)


def main(config: FindRateConfig, arguments: Sequence[str] = ()) -> None:
    """Try the rates, plot the losses, and print the command line for a training with the rate found."""
    from training.assembly import open_training

    if config.resume:
        raise ValueError(f"--resume {config.resume}: rates are found for a training's beginning; use --init_from")
    name, train = f"{config.folder.relative_to('runs')}-rates", replace(config.train, compile=False)
    config = replace(config, name=name, train=train)
    rates = rising_rates(config.rates.lowest, config.rates.highest, config.rates.num_steps)
    with open_training(config) as run:
        losses = losses_at(rates, run)
        if run.is_main:
            draw_rates(run.folder / "rates.png", rates, losses)
        lr = suggest_rate(rates, losses)
        run.accelerator.print(f"{lr:.1e} ({run.folder}/rates.png): {command_line(config, arguments, lr)}")


def losses_at(rates: Sequence[float], run: Any) -> list[float]:
    """Train with a step at each rate, until the loss diverges, and return the losses."""
    import torch
    from tqdm import tqdm

    from machine.randomness import seed_for
    from training.assembly import build_backbone, build_batches, build_objective, open_task, prepare
    from training.guard import clip_gradients
    from training.objective import phase_at

    config, accelerator, task = run.config, run.accelerator, open_task(run)
    model = build_backbone(run, task)
    objective, features = build_objective(run, task, model)
    batches = build_batches(run, task, objective, features)
    model, optimizers = prepare(run, model, objective)
    phase, losses = phase_at(objective.phases, 0, len(rates)), []
    for step, lr in enumerate(tqdm(rates, desc=run.folder.name, unit="step", disable=not run.is_main)):
        torch.manual_seed(seed_for(config.train.seed, "layers", step, accelerator.process_index))
        optimizers.scale_learning_rates(lr / config.optim.lr)
        step_losses = []
        for batch in batches.micro_batches(step):
            with accelerator.accumulate(model):
                with accelerator.autocast():
                    loss = objective(model, batch, phase)["loss"].mean()
                accelerator.backward(loss)
            step_losses.append(loss.detach())
        clip_gradients(accelerator, model, config.optim.grad_clip, objective.heads)
        mean: Any = accelerator.reduce(torch.stack(step_losses).mean(), "mean")
        losses += run.synchronize(mean[None])
        if has_diverged(losses):
            break
        optimizers.step()
        optimizers.zero_grad()
    return losses


def command_line(config: FindRateConfig, arguments: Sequence[str], lr: float) -> str:
    """Compose a command line for train.py from this program's arguments, with `lr` and without `--rates`."""
    kept, is_own = ["python", "train.py"], False
    for argument in arguments:
        if argument.startswith("--"):
            is_own = argument.startswith(("--rates", "--optim.lr", "--optim.muon_lr"))
        if not is_own:
            kept.append(argument)
    kept += ["--optim.lr", f"{lr:.1e}"]
    if config.optim.muon_lr is not None:
        kept += ["--optim.muon_lr", f"{lr * config.optim.muon_lr / config.optim.lr:.1e}"]
    return shlex.join(kept)


def rising_rates(lowest: float, highest: float, num_steps: int) -> list[float]:
    """A geometric sequence of rates."""
    return [lowest * (highest / lowest) ** (step / (num_steps - 1)) for step in range(num_steps)]


def smoothed(losses: Sequence[float]) -> list[float]:
    """Exponential moving averages with bias correction, as in Adam."""
    averages, average = [], 0.0
    for count, loss in enumerate(losses, start=1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        averages.append(average / (1 - SMOOTHING**count))
    return averages


def has_diverged(losses: Sequence[float]) -> bool:
    """Whether the smoothed loss is not finite, or has risen above its minimum by its first value or more."""
    averages = smoothed(losses)
    return not averages[-1] <= min(averages) + abs(averages[0])


def suggest_rate(rates: Sequence[float], losses: Sequence[float]) -> float:
    """A tenth of the rate with the lowest smoothed loss; ValueError if the rates show no minimum."""
    if not has_diverged(losses):
        raise ValueError(f"--rates.highest {rates[-1]:g}: the loss does not diverge up to there; raise it")
    best = _argmin(losses)
    if best == 0:
        raise ValueError(f"--rates.lowest {rates[0]:g}: the loss only rises from there; lower it")
    return rates[best] / MARGIN


def draw_rates(path: Path, rates: Sequence[float], losses: Sequence[float]) -> None:
    """Plot the losses and their running average against the rate, with a line at the suggested one."""
    from matplotlib.figure import Figure

    from machine.atomic_files import atomic_path

    averages, tried, lr = smoothed(losses), rates[: len(losses)], rates[_argmin(losses)] / MARGIN
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="learning rate", ylabel="loss")
    axes.plot(tried, losses, linewidth=1, alpha=0.4, label="loss")
    axes.plot(tried, averages, linewidth=1.5, label="smoothed")
    axes.axvline(lr, color="black", linestyle="--", linewidth=1, label=f"{lr:.1e}: a tenth of the least loss's rate")
    axes.set_ylim(top=max(averages[0], min(averages) + abs(averages[0])) * 1.1)
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    with atomic_path(path, keep=True) as partial:
        figure.savefig(partial, dpi=150, format="png")


def _argmin(losses: Sequence[float]) -> int:
    """Index of the lowest smoothed loss."""
    averages = [loss if math.isfinite(loss) else math.inf for loss in smoothed(losses)]
    return averages.index(min(averages))


if __name__ == "__main__":
    run_main(lambda config: main(config, sys.argv[1:]), FindRateConfig)
