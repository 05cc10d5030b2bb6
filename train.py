"""Train a diffusion backbone on the latents of a frozen autoencoder.

python train.py --model XSwin
python train.py --config configs/caltech101/xswin.yaml --data.path caltech101.zip
python train.py --resume runs/XSwin
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from experiment.cli import one_line_errors, parse_run
from experiment.config import ExperimentConfig
from machine.stopping import stops_at_once

if TYPE_CHECKING:
    from training.run import Run


def main(config: ExperimentConfig) -> None:
    """Open the devices and the run's folder, and train."""
    with stops_at_once(config.folder):
        from experiment.build import build_diffusion
        from training.objective import objective_of
        from training.run import open_run

    in_parts = objective_of(build_diffusion(config.diffusion)).trains_in_parts
    with open_run(config, in_parts=in_parts, grad_accumulation=config.train.grad_accumulation) as run:
        train(run)


def train(run: Run[ExperimentConfig]) -> None:
    """The whole of training, top to bottom."""
    import torch

    from autoencoders.codec import create_codec
    from checkpoints.averages import EMA
    from checkpoints.checkpoint import warm_start
    from checkpoints.training_state import TrainingState
    from data import intake
    from evaluation.scoring import open_scorer
    from experiment.build import build_diffusion, model_spec, open_cache, open_split
    from machine.randomness import seed_for
    from sampling.checks import load_guide_model, resolve_sampling
    from training.adapters import Merged, adapt
    from training.alignment import open_alignment
    from training.batches import Batches
    from training.guard import Guard, gradient_norm
    from training.inspection import Inspection, check_best
    from training.log import is_due
    from training.objective import build_auxiliary, objective_of, phase_at
    from training.optimizer import build_optimizers, learning_rate, num_training_steps
    from training.preparation import compile_blocks, forecast, join_casts, recompute_blocks, share_batch_norms

    # Data and model.
    config, accelerator = run.config, run.accelerator
    diffusion = build_diffusion(config.diffusion)
    lower_is_best = check_best(config.log, config.evaluation)
    codec = create_codec(config.autoencoder).to(accelerator.device)
    images, held_out_images = (open_split(config.data, split, accelerator) for split in ("train", "test"))
    run.check_identity(codec=codec.provenance, train=images.describe(), test=held_out_images.describe())
    spec = model_spec(config, codec, diffusion, num_classes=len(images.classes))
    num_guided = config.guided_classes(spec.num_classes)
    sampling = resolve_sampling(config.sampling, diffusion, num_guided, spec.in_channels, say=accelerator.print)
    guide_model = load_guide_model(sampling, config.diffusion, spec, accelerator, images.classes, run.identity)
    model = share_batch_norms(spec.build(), accelerator).to(accelerator.device)
    accelerator.print(intake(images, held_out_images))
    if run.is_main and accelerator.device.type == "cpu":
        print(forecast(model, spec, diffusion, accelerator, len(images)))
    if config.init_from and run.checkpoint is None:
        whole = bool(config.train.adapter)
        start = model, config.init_from, images.classes, codec, accelerator
        accelerator.print(warm_start(*start, diffusion=config.diffusion, whole=whole))
    ema = EMA(model, config.train.ema_decay, config.train.ema_profiles)
    alignment, features = open_alignment(run, model, images)
    cache = open_cache(config.data, codec, images, accelerator, flips=config.data.flip)
    held_out = open_cache(config.data, codec, held_out_images, accelerator, flips=False)
    auxiliary = build_auxiliary(config.auxiliary, model, codec, accelerator.device)
    objective = objective_of(diffusion)(diffusion, auxiliary, alignment)
    if config.train.adapter:
        accelerator.print(adapt(model, config.train, type(objective), accelerator))
    scorer = open_scorer(config.data, accelerator, config.evaluation) if config.log.evaluate_every else None
    optimizers = build_optimizers(model, objective.heads, config.optim)
    if config.train.recompute:
        recompute_blocks(model, accelerator.device)
    if config.train.compile:
        compile_blocks(model)
    join_casts(model, config.train, accelerator)
    model, optimizers["optimizer"] = accelerator.prepare(model, optimizers["optimizer"])
    backbone = accelerator.unwrap_model(model)
    learned = Merged(backbone) if config.train.adapter else backbone  # as averages know it
    ema.shard_like(backbone)
    num_steps = num_training_steps(config.train, len(cache))
    share = accelerator.process_index, accelerator.num_processes, accelerator.device
    batches = Batches(cache, codec, objective, config.train, features, *share)

    # A fresh run, or the newest whole checkpoint of an old one.
    guard = Guard()
    inspection = Inspection(run, ema, objective, codec, held_out, sampling, guide_model, scorer)
    state = TrainingState({"model": backbone, "heads": objective.heads}, optimizers, ema)
    kept: dict[str, Any] = {"best": config.log.best, "lower_is_best": lower_is_best}
    kept["keep_every"] = config.log.keep_every
    run.begin(state, {"model": guard}, inspection.due, num_steps, spec=spec, classes=cache.classes, **kept)
    accelerator.print(
        f"{config.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {len(cache)} images, "
        f"{cache.num_classes} classes, {num_steps} steps on {accelerator.num_processes} x {accelerator.device}"
        f"{', each with a part of the model' if run.is_sharded else ''}"
    )

    # The loop: between two steps the run looks at samples and scores, saves, goes back where it diverged, or stops.
    for step in run.steps():
        # Stochastic depth draws from torch's own generator: make it a function of the step too.
        torch.manual_seed(seed_for(config.train.seed, "layers", step, accelerator.process_index))
        phase = phase_at(objective.phases, step, num_steps)
        lr = learning_rate(config.optim, phase.step, phase.num_steps, len(cache) / config.train.batch_size)
        optimizers.set_learning_rate(lr)
        for batch in run.meter.timed(batches.micro_batches(step, order=run.rollbacks)):
            with accelerator.accumulate(model), accelerator.autocast():
                terms = objective(model, batch, phase)
                accelerator.backward(terms["loss"].mean())
            run.meter.add(terms, diffusion.path.noise_rank(batch.t))
        norm = run.read(gradient_norm(accelerator, model, config.optim.grad_clip, objective.heads))
        if guard.passes(norm):
            optimizers.step()
            ema.update(learned, step)
            run.meter.step(norm, config.optim.grad_clip, config.train.batch_size)
        else:
            run.skip(guard, batches.source_indices(step, run.rollbacks))
        optimizers.zero_grad()
        if is_due(step + 1, config.log.every) or step + 1 == phase.end:
            run.write_means(lr=lr, ema_drift=ema.drift(learned))

    # The end: all is saved, and what was learned is shown.
    run.look(inspection.draw)
    accelerator.end_training()
    accelerator.print(f"checkpoint: {run.folder}/checkpoints/{run.step:08d}")
    accelerator.print(f"samples:    {run.folder}/samples/{run.step:08d}.png")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_run(ExperimentConfig))
