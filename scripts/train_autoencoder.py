"""Train an AutoencoderKL with reconstruction, KL, perceptual and adversarial losses (Rombach et al. 2022, section 3.1).

python scripts/train_autoencoder.py --config configs/autoencoder/kl_f8c4.yaml --data.path images.zip
python scripts/train_autoencoder.py --resume runs/kl_f8c4
python train.py --autoencoder runs/kl_f8c4/autoencoder --data.path images.zip
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from autoencoder_training.autoencoder_config import AutoencodingConfig
from experiment.cli import one_line_errors, parse_run
from machine.stopping import exit_on_signal

if TYPE_CHECKING:
    from training.run import Run


def main(config: AutoencodingConfig) -> None:
    """Set up the run and train."""
    with exit_on_signal(config.folder):
        from training.run import open_run

    with open_run(config) as run:
        train(run)


def train(run: Run[AutoencodingConfig]) -> None:
    """Train an autoencoder: build everything from the configuration, start or resume the run, loop over its steps."""
    import torch

    from autoencoder_training.image_stream import open_batches, open_held_out
    from autoencoder_training.losses import build_discriminator, build_objective
    from autoencoder_training.model import Autoencoding, autoencoder_optimizers, build_autoencoder
    from autoencoder_training.previews import Previews
    from checkpoints.averages import EMA
    from checkpoints.training_state import TrainingState
    from data import summarize_splits
    from training.guard import Guard, gradient_norm
    from training.log import is_due
    from training.optimizer import Optimizers, learning_rate

    # Open the images, and build networks and optimizers.
    config, accelerator, num_steps = run.config, run.accelerator, run.config.train.num_steps
    device = accelerator.device
    batches, held_out = open_batches(config, accelerator), open_held_out(config, accelerator)
    run.check_identity(train=batches.sources[0].describe(), test=held_out["images"].describe())
    accelerator.print(summarize_splits(batches.sources[0], held_out["images"]))
    learned_variance, of_critic = config.loss.learned_variance, config.discriminator
    autoencoder = build_autoencoder(config, run.checkpoint)
    model = Autoencoding(autoencoder, learned_variance=learned_variance, decoder_only=config.decoder_only).to(device)
    critic, critic_optimizer = build_discriminator(of_critic, device)
    objective = build_objective(config.loss, of_critic, device)
    optimizers = autoencoder_optimizers(model, config.optim)
    all_optimizers = Optimizers(optimizers, discriminator=critic_optimizer)
    ema = EMA(model, config.train.ema_decay)
    prepared, prepared_critic = accelerator.prepare(model, critic)
    latent_shape = model.latent_shape(config.data.image_size)
    start = of_critic.start if of_critic.weight else num_steps
    if of_critic.weight and start >= num_steps:
        accelerator.print(
            f"--discriminator.start {start}: the discriminator never starts in {num_steps} steps; lower it, or set "
            "--discriminator.weight 0"
        )

    # Start the run, or resume it from its newest intact checkpoint.
    guard, critic_guard = Guard(), Guard("discriminator")
    previews = Previews(run, ema, held_out)
    named = {f"optimizer-{name}": optimizer for name, optimizer in all_optimizers.items()}
    state = TrainingState({"autoencoder": model, "discriminator": critic}, named, ema)
    guards = {"autoencoder": guard, "discriminator": critic_guard}
    run.begin(state, guards, previews.due, num_steps, autoencoder=json.loads(model.autoencoder.to_json_string()))
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    accelerator.print(
        f"{run.folder.name}: {num_trained / 1e6:.1f}M parameters to train, latents {list(latent_shape)}, "
        f"{num_steps} steps on {accelerator.num_processes} x {device}"
    )

    # Loop over the steps. Between two steps the run inspects, saves, rolls back after divergence, or stops.
    stream, order = iter(()), -1
    for step in run.steps():
        if order != run.rollbacks:
            order = run.rollbacks
            stream = run.meter.timed(batches(step, order))
        factor = learning_rate(config.optim, step, num_steps) / config.optim.lr
        all_optimizers.scale_learning_rates(factor)
        images = (next(stream).to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)

        # Update the autoencoder.
        with accelerator.autocast():
            coded = prepared(images, batches.noise(step, latent_shape, device))
        terms = objective.backward(accelerator, coded, images, model, critic if step >= start else None)
        norm = run.synchronize(gradient_norm(accelerator, model, config.optim.grad_clip))
        if is_finite := guard.passes(norm):
            optimizers.step()
            ema.update(model, step)
        optimizers.zero_grad()

        # Update the discriminator, which distinguishes images from their reconstructions.
        if step >= start:
            with accelerator.autocast():
                critic_terms = objective.discriminator_loss(
                    prepared_critic, images, coded.reconstruction.detach().float()
                )
            accelerator.backward(critic_terms["discriminator"].mean())
            if critic_guard.passes(run.synchronize(gradient_norm(accelerator, critic, of_critic.grad_clip))):
                critic_optimizer.step()
            critic_optimizer.zero_grad()
            terms |= critic_terms

        run.meter.add(terms)
        if is_finite:
            run.meter.step(norm, config.optim.grad_clip, config.train.batch_size)
        else:
            run.skip(guard, batches.indices(step, order))
        if is_due(step + 1, config.log.every) or step + 1 in (start, num_steps):
            skipped = {f"skipped_{name}": guard.skipped for name, guard in run.guards.items() if guard.skipped}
            run.log_means(**skipped, lr=factor * config.optim.lr, log_scale=model.log_scale.item())

    # Everything is saved by now; measure the averaged weights and export them.
    accelerator.print(f"checkpoint:  {run.folder}/checkpoints/{run.step:08d}")
    run.inspect(previews.draw)
    accelerator.end_training()
    if run.is_main:
        with run.interruption.interruptible(can_save=True):
            export(run, ema.model.autoencoder, batches.sources[0], held_out)


def export(run: Run[AutoencodingConfig], autoencoder: Any, images: Any, held_out: Mapping[str, Any]) -> None:
    """Write the autoencoder in diffusers' format, with its PSNR on held-out images. The scale and shift of its latents
    are measured on training images, unless only the decoder was trained."""
    from autoencoder_training.model import export_autoencoder
    from autoencoder_training.previews import reconstruction_psnr, select_images
    from checkpoints.checkpoint import current_commit

    config, folder, psnr = run.config, run.folder / "autoencoder", {}
    for name, dataset in held_out.items():
        values = reconstruction_psnr(autoencoder, select_images(dataset, 1024), 64)
        psnr |= {f"psnr_{name}": values.mean().item(), f"psnr_{name}_tenth": values.quantile(0.1).item()}
    metrics = {**psnr, "steps": run.step, "config": config.to_dict(), "commit": current_commit()}
    pixels, measure = select_images(images, 2048), not config.decoder_only
    export_autoencoder(folder, autoencoder, pixels, metrics, measure=measure, half=config.half)
    print(f"autoencoder: {folder}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_run(AutoencodingConfig))
