"""Assemble the training of a backbone from its configuration, for train.py and the learning-rate search."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch import nn

from autoencoders.codec import Codec
from checkpoints.checkpoint import warm_start
from data.image_set import ImageSet
from data.latents import LatentCache
from diffusion import Diffusion
from experiment.build import build_diffusion
from experiment.config import ExperimentConfig
from models import ModelSpec
from models.backbone import Backbone
from training.adapters import adapt
from training.alignment import open_alignment
from training.batches import Batches
from training.objective import Objective, build_auxiliary, clean_time, objective_class
from training.optimizer import Optimizers, build_optimizers
from training.preparation import compile_blocks, join_casts, recompute_blocks, share_batch_norms
from training.run import Run, open_run


def open_training(config: ExperimentConfig) -> AbstractContextManager[Run[ExperimentConfig]]:
    """Open the run of a backbone's training."""
    in_parts = objective_class(build_diffusion(config.diffusion)).trains_in_parts
    return open_run(config, in_parts=in_parts, grad_accumulation=config.train.grad_accumulation)


def build_backbone(run: Run[ExperimentConfig], spec: ModelSpec, classes: Sequence[str], codec: Codec) -> Backbone:
    """Create the backbone on the device or, if it is to be sharded, in main memory, from where FSDP moves it block by
    block. A new run with `init_from` starts from those weights."""
    config, accelerator = run.config, run.accelerator
    model = share_batch_norms(spec.build(), accelerator)
    if not accelerator.is_fsdp2:
        model = model.to(accelerator.device)
    if config.init_from and run.checkpoint is None:
        is_adapted = config.train.adapter is not None
        message = warm_start(
            model, config.init_from, classes, codec, accelerator, diffusion=config.diffusion, whole=is_adapted
        )
        accelerator.print(message)
    return model


def build_objective(
    run: Run[ExperimentConfig], model: Backbone, diffusion: Diffusion, codec: Codec, images: ImageSet
) -> tuple[Objective, LatentCache | None]:
    """Create the objective with its auxiliary terms and alignment, and open the features of the training images that
    the alignment needs."""
    alignment, features = open_alignment(run, model, images)
    device = run.accelerator.device
    auxiliary = build_auxiliary(run.config.auxiliary, model, codec, device, clean_time(diffusion))
    return objective_class(diffusion)(diffusion, auxiliary, alignment), features


def build_batches(
    run: Run[ExperimentConfig], cache: LatentCache, codec: Codec, objective: Objective, features: LatentCache | None
) -> Batches:
    """Create the batches of a training; this process gets its share of each."""
    accelerator = run.accelerator
    return Batches(
        cache,
        codec,
        objective,
        run.config.train,
        features,
        rank=accelerator.process_index,
        num_ranks=accelerator.num_processes,
        device=accelerator.device,
    )


def prepare(run: Run[ExperimentConfig], model: Backbone, objective: Objective) -> tuple[nn.Module, Optimizers]:
    """Prepare the model for training: adapter, recomputation, compilation, casts and distribution over processes.

    Returns:
        The model to call, and the optimizers.
    """
    config, accelerator = run.config, run.accelerator
    if config.train.adapter:
        accelerator.print(adapt(model, config.train, type(objective), accelerator))
    optimizers = build_optimizers(model, objective.heads, config.optim)
    if config.train.recompute:
        recompute_blocks(model, accelerator.device)
    if config.train.compile:
        compile_blocks(model)
    join_casts(model, config.train, accelerator)
    prepared, optimizers["optimizer"] = accelerator.prepare(model, optimizers["optimizer"])
    return prepared, optimizers
