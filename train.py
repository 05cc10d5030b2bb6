"""Train a diffusion backbone on the latents of a frozen autoencoder.

accelerate launch train.py --model XSwin
accelerate launch train.py --config configs/caltech101/xswin.yaml --data.path caltech101.zip
accelerate launch train.py --resume runs/XSwin
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

from experiment.cli import one_line_errors, parse_run
from experiment.config import ExperimentConfig, resuming


def main(config: ExperimentConfig) -> None:
    """The whole of training, top to bottom."""
    import torch
    import yaml
    from accelerate.utils import set_seed
    from tqdm import tqdm

    from data import intake
    from experiment.autoguidance import load_guide_model
    from experiment.batches import Batches, seed_for
    from experiment.build import (
        build_optimizer,
        build_process,
        check_sampling,
        compile_blocks,
        learning_rate,
        model_spec,
        num_training_steps,
        open_cache,
        open_split,
        sampling_of,
        set_learning_rate,
        share_batch_norms,
    )
    from experiment.checkpoint import open_checkpoint, resume, save_checkpoint, warm_start
    from experiment.checkpoint_folder import Best, list_checkpoints, mark_best, to_resume
    from experiment.ema import EMA
    from experiment.evaluation import open_scorer
    from experiment.files import write_whole
    from experiment.forecast import forecast
    from experiment.guard import Guard, gradient_norm
    from experiment.inspection import Inspection, check_best
    from experiment.interruption import EXIT_CODE, Interruption
    from experiment.machine import open_accelerator
    from experiment.meter import Meter
    from experiment.objective import Objective, build_auxiliary
    from experiment.phases import phase_at
    from experiment.resumption import start_or_go_on
    from experiment.sharding import is_sharded
    from experiment.tracking import Log, draw_curve
    from models.autoencoder import create_codec

    # Devices and folders.
    run, process = config.folder, build_process(config.diffusion)
    lower_is_best = check_best(config.log, config.evaluation)
    accelerator = open_accelerator(
        config.train.precision,
        flag="--train.precision",
        in_phases=len(process.phases) > 1,
        gradient_accumulation_steps=config.train.grad_accumulation,
        log_with=config.log.trackers or None,
        project_dir=run,
    )
    set_seed(config.train.seed)
    config, checkpoint = start_or_go_on(config, accelerator.print)

    # Data and model.
    codec = create_codec(config.autoencoder).to(accelerator.device)
    images, held_out_images = open_split(config.data, "train"), open_split(config.data, "test")
    identity = {"codec": codec.provenance, "train": images.describe(), "test": held_out_images.describe()}
    if checkpoint is not None:
        open_checkpoint(checkpoint).check_identity(**identity)
    if accelerator.is_main_process:
        print(intake(images, held_out_images))
    spec = model_spec(config, codec, process, num_classes=len(images.classes))
    num_guided = config.guided_classes(spec.num_classes)
    sampling = check_sampling(sampling_of(config.sampling, num_guided), process, num_guided, spec.in_channels)
    guide_model = load_guide_model(sampling, config.diffusion, spec, accelerator.device)
    model = share_batch_norms(spec.build(), accelerator).to(accelerator.device)
    if accelerator.is_main_process and accelerator.device.type == "cpu":
        print(forecast(model, spec, process, accelerator, len(images)))
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
    num_steps = num_training_steps(config.train, len(cache))
    times = process.times()
    objective = Objective(process, times, accelerator, auxiliary)
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
        draw_more=process.draw_more,
    )

    # A fresh run, or the newest whole checkpoint of an old one.
    guard, meter, best, step, saved = Guard(), Meter(), Best(), 0, -1

    def restore(checkpoint: Path) -> int:
        nonlocal best, saved
        progress = resume(checkpoint, accelerator.unwrap_model(model), ema, optimizer)
        guard.restore(progress["guard"])
        meter.restore(progress["meter"], accelerator)
        times.restore(progress["times"])
        best = Best(**progress["best"])
        if best.step is not None and accelerator.is_main_process:
            mark_best(run / "checkpoints", best.step)
        saved = progress["step"]
        return saved

    if checkpoint is not None:
        step = restore(checkpoint)
        config = resuming(config, None)
    if accelerator.is_main_process:
        write_whole(run / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))
    accelerator.wait_for_everyone()
    log = Log(run, accelerator, config.to_dict())
    log.truncate(step)
    inspection = Inspection(
        run, config, ema, process, codec, held_out, sampling, guide_model, scorer, log, accelerator, auxiliary
    )
    accelerator.print(
        f"{config.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {len(cache)} images, "
        f"{cache.num_classes} classes, {num_steps} steps on {accelerator.num_processes} x {accelerator.device}"
        f"{', each with a part of the model' if is_sharded(model) else ''}"
    )

    def save(*, last: bool = False) -> None:
        nonlocal saved
        if saved == step or not guard.may_save(accelerator, model, last=last):
            return
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
            progress={
                "guard": guard.state(),
                "meter": meter.state(accelerator),
                "times": times.state(),
                "best": asdict(best),
            },
            write=accelerator.is_main_process,
            rotates=not guard.in_a_row,
        )
        saved = step
        if accelerator.is_main_process:
            draw_curve(run)
        accelerator.wait_for_everyone()

    def keep_if_best(found: dict[str, float]) -> None:
        value = found.get(config.log.best or "")
        if value is not None and guard.may_save(accelerator, model) and best.improves(value, step, lower=lower_is_best):
            save()
            if accelerator.is_main_process:
                mark_best(run / "checkpoints", step)

    # The loop.
    interruption, reason = Interruption(accelerator, config.train.max_hours), None
    hidden = not accelerator.is_main_process
    progress = tqdm(initial=step, total=num_steps, desc=run.name, unit="step", disable=hidden)
    while step < num_steps and (reason is None or guard.in_a_row):  # not in the middle of skipped steps
        # Stochastic depth draws from torch's own generator: make it a function of the step too.
        torch.manual_seed(seed_for(config.train.seed, "layers", step, accelerator.process_index))
        phase = phase_at(process.phases, step, num_steps)
        lr = learning_rate(config.optim, phase.step, phase.num_steps, len(cache) / config.train.batch_size)
        set_learning_rate(optimizer, lr)
        for batch in meter.timed(batches.micro_batches(step, order=guard.rollbacks)):
            with accelerator.accumulate(model), accelerator.autocast():
                terms = objective(model, batch, phase)
                accelerator.backward(terms["loss"].mean())
            meter.add(terms, process.noise_rank(batch.t))
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
        reason = interruption.reason()

        if (_due(step, config.log.every) or step == phase.end) and (means := meter.summary(accelerator)):
            log.write(step, **means, lr=lr, ema_drift=ema.drift(accelerator.unwrap_model(model)))
            progress.set_postfix(loss=f"{means['loss']:.4f}", img_s=f"{means['images_per_second']:.0f}")
            meter.reset()
        paused = time.perf_counter()
        found: dict[str, float] = {}
        if _due(step, config.log.validate_every):
            found |= inspection.validate(step)
        if _due(step, config.log.evaluate_every):
            found |= inspection.score(step)
        keep_if_best(found)
        if _due(step, config.log.sample_every) and step < num_steps:
            inspection.draw(step)
        if _due(step, config.log.checkpoint_every) and step < num_steps:
            save()
        meter.pause(time.perf_counter() - paused)
        if guard.must_roll_back(can=bool(list_checkpoints(run / "checkpoints"))):
            step = restore(to_resume(run))
            progress.reset(total=num_steps)
            progress.update(step)

    # The end: what was learned, saved and shown.
    progress.close()
    save(last=True)
    if reason is None:
        inspection.draw(step)
    accelerator.end_training()
    accelerator.print(f"checkpoint: {run}/checkpoints/{step:08d}")
    if reason is not None:
        accelerator.print(f"{reason}: stopped after {step} of {num_steps} steps; go on with --resume {run}")
        raise SystemExit(EXIT_CODE)
    accelerator.print(f"samples:    {run}/samples/{step:08d}.png")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


if __name__ == "__main__":
    with one_line_errors():
        main(parse_run(ExperimentConfig))
