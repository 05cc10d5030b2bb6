"""Train a diffusion backbone on the latents of a frozen autoencoder.

python train.py --model XSwin
python train.py --config configs/caltech101/xswin.yaml --data.path caltech101.zip
python train.py --resume runs/XSwin
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from experiment.cli import one_line_errors, parse_run
from experiment.config import ExperimentConfig

if TYPE_CHECKING:
    from training.interruption import Interruption


def main(config: ExperimentConfig) -> None:
    """Open the devices and the run's folder, and train."""
    from experiment.diffusions import build_diffusion
    from training.interruption import open_run
    from training.objective import objective_of

    in_parts = objective_of(build_diffusion(config.diffusion)).trains_in_parts
    with open_run(config, in_parts=in_parts, grad_accumulation=config.train.grad_accumulation) as run:
        train(*run)


def train(config: ExperimentConfig, checkpoint: Path | None, interruption: Interruption) -> None:
    """The whole of training, top to bottom."""
    import torch
    import yaml
    from tqdm import tqdm

    from autoencoders.codec import create_codec
    from checkpoints.averages import EMA
    from checkpoints.checkpoint import drop_snapshots, open_checkpoint, resume, save_checkpoint, warm_start
    from evaluation.scoring import open_scorer
    from experiment.backbones import model_spec
    from experiment.datasets import open_cache, open_split
    from experiment.diffusions import build_diffusion
    from machine.accelerator import from_main
    from machine.checkpoint_folder import Best, mark_best, to_resume
    from machine.randomness import seed_for
    from machine.sharding import is_sharded
    from machine.whole_files import write_whole
    from sampling.autoguidance import load_guide_model
    from sampling.options import check_sampling, sampling_of
    from training.batches import Batches
    from training.curves import draw_curve
    from training.forecast import announce
    from training.guard import Guard, gradient_norm
    from training.inspection import Inspection, check_best
    from training.interruption import Stopped
    from training.log import Log, is_due
    from training.meter import Meter
    from training.objective import build_auxiliary, objective_of
    from training.optimizer import build_optimizer, learning_rate, num_training_steps, set_learning_rate
    from training.phases import phase_at
    from training.preparation import compile_blocks, share_batch_norms

    # Data and model.
    run, accelerator, diffusion = interruption.run, interruption.accelerator, build_diffusion(config.diffusion)
    lower_is_best = check_best(config.log, config.evaluation)
    codec = create_codec(config.autoencoder).to(accelerator.device)
    images, held_out_images = open_split(config.data, "train"), open_split(config.data, "test")
    identity = {"codec": codec.provenance, "train": images.describe(), "test": held_out_images.describe()}
    if checkpoint is not None:
        open_checkpoint(checkpoint).check_identity(**identity)
    spec = model_spec(config, codec, diffusion, num_classes=len(images.classes))
    num_guided = config.guided_classes(spec.num_classes)
    sampling = check_sampling(sampling_of(config.sampling, num_guided), diffusion, num_guided, spec.in_channels)
    meant = (config.diffusion, spec, accelerator.device, images.classes, identity)
    guide_model = load_guide_model(sampling, *meant)
    model = share_batch_norms(spec.build(), accelerator).to(accelerator.device)
    announce(images, held_out_images, model, spec, diffusion, accelerator)
    if config.init_from and checkpoint is None:
        accelerator.print(warm_start(model, config.init_from))
    cache = open_cache(config.data, codec, images, accelerator, flips=config.data.flip)
    held_out = open_cache(config.data, codec, held_out_images, accelerator, flips=False)
    scorer = open_scorer(config.data, accelerator, config.evaluation) if config.log.evaluate_every else None
    auxiliary = build_auxiliary(config.auxiliary, model, codec, accelerator.device)
    ema = EMA(model, config.train.ema_decay, config.train.ema_profiles)
    optimizer = build_optimizer(model, config.optim)
    if config.train.compile:
        compile_blocks(model)
    model, optimizer = accelerator.prepare(model, optimizer)
    ema.shard_like(model)
    num_steps, times = num_training_steps(config.train, len(cache)), diffusion.times()
    objective = objective_of(diffusion)(diffusion, times, accelerator, auxiliary)
    batches = Batches(
        cache.to(accelerator.device),
        codec,
        times,
        seed=config.train.seed,
        batch_size=config.train.batch_size,
        num_micro_batches=config.train.grad_accumulation,
        label_dropout=config.train.label_dropout,
        rank=accelerator.process_index,
        num_ranks=accelerator.num_processes,
        device=accelerator.device,
        draw_more=objective.draw_more,
    )

    # A fresh run, or the newest whole checkpoint of an old one.
    guard, meter, best, step, saved, inspected = Guard(), Meter(), Best(), 0, -1, True

    def restore(checkpoint: Path) -> None:
        nonlocal best, step, saved, inspected
        progress = resume(checkpoint, accelerator.unwrap_model(model), ema, optimizer)
        guard.restore(progress["guard"])
        meter.restore(progress["meter"], accelerator)
        times.restore(progress["times"])
        ema.restore(progress.get("ema", {}))
        best = Best(**progress["best"])
        if best.step is not None and accelerator.is_main_process:
            mark_best(run / "checkpoints", best.step)
        if accelerator.is_main_process:
            drop_snapshots(run, after=progress["step"])
        step = saved = progress["step"]
        inspected = progress.get("inspected", True)

    if checkpoint is not None:
        restore(checkpoint)
    if accelerator.is_main_process:
        write_whole(run / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))
    accelerator.wait_for_everyone()
    log = Log(run, accelerator, config.to_dict())
    log.truncate(step)
    inspection = Inspection(
        run, config, ema, objective, codec, held_out, sampling, guide_model, scorer, log, accelerator
    )
    accelerator.print(
        f"{config.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {len(cache)} images, "
        f"{cache.num_classes} classes, {num_steps} steps on {accelerator.num_processes} x {accelerator.device}"
        f"{', each with a part of the model' if is_sharded(model) else ''}"
    )

    def save(*, last: bool = False, interval: dict | None = None) -> None:
        """By all processes; by the main one alone where it has the interval of all, and the whole model."""
        nonlocal saved
        if saved == step or (interval is None and not guard.may_save(accelerator, model, last=last)):
            return
        state = {"guard": guard.state(), "meter": interval or meter.state(accelerator), "times": times.state()}
        state |= {"best": asdict(best), "inspected": inspected and reason is None, "ema": ema.began}
        save_checkpoint(
            run / "checkpoints",
            step=step,
            model=accelerator.unwrap_model(model),
            ema=ema,
            optimizer=optimizer,
            config=config,
            spec=spec,
            classes=cache.classes,
            identity=identity,
            progress=state,
            write=accelerator.is_main_process,
            rotates=not guard.in_a_row,
        )
        saved = step
        if accelerator.is_main_process:
            draw_curve(run)
        if interval is None:
            accelerator.wait_for_everyone()

    def inspect() -> None:
        """What is due at this step. Where it is broken off, a resumed run begins with it."""
        nonlocal inspected
        if not (due := inspection.due(step, num_steps)):
            return
        is_sound, inspected, interval, found = guard.may_save(accelerator, model), False, meter.state(accelerator), {}
        with interruption.at_once(lambda: is_sound and save(interval=interval), can_save=can_save_alone):
            for look in due:
                found |= look(step)
        inspected = True
        if found:
            log.write(step, **found)
        value = found.get(config.log.best or "")
        if value is not None and is_sound and best.improves(value, step, lower=lower_is_best):
            save()
            if accelerator.is_main_process:
                mark_best(run / "checkpoints", step)

    # The loop.
    reason, can_save_alone = None, accelerator.is_main_process and not is_sharded(model)
    if not inspected:
        inspect()
    progress = tqdm(initial=step, total=num_steps, desc=run.name, unit="step", disable=not accelerator.is_main_process)
    while step < num_steps:
        # Stochastic depth draws from torch's own generator: make it a function of the step too.
        torch.manual_seed(seed_for(config.train.seed, "layers", step, accelerator.process_index))
        phase = phase_at(objective.phases, step, num_steps)
        lr = learning_rate(config.optim, phase.step, phase.num_steps, len(cache) / config.train.batch_size)
        set_learning_rate(optimizer, lr)
        for batch in meter.timed(batches.micro_batches(step, order=guard.rollbacks)):
            with accelerator.accumulate(model), accelerator.autocast():
                terms = objective(model, batch, phase)
                accelerator.backward(terms["loss"].mean())
            meter.add(terms, diffusion.noise_rank(batch.t))
        norm = gradient_norm(accelerator, model, config.optim.grad_clip)
        if guard.passes(norm):
            optimizer.step()
            ema.update(accelerator.unwrap_model(model), step)
            meter.step(norm, config.optim.grad_clip, config.train.batch_size)
        else:
            meter.skip()
            log.write(step + 1, skipped=guard.skipped, source_indices=batches.source_indices(step, guard.rollbacks))
        optimizer.zero_grad()
        step += 1
        progress.update()
        reason = interruption.reason(step, num_steps)
        if (is_due(step, config.log.every) or step == phase.end) and (means := meter.summary(accelerator)):
            log.write(step, **means, lr=lr, ema_drift=ema.drift(accelerator.unwrap_model(model)))
            progress.set_postfix(loss=f"{means['loss']:.4f}", img_s=f"{means['images_per_second']:.0f}")
            meter.reset()
        if reason is not None and not guard.in_a_row:  # not in the middle of skipped steps
            break
        paused = time.perf_counter()
        if reason is None:
            inspect()
        if is_due(step, config.log.checkpoint_every) and step < num_steps:
            save()
        meter.pause(time.perf_counter() - paused)
        if guard.must_roll_back(can=saved >= 0):
            restore(from_main(accelerator, lambda: to_resume(run)))
            progress.reset(total=num_steps)
            progress.update(step)

    # The end: what was learned, saved and shown.
    progress.close()
    save(last=True)
    if reason is not None:
        raise Stopped(reason)
    with interruption.at_once(lambda: None, can_save=can_save_alone):
        inspection.draw(step)
    accelerator.end_training()
    accelerator.print(f"checkpoint: {run}/checkpoints/{step:08d}\nsamples:    {run}/samples/{step:08d}.png")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_run(ExperimentConfig))
