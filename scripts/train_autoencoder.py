"""Train an AutoencoderKL: variational bound, perceptual distance, discriminator (Rombach et al. 2022, section 3.1).

python scripts/train_autoencoder.py --config configs/autoencoder/kl_f8c4.yaml --data.path images.zip
python scripts/train_autoencoder.py --resume runs/kl_f8c4
python train.py --autoencoder runs/kl_f8c4/autoencoder --data.path images.zip
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from autoencoding.autoencoder_config import AutoencodingConfig
from experiment.cli import one_line_errors, parse_run

if TYPE_CHECKING:
    from training.interruption import Interruption


def main(config: AutoencodingConfig) -> None:
    """Open the devices and the run's folder, and train."""
    from training.interruption import open_run

    with open_run(config) as run:
        train(*run)


def train(config: AutoencodingConfig, newest: Path | None, interruption: Interruption) -> None:
    """The whole of training, top to bottom."""
    import time

    import torch
    import yaml
    from tqdm import tqdm

    from autoencoding import saving
    from autoencoding.discriminator import PatchDiscriminator
    from autoencoding.image_stream import open_batches, open_held_out
    from autoencoding.losses import build_objective
    from autoencoding.model import Autoencoding, build_autoencoder, finish
    from autoencoding.optimizers import (
        autoencoder_optimizers,
        discriminator_optimizer,
        set_learning_rates,
    )
    from autoencoding.previews import draw_reconstructions, mean_psnr, pick
    from checkpoints.averages import EMA
    from checkpoints.checkpoint import current_commit
    from data import intake
    from machine.accelerator import from_main
    from machine.checkpoint_folder import to_resume
    from machine.whole_files import write_whole
    from training.curves import warns_only
    from training.guard import Guard, gradient_norm
    from training.interruption import Stopped
    from training.log import Log, is_due
    from training.meter import Meter
    from training.optimizer import learning_rate

    # Images, networks, optimizers.
    run, num_steps, accelerator = interruption.run, config.train.num_steps, interruption.accelerator
    device = accelerator.device
    batches = open_batches(config, accelerator.process_index, accelerator.num_processes)
    held_out = open_held_out(config)
    splits: dict[str, Any] = {"train": batches.sources[0], "test": held_out["images"]}
    identity = {split: images.describe() for split, images in splits.items()}
    if newest is not None:
        saving.check_identity(newest, identity)
    if accelerator.is_main_process:
        print(intake(batches.sources[0], held_out["images"]))
    autoencoder = build_autoencoder(config)
    model = Autoencoding(
        autoencoder, learned_variance=config.loss.learned_variance, decoder_only=config.decoder_only
    ).to(device)
    critic = PatchDiscriminator(
        channels=config.discriminator.channels,
        num_layers=config.discriminator.num_layers,
        norm=config.discriminator.norm,
    ).to(device)
    networks = {"autoencoder": model, "discriminator": critic}
    objective = build_objective(config.loss, config.discriminator, device)
    optimizers = autoencoder_optimizers(model, config.optim)
    critic_optimizer = discriminator_optimizer(critic, config.discriminator.lr)
    ema = EMA(model, config.train.ema_decay)
    prepared, prepared_critic = accelerator.prepare(model, critic)
    latent_shape = model.latent_shape(config.data.image_size)
    start = config.discriminator.start if config.discriminator.weight else num_steps
    if config.discriminator.weight and start >= num_steps:
        accelerator.print(
            f"--discriminator.start {start}: the discriminator never starts in {num_steps} steps; lower it, or set "
            "--discriminator.weight 0"
        )

    # A fresh run, or the newest whole checkpoint of an old one.
    guards, meter, step = {"autoencoder": Guard(), "discriminator": Guard("discriminator")}, Meter(), 0
    saved, inspected = -1, True

    def order() -> int:
        return sum(guard.rollbacks for guard in guards.values())

    def restore(folder: Path) -> int:
        nonlocal saved, inspected
        progress = saving.load(folder, ema, networks, {**optimizers, "discriminator": critic_optimizer})
        for name, guard in guards.items():
            guard.restore(progress["guards"][name])
        meter.restore(progress["meter"], accelerator)
        saved, inspected = progress["step"], progress.get("inspected", True)
        return saved

    def is_sound(*, last: bool = False) -> bool:
        return all(guard.may_save(accelerator, networks[name], last=last) for name, guard in guards.items())

    def save(*, last: bool = False, interval: dict | None = None) -> None:
        """By all processes; by the main one alone where it has the interval of all."""
        nonlocal saved
        if saved == step or (interval is None and not is_sound(last=last)):
            return
        state = {"meter": interval or meter.state(accelerator), "inspected": inspected}
        if accelerator.is_main_process:
            saving.save(
                run / "checkpoints",
                step=step,
                ema=ema,
                networks=networks,
                optimizers={**optimizers, "discriminator": critic_optimizer},
                progress={"guards": {name: guard.state() for name, guard in guards.items()}, **state},
                config=config,
                identity=identity,
                rotates=not any(guard.in_a_row for guard in guards.values()),
            )
        saved = step
        if interval is None:
            accelerator.wait_for_everyone()

    if newest is not None:
        step = restore(newest)
    if accelerator.is_main_process:
        write_whole(run / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))
    accelerator.wait_for_everyone()
    log = Log(run, accelerator, config.to_dict())
    log.truncate(step)
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    accelerator.print(
        f"{run.name}: {num_trained / 1e6:.1f}M parameters to train, latents {list(latent_shape)}, "
        f"{num_steps} steps on {accelerator.num_processes} x {device}"
    )

    def inspect() -> None:
        """Where it is broken off, a resumed run begins with it."""
        nonlocal inspected
        inspected, interval = False, meter.state(accelerator)
        sound = is_sound()
        with interruption.at_once(lambda: sound and save(interval=interval), can_save=accelerator.is_main_process):
            psnr = look() if accelerator.is_main_process else {}
        inspected = True
        if psnr:
            log.write(step, **psnr)

    def look() -> dict[str, float]:
        averaged = ema.model.autoencoder
        chosen = {name: pick(images, config.log.num_validation) for name, images in held_out.items()}
        psnr = {f"psnr_{name}": mean_psnr(averaged, images, batches.batch_size) for name, images in chosen.items()}
        path = run / "samples" / f"{step:08d}.png"
        with warns_only(path):
            draw_reconstructions(averaged, chosen, path)
            log.picture(step, path)
        return psnr

    # The loop.
    if not inspected and step < num_steps:
        inspect()
    reason = None
    progress = tqdm(initial=step, total=num_steps, desc=run.name, unit="step", disable=not accelerator.is_main_process)
    stream = meter.timed(batches(step, order()))
    while step < num_steps:
        factor = learning_rate(config.optim, step, num_steps) / config.optim.lr
        for optimizer in (*optimizers.values(), critic_optimizer):
            set_learning_rates(optimizer, factor)
        plays = step >= start
        images = next(stream)
        images = (images.to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)

        # The autoencoder: bound, perceptual distance, and what the discriminator thinks of it.
        with accelerator.autocast():
            coded = prepared(images, batches.noise(step, latent_shape, device))
        terms = objective.backward(accelerator, coded, images, model, critic if plays else None)
        norm = gradient_norm(accelerator, model, config.optim.grad_clip)
        if passed := guards["autoencoder"].passes(norm):
            for optimizer in optimizers.values():
                optimizer.step()
            ema.update(model, step)
        for optimizer in optimizers.values():
            optimizer.zero_grad()

        # The discriminator: images from their reconstructions.
        if plays:
            with accelerator.autocast():
                judged = objective.tell_apart(prepared_critic, images, coded.reconstruction.detach().float())
            accelerator.backward(judged["discriminator"].mean())
            if guards["discriminator"].passes(gradient_norm(accelerator, critic, config.discriminator.grad_clip)):
                critic_optimizer.step()
            critic_optimizer.zero_grad()
            terms |= judged

        meter.add(terms)
        if passed:
            meter.step(norm, config.optim.grad_clip, config.train.batch_size)
        else:
            meter.skip()
            log.write(step + 1, skipped=guards["autoencoder"].skipped, source_indices=batches.indices(step, order()))
        step += 1
        progress.update()
        reason = interruption.reason(step, num_steps)

        if is_due(step, config.log.every) or step in (start, num_steps):
            if means := meter.summary(accelerator):
                skipped = {f"skipped_{name}": guard.skipped for name, guard in guards.items() if guard.skipped}
                log.write(step, **means, **skipped, lr=factor * config.optim.lr, log_scale=model.log_scale.item())
                progress.set_postfix(loss=f"{means['loss']:.4f}", img_s=f"{means['images_per_second']:.0f}")
            meter.reset()
        if reason is not None and not any(guard.in_a_row for guard in guards.values()):
            inspected = not is_due(step, config.log.sample_every)
            break
        paused = time.perf_counter()
        if is_due(step, config.log.sample_every) and step < num_steps and reason is None:
            inspect()
        if is_due(step, config.log.checkpoint_every) and step < num_steps:
            save()
        meter.pause(time.perf_counter() - paused)
        if any(guard.must_roll_back(can=saved >= 0) for guard in guards.values()):
            step = restore(from_main(accelerator, lambda: to_resume(run)))
            stream = meter.timed(batches(step, order()))
            progress.reset(total=num_steps)
            progress.update(step)

    # The end: what was learned, in diffusers' format.
    progress.close()
    save(last=True)
    if reason is not None:
        raise Stopped(reason)
    accelerator.print(f"checkpoint:  {run}/checkpoints/{step:08d}")
    inspect()
    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    with interruption.at_once(lambda: None, can_save=True):
        finish(
            run / "autoencoder",
            ema.model.autoencoder,
            pick(batches.sources[0], 2048),
            {
                **{
                    f"psnr_{name}": mean_psnr(ema.model.autoencoder, pick(images, 1024), 64)
                    for name, images in held_out.items()
                },
                "steps": step,
                "config": config.to_dict(),
                "commit": current_commit(),
            },
            measure=not config.decoder_only,
            half=config.half,
        )
    print(f"autoencoder: {run}/autoencoder")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_run(AutoencodingConfig))
