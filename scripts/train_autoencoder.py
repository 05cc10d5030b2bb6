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
from experiment.cli import parse_run, run_main
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

    from autoencoder_training.parts import build_parts
    from autoencoder_training.previews import Previews
    from checkpoints.training_state import TrainingState
    from training.guard import Guard, clip_gradients
    from training.log import end_training, is_due
    from training.optimizer import Optimizers, learning_rate

    config, accelerator, parts, num_steps = run.config, run.accelerator, build_parts(run), run.config.train.num_steps
    batches, objective, model, critic = parts.batches, parts.objective, parts.model, parts.critic
    all_optimizers = Optimizers(parts.optimizers, discriminator=parts.critic_optimizer)

    # Start the run, or resume it from its newest intact checkpoint.
    guard, critic_guard = Guard(), Guard("discriminator")
    previews = Previews(run, parts.ema, parts.held_out)
    named = {f"optimizer-{name}": optimizer for name, optimizer in all_optimizers.items()}
    state = TrainingState({"autoencoder": model, "discriminator": critic}, named, parts.ema)
    guards = {"autoencoder": guard, "discriminator": critic_guard}
    run.begin(state, guards, previews.due, num_steps, autoencoder=json.loads(model.autoencoder.to_json_string()))
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    latent_shape = model.latent_shape(config.data.image_size)
    accelerator.print(
        f"{run.folder.name}: {num_trained / 1e6:.1f}M parameters to train, latents {list(latent_shape)}, "
        f"{num_steps} steps on {accelerator.num_processes} x {accelerator.device}"
    )

    # Loop over the steps. Between two steps the run inspects, saves, rolls back after divergence, or stops.
    stream, order = iter(()), -1
    for step in run.steps():
        if order != run.rollbacks:
            order = run.rollbacks
            stream = run.meter.timed(batches(step, order))
        lr = learning_rate(config.optim, step, num_steps)
        all_optimizers.scale_learning_rates(lr / config.optim.lr)
        images = (next(stream).to(accelerator.device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)

        # Update the autoencoder.
        with accelerator.autocast():
            coded = parts.prepared(images, batches.noise(step, latent_shape, accelerator.device))
        terms = objective.backward(accelerator, coded, images, model, critic if step >= parts.start else None)
        norms = run.synchronize(clip_gradients(accelerator, model, config.optim.grad_clip))
        if is_finite := guard.passes(*norms):
            parts.optimizers.step()
            parts.ema.update(model, step)
        parts.optimizers.zero_grad()

        # Update the discriminator, which distinguishes images from their reconstructions.
        if step >= parts.start:
            with accelerator.autocast():
                critic_terms = objective.discriminator_loss(
                    parts.prepared_critic, images, coded.reconstruction.detach().float()
                )
            accelerator.backward(critic_terms["discriminator"].mean())
            critic_norms = clip_gradients(accelerator, critic, config.discriminator.grad_clip)
            if critic_guard.passes(*run.synchronize(critic_norms)):
                parts.critic_optimizer.step()
            parts.critic_optimizer.zero_grad()
            terms |= critic_terms

        run.meter.add(terms)
        if is_finite:
            run.meter.step(norms, config.optim.grad_clip, config.train.batch_size)
        else:
            run.skip(guard, batches.indices(step, order))
        if is_due(step + 1, config.log.every) or step + 1 in (parts.start, num_steps):
            skipped = {f"skipped_{name}": guard.skipped for name, guard in run.guards.items() if guard.skipped}
            run.log_means(**skipped, lr=lr, log_scale=model.log_scale.item())

    # Everything is saved by now; measure the averaged weights and export them.
    accelerator.print(f"checkpoint:  {run.folder}/checkpoints/{run.step:08d}")
    run.inspect(previews.draw)
    end_training(accelerator)
    if run.is_main:
        with run.interruption.interruptible(can_save=True):
            export(run, parts.ema.model.autoencoder, batches.sources[0], parts.held_out)


def export(run: Run[AutoencodingConfig], autoencoder: Any, images: Any, held_out: Mapping[str, Any]) -> None:
    """Write the autoencoder in diffusers' format, with its PSNR on held-out images. The scale and shift of its latents
    are measured on training images, unless only the decoder was trained."""
    from autoencoder_training.model import export_autoencoder
    from autoencoder_training.previews import reconstruction_psnr, select_images

    config, folder, psnr = run.config, run.folder / "autoencoder", {}
    for name, dataset in held_out.items():
        values = reconstruction_psnr(autoencoder, select_images(dataset, 1024), 64)
        psnr |= {f"psnr_{name}": values.mean().item(), f"psnr_{name}_tenth": values.quantile(0.1).item()}
    metrics = {**psnr, "steps": run.step, "config": config.to_dict(), "commit": run.metadata["commit"]}
    pixels, measure = select_images(images, 2048), not config.decoder_only
    export_autoencoder(folder, autoencoder, pixels, metrics, measure=measure, half=config.half)
    print(f"autoencoder: {folder}")


if __name__ == "__main__":
    run_main(main, AutoencodingConfig, read=parse_run)
