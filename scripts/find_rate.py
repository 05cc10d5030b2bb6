"""Find a learning rate: a short training of what train.py would train, at rates that rise until its loss diverges.

python scripts/find_rate.py --config configs/caltech101/xswin_fast.yaml
python scripts/find_rate.py --model DiT-S/2 --optim.muon_lr 1e-3 --rates.highest 10       (Muon's rises with it)

It prints train.py's command line with a tenth of the rate at which the smoothed loss was least, and draws the losses.
"""

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
    from experiment.build import build_diffusion
    from training.objective import objective_of
    from training.range_test import draw_rates, rising_rates, suggest_rate
    from training.run import open_run

    if config.resume:
        raise ValueError(f"--resume {config.resume}: rates are found for a training's beginning; use --init_from")
    config = replace(config, name=f"{config.folder.relative_to('runs')}-rates")
    rates = rising_rates(config.rates.lowest, config.rates.highest, config.rates.num_steps)
    in_parts = objective_of(build_diffusion(config.diffusion)).trains_in_parts
    with open_run(config, in_parts=in_parts, grad_accumulation=config.train.grad_accumulation) as run:
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
    from checkpoints.checkpoint import warm_start
    from experiment.build import build_diffusion, model_spec, open_cache, open_split
    from machine.randomness import seed_for
    from training.adapters import adapt
    from training.alignment import open_alignment
    from training.batches import open_batches
    from training.guard import gradient_norm
    from training.objective import build_auxiliary, objective_of, phase_at
    from training.optimizer import build_optimizers
    from training.preparation import recompute_blocks, share_batch_norms
    from training.range_test import has_diverged

    config, accelerator = run.config, run.accelerator
    diffusion = build_diffusion(config.diffusion)
    codec = create_codec(config.autoencoder).to(accelerator.device)
    images = open_split(config.data, "train", accelerator)
    spec = model_spec(config, codec, diffusion, num_classes=len(images.classes))
    model = share_batch_norms(spec.build(), accelerator).to(accelerator.device)
    if config.init_from:
        whole = bool(config.train.adapter)
        accelerator.print(warm_start(model, config.init_from, images.classes, codec, whole=whole))
    alignment, features = open_alignment(run, model, images)
    cache = open_cache(config.data, codec, images, accelerator, flips=config.data.flip)
    auxiliary = build_auxiliary(config.auxiliary, model, codec, accelerator.device)
    objective = objective_of(diffusion)(diffusion, auxiliary, alignment)
    if config.train.adapter:
        accelerator.print(adapt(model, config.train, type(objective), accelerator))
    optimizers = build_optimizers(model, objective.heads, config.optim)
    if config.train.recompute:
        recompute_blocks(model, accelerator.device)
    model, optimizers["optimizer"] = accelerator.prepare(model, optimizers["optimizer"])
    batches = open_batches(run, cache, codec, objective, features)
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


if __name__ == "__main__":
    with one_line_errors():
        main(parse(FindRateConfig), sys.argv[1:])
