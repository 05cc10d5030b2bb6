"""The parts of an autoencoder's training, built from its configuration."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autoencoder_training.autoencoder_config import AutoencodingConfig
from autoencoder_training.image_stream import ImageBatches, open_batches, open_held_out
from autoencoder_training.losses import AutoencoderObjective, PatchDiscriminator, build_discriminator, build_objective
from autoencoder_training.model import Autoencoding, autoencoder_optimizers, build_autoencoder
from checkpoints.averages import EMA
from data import summarize_splits
from training.optimizer import Optimizers
from training.run import Run


@dataclass(frozen=True)
class Parts:
    """What a training consists of."""

    batches: ImageBatches
    held_out: dict[str, Any]  # data sets by name
    objective: AutoencoderObjective
    model: Autoencoding
    prepared: nn.Module  # the model as Accelerate wraps it
    optimizers: Optimizers
    ema: EMA
    critic: PatchDiscriminator
    prepared_critic: nn.Module
    critic_optimizer: torch.optim.Optimizer
    start: int  # step from which the discriminator is trained


def build_parts(run: Run[AutoencodingConfig]) -> Parts:
    """Open the images, and build networks and optimizers."""
    config, accelerator, num_steps = run.config, run.accelerator, run.config.train.num_steps
    device, of_critic, learned_variance = accelerator.device, config.discriminator, config.loss.learned_variance
    batches, held_out = open_batches(config, accelerator), open_held_out(config, accelerator)
    run.check_identity(train=batches.sources[0].describe(), test=held_out["images"].describe())
    accelerator.print(summarize_splits(batches.sources[0], held_out["images"]))
    autoencoder = build_autoencoder(config, run.checkpoint)
    model = Autoencoding(autoencoder, learned_variance=learned_variance, decoder_only=config.decoder_only).to(device)
    critic, critic_optimizer = build_discriminator(of_critic, device)
    objective = build_objective(config.loss, of_critic, device)
    optimizers, ema = autoencoder_optimizers(model, config.optim), EMA(model, config.train.ema_decay)
    start = of_critic.start if of_critic.weight else num_steps
    if of_critic.weight and start >= num_steps:
        accelerator.print(
            f"--discriminator.start {start}: the discriminator never starts in {num_steps} steps; lower it, or set "
            "--discriminator.weight 0"
        )
    prepared, prepared_critic = accelerator.prepare(model, critic)
    trained, trained_critic = (model, prepared, optimizers, ema), (critic, prepared_critic, critic_optimizer)
    return Parts(batches, held_out, objective, *trained, *trained_critic, start)
