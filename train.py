"""Train a diffusion backbone on the latents of a frozen autoencoder.

accelerate launch train.py --model XSwin
accelerate launch train.py --config configs/caltech101/xswin.yaml --data.path caltech101.zip
accelerate launch train.py --resume runs/XSwin
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiment.cli import one_line_errors, parse_experiment
from experiment.config import ExperimentConfig


def main(config: ExperimentConfig) -> None:
    """The whole of training, top to bottom."""
    import torch
    import yaml
    from accelerate import Accelerator
    from accelerate.utils import set_seed
    from tqdm import tqdm

    from experiment.batches import Batches, seed_for
    from experiment.build import (
        build_optimizer,
        build_process,
        check_sampling,
        learning_rate,
        model_spec,
        num_training_steps,
        open_cache,
        open_split,
        precision,
        sampling_of,
        use_all_cores,
    )
    from experiment.checkpoint import resume, save_checkpoint
    from experiment.ema import EMA
    from experiment.evaluation import evaluate, open_scorer
    from experiment.generation import Generator, balanced_labels, generate, sample_labels
    from experiment.sources import from_generator
    from experiment.tracking import Log, save_grid
    from experiment.validation import validation_loss
    from models.autoencoder import create_codec

    # Devices and folders.
    run = Path(config.resume or Path("runs") / (config.name or config.model.replace("/", "-")))
    accelerator = Accelerator(
        mixed_precision=precision(config.train.precision),
        gradient_accumulation_steps=config.train.grad_accumulation,
        log_with=list[Any](config.log.trackers) or None,
        project_dir=run,
    )
    use_all_cores(accelerator)
    set_seed(config.train.seed)

    # Data, process, model.
    codec = create_codec(config.autoencoder).to(accelerator.device)
    process = build_process(config.diffusion)
    images, held_out_images = open_split(config.data, "train"), open_split(config.data, "test")
    spec = model_spec(config, codec, process, num_classes=len(images.classes))
    sampling = check_sampling(sampling_of(config.sampling, spec.num_classes), process, spec.num_classes)
    model = spec.build().to(accelerator.device)
    cache = open_cache(config.data, codec, images, accelerator, flips=config.data.flip)
    held_out = open_cache(config.data, codec, held_out_images, accelerator, flips=False)
    scorer = open_scorer(config.data, accelerator, config.evaluation) if config.log.evaluate_every else None
    ema = EMA(model, config.train.ema_decay)
    num_steps = num_training_steps(config.train, len(cache))
    optimizer = build_optimizer(model, config.optim)
    batches = Batches(
        cache.to(accelerator.device),
        codec,
        process,
        seed=config.train.seed,
        batch_size=config.train.batch_size,
        num_micro_batches=config.train.grad_accumulation,
        label_dropout=config.train.label_dropout,
        rank=accelerator.process_index,
        num_ranks=accelerator.num_processes,
        device=accelerator.device,
    )

    # A fresh run, or the newest checkpoint of an old one.
    first_step = 0
    if config.resume:
        first_step = resume(run / "checkpoints", model, ema, optimizer)
        config = replace(config, resume=None)
    elif (run / "checkpoints").exists():
        raise FileExistsError(f"{run} holds a run already: --resume {run}, give another --name, or delete it")
    if accelerator.is_main_process:
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
    accelerator.wait_for_everyone()
    log = Log(run, accelerator, config.to_dict())
    log.truncate(first_step)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.print(
        f"{config.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {len(cache)} images, "
        f"{cache.num_classes} classes, {num_steps} steps on {accelerator.num_processes} x {accelerator.device}"
    )

    def save(step: int) -> None:
        if accelerator.is_main_process:
            save_checkpoint(
                run / "checkpoints",
                step=step,
                model=accelerator.unwrap_model(model),
                ema=ema,
                optimizer=optimizer,
                config=config,
                spec=spec,
                classes=cache.classes,
                keep=config.log.keep_checkpoints,
            )
        accelerator.wait_for_everyone()

    def generator(labels: torch.Tensor, seed: int) -> Generator:
        return Generator(ema.model, process, codec, labels, sampling, cache.image_size, seed, accelerator)

    def draw_samples(step: int) -> None:
        labels = balanced_labels(4 * min(10, max(1, cache.num_classes)), min(10, cache.num_classes))
        images = generate(generator(labels, config.train.seed), batch_size=len(labels))
        if accelerator.is_main_process:
            columns = len(labels) // 4
            path = run / "samples" / f"{step:08d}.png"
            save_grid(images, path, columns=columns, column_names=cache.classes[:columns])

    def score(step: int) -> None:
        labels = sample_labels(config.evaluation, len(held_out), spec.num_classes, held_out.labels)
        source = from_generator(generator(labels, config.evaluation.seed), config.model)
        assert scorer is not None
        scores, _ = evaluate(source, *scorer, accelerator, config.evaluation)
        log.write(step, **{name: one.value for name, one in scores.scores.items() if one.value is not None})

    # The loop.
    began, since, last_log = time.time(), time.time(), first_step
    sums: dict[str, torch.Tensor] = {}
    progress = tqdm(
        range(first_step, num_steps),
        initial=first_step,
        total=num_steps,
        desc=run.name,
        disable=not accelerator.is_main_process,
    )
    done = first_step
    for step in progress:
        # Stochastic depth draws from torch's own generator: make it a function of the step too.
        torch.manual_seed(seed_for(config.train.seed, "layers", step, accelerator.process_index))
        lr = learning_rate(config.optim, step, num_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for batch in batches.micro_batches(step):
            with accelerator.accumulate(model), accelerator.autocast():
                terms = process.training_loss(model, batch.x_0, batch.y, t=batch.t, noise=batch.noise)
                means = {name: values.mean() for name, values in terms.items()}
                accelerator.backward(means["loss"])
                if accelerator.sync_gradients and config.optim.grad_clip:
                    accelerator.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
                optimizer.step()
                optimizer.zero_grad()
            for name, mean in means.items():
                sums[name] = sums.get(name, 0.0) + mean.detach()
        ema.update(accelerator.unwrap_model(model), step)

        done = step + 1
        if _due(done, config.log.every) or done == num_steps:
            count = (done - last_log) * config.train.grad_accumulation
            totals: Any = accelerator.reduce(sums, "mean")
            losses = {name: total.item() / count for name, total in totals.items()}
            speed = (done - last_log) * config.train.batch_size / (time.time() - since)
            log.write(done, **losses, lr=lr, images_per_second=speed)
            progress.set_postfix(loss=f"{losses['loss']:.4f}", img_s=f"{speed:.0f}")
            sums, since, last_log = {}, time.time(), done
        paused = time.time()
        if _due(done, config.log.validate_every):
            held_out_losses = validation_loss(
                ema.model, process, codec, held_out, accelerator, config.log.num_validation, config.train
            )
            log.write(done, **{f"validation_{name}": value for name, value in held_out_losses.items()})
        if _due(done, config.log.sample_every):
            draw_samples(done)
        if _due(done, config.log.evaluate_every):
            score(done)
        if _due(done, config.log.checkpoint_every):
            save(done)
        since += time.time() - paused
        if config.train.max_hours and time.time() - began > 3600 * config.train.max_hours:
            accelerator.print(f"--train.max_hours {config.train.max_hours} are over after {done} steps")
            break

    # The end: what was learned, saved and shown.
    progress.close()
    save(done)
    draw_samples(done)
    accelerator.end_training()
    accelerator.print(f"checkpoint: {run}/checkpoints/{done:08d}\nsamples:    {run}/samples/{done:08d}.png")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


if __name__ == "__main__":
    with one_line_errors():
        main(parse_experiment())
