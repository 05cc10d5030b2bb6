"""Train a diffusion backbone on the latents of a frozen autoencoder.

python train.py --config configs/own_images.yaml --data.path my_images
python train.py --model DiT-S/2 --autoencoder embedded-taef2 --data.path my_images --data.image_size 128
python train.py --resume runs/own-images
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiment.cli import parse_run, run_main
from experiment.config import ExperimentConfig
from machine.stopping import exit_on_signal
from models import check_model

if TYPE_CHECKING:
    from training.run import Run


def main(config: ExperimentConfig) -> None:
    """Set up the run and train."""
    check_model(config.model)  # before the libraries are imported, which takes seconds
    with exit_on_signal(config.folder):
        from training.assembly import open_training

    with open_training(config) as run:
        train(run)


def train(run: Run[ExperimentConfig]) -> None:
    """Train a backbone: build everything from the configuration, start or resume the run, and loop over its steps."""
    import torch

    from checkpoints.averages import EMA
    from checkpoints.training_state import TrainingState
    from data import summarize_splits
    from evaluation.scoring import open_scorer
    from experiment.build import open_cache, open_split
    from machine.randomness import seed_for
    from sampling.checks import load_guide_model, resolve_sampling
    from training.adapters import Merged
    from training.assembly import build_backbone, build_batches, build_objective, open_task, prepare
    from training.guard import Guard, clip_gradients
    from training.inspection import Inspections, measured_by, open_best
    from training.log import end_training, is_due
    from training.objective import phase_at
    from training.optimizer import learning_rate, num_training_steps
    from training.preparation import forecast

    # Open the data, and complete the settings by what follows from them.
    config, accelerator = run.config, run.accelerator
    best = open_best(config.log, config.evaluation)
    task = open_task(run)
    diffusion, codec, images, spec = task
    held_out_images = open_split(config.data, "test", accelerator)
    run.check_identity(codec=codec.provenance, train=images.describe(), test=held_out_images.describe())
    num_guided = config.guided_classes(spec.num_classes)
    sampling = resolve_sampling(config.sampling, diffusion, num_guided, spec.in_channels, say=accelerator.print)
    guide_model = load_guide_model(sampling, config.diffusion, spec, accelerator, images.classes, run.identity)
    accelerator.print(summarize_splits(images, held_out_images))

    # Build the model and what trains it.
    model = build_backbone(run, task)
    num_images = len(images)
    num_steps = num_training_steps(config.train, num_images)
    if run.is_main and accelerator.device.type == "cpu" and not accelerator.is_fsdp2:
        images_per_step = config.train.batch_size
        print(forecast(model, spec, diffusion, accelerator, num_images, num_steps, images_per_step))
    ema = EMA(model, config.train.ema_decay, config.train.ema_profiles, sharded=accelerator.is_fsdp2)
    objective, features = build_objective(run, task, model)
    batches = build_batches(run, task, objective, features)
    held_out = open_cache(config.data, codec, held_out_images, accelerator, flips=False)
    model, optimizers = prepare(run, model, objective)
    scorer, reference = None, None
    if config.log.evaluate_every:
        scorer, reference = open_scorer(config.data, accelerator, config.evaluation)
        if config.log.best != "validation_loss":
            best.measured_by = measured_by(scorer.extractor.sha256, sampling, accelerator)
    backbone = accelerator.unwrap_model(model)
    merged = Merged(backbone) if config.train.adapter else backbone  # as averages and checkpoints store it
    ema.shard_like(backbone)

    # Start the run, or resume it from its newest intact checkpoint.
    guard = Guard()
    inspections = Inspections(run, ema, objective, codec, held_out, sampling, guide_model, scorer, reference)
    state = TrainingState({"model": backbone, "heads": objective.heads}, optimizers, ema)
    run.begin(state, {"model": guard}, inspections.due, num_steps, best=best, spec=spec, classes=images.classes)
    accelerator.print(
        f"{config.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {num_images} images, "
        f"{len(images.classes)} classes, {num_steps} steps on {accelerator.num_processes} x {accelerator.device}"
        f"{', each with a part of the model' if run.is_sharded else ''}"
    )

    # Loop over the steps. Between two steps the run inspects, saves, rolls back after divergence, or stops.
    for step in run.steps():
        # Stochastic depth and dropout use torch's global generator, which must depend on the step for an exact resume.
        torch.manual_seed(seed_for(config.train.seed, "layers", step, accelerator.process_index))
        phase = phase_at(objective.phases, step, num_steps)
        lr = learning_rate(config.optim, phase.step, phase.num_steps, num_images / config.train.batch_size)
        optimizers.scale_learning_rates(lr / config.optim.lr)
        for batch in run.meter.timed(batches.micro_batches(step, order=run.rollbacks)):
            with accelerator.accumulate(model):
                with accelerator.autocast():
                    terms = objective(model, batch, phase)
                accelerator.backward(terms["loss"].mean())
            run.meter.add(terms, diffusion.path.noise_rank(batch.t))
        norms = run.synchronize(clip_gradients(accelerator, model, config.optim.grad_clip, objective.heads))
        if guard.passes(*norms):
            optimizers.step()
            ema.update(merged, step)
            run.meter.step(norms, config.optim.grad_clip, config.train.batch_size)
        else:
            run.skip(guard, batches.source_indices(step, run.rollbacks))
        optimizers.zero_grad()
        if is_due(step + 1, config.log.every) or step + 1 == phase.end:
            run.log_means(lr=lr, ema_drift=ema.drift(merged))

    # Sample a final grid; everything is saved by now.
    accelerator.print(f"checkpoint: {run.folder}/checkpoints/{run.step:08d}")
    run.inspect(inspections.draw)
    end_training(accelerator)
    if (grid := run.folder / "samples" / f"{run.step:08d}.png").is_file():  # there is none of ruined weights
        accelerator.print(f"samples:    {grid}")


if __name__ == "__main__":
    run_main(main, ExperimentConfig, read=parse_run)
