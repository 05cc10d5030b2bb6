"""Find a learning rate: a short training of what train.py would train, at rates that rise until its loss diverges.

python scripts/find_rate.py --config configs/caltech101/xswin_fast.yaml
python scripts/find_rate.py --model DiT-S/2 --optim.muon_lr 1e-3 --rates.highest 10       (Muon's rises with it)

It prints train.py's command line with a tenth of the rate at which the smoothed loss was least, and draws the losses
(Smith 2017, section 3.3).
"""

import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiment.cli import one_line_errors, parse
from experiment.config import ExperimentConfig
from settings import within

SMOOTHING = 0.9  # of a loss, by those before it
MARGIN = 10  # from the rate of the least loss down to one that a whole training bears


@dataclass(frozen=True)
class RatesConfig:
    """The rates to try.

    Args:
        lowest: where they begin
        highest: where they end, unless the loss diverges before
        num_steps: optimizer steps, each at a rate of its own
    """

    lowest: float = within("(0, inf)", 1e-6)
    highest: float = within("(0, inf)", 1.0)
    num_steps: int = within("[2, inf)", 200)

    def check(self, prefix: str) -> None:
        if not self.lowest < self.highest:
            raise ValueError(f"{prefix}lowest {self.lowest} must lie below {prefix}highest {self.highest}")


@dataclass(frozen=True)
class FindRateConfig(ExperimentConfig):
    """Find a learning rate for a training; all settings of train.py count but those of its length and schedule.

    Args:
        rates: the rates to try
    """

    rates: RatesConfig = field(default_factory=RatesConfig)


def main(config: FindRateConfig, arguments: Sequence[str] = ()) -> None:
    """Try the rates, draw the losses, and print the command line that trains with what was found."""
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
    """One training, a step at each rate, in as many steps as it takes to diverge."""
    import torch
    from tqdm import tqdm

    from autoencoders.codec import create_codec
    from experiment.build import build_diffusion, model_spec, open_cache, open_split
    from machine.randomness import seed_for
    from training.assembly import build_backbone, build_batches, build_objective, prepare
    from training.guard import gradient_norm
    from training.objective import phase_at

    config, accelerator = run.config, run.accelerator
    diffusion = build_diffusion(config.diffusion)
    codec = create_codec(config.autoencoder).to(accelerator.device)
    images = open_split(config.data, "train", accelerator)
    spec = model_spec(config, codec, diffusion, num_classes=len(images.classes))
    model = build_backbone(run, spec, images.classes, codec)
    objective, features = build_objective(run, model, diffusion, codec, images)
    cache = open_cache(config.data, codec, images, accelerator, flips=config.data.flip)
    model, optimizers = prepare(run, model, objective)
    batches = build_batches(run, cache, codec, objective, features)
    phase, losses = phase_at(objective.phases, 0, len(rates)), []
    for step, lr in enumerate(tqdm(rates, desc=run.folder.name, unit="step", disable=not run.is_main)):
        torch.manual_seed(seed_for(config.train.seed, "layers", step, accelerator.process_index))
        optimizers.set_learning_rate(lr)
        shares = []
        for batch in batches.micro_batches(step):
            with accelerator.accumulate(model), accelerator.autocast():
                loss = objective(model, batch, phase)["loss"].mean()
                accelerator.backward(loss)
            shares.append(loss.detach())
        gradient_norm(accelerator, model, config.optim.grad_clip, objective.heads)  # which clips it
        mean: Any = accelerator.reduce(torch.stack(shares).mean(), "mean")
        losses.append(run.read(mean))
        if has_diverged(losses):
            break
        optimizers.step()
        optimizers.zero_grad()
    return losses


def command_line(config: FindRateConfig, arguments: Sequence[str], lr: float) -> str:
    """Of train.py, with the arguments of this program but for its own and the rates."""
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

    from machine.whole_files import whole

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


if __name__ == "__main__":
    with one_line_errors():
        main(parse(FindRateConfig), sys.argv[1:])
