"""Assemble the training of a backbone from its configuration, for train.py and the learning-rate search."""

from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy

from autoencoders.codec import Codec, create_codec
from checkpoints.warm_start import changes_of_meaning, warm_start
from data.image_set import ImageSet
from data.latents import LatentCache
from diffusion import Diffusion
from experiment.build import build_diffusion, model_spec, open_cache, open_split
from experiment.config import ExperimentConfig
from machine.sharded_building import build_in_shards, place_shards, weights_of
from models import ModelSpec
from models.backbone import Backbone
from models.compilation import compile_blocks
from training.adapters import adapt
from training.alignment import open_alignment
from training.batches import Batches
from training.objective import Objective, build_auxiliary, clean_time, objective_class
from training.optimizer import Optimizers, build_optimizers
from training.preparation import fuse_casts_where_useful, recompute_blocks, share_batch_norms
from training.run import Run, open_run


def open_training(config: ExperimentConfig) -> AbstractContextManager[Run[ExperimentConfig]]:
    in_parts = objective_class(build_diffusion(config.diffusion)).trains_in_parts
    return open_run(config, in_parts=in_parts, grad_accumulation=config.train.grad_accumulation)


class Task(NamedTuple):
    """What a backbone is trained for, and the specification that follows from it."""

    diffusion: Diffusion
    codec: Codec
    images: ImageSet
    spec: ModelSpec


def open_task(run: Run[ExperimentConfig]) -> Task:
    """Open the training images and the autoencoder. Raises ValueError for settings that do not fit each other."""
    config, accelerator = run.config, run.accelerator
    diffusion, codec = build_diffusion(config.diffusion), create_codec(config.autoencoder).to(accelerator.device)
    images: ImageSet = open_split(config.data, "train", accelerator)
    return Task(diffusion, codec, images, model_spec(config, codec, diffusion, len(images.classes)))


def build_backbone(run: Run[ExperimentConfig], task: Task) -> Backbone:
    """Create the backbone, or this process's shards, on the device; a new run starts from `init_from`."""
    config, accelerator = run.config, run.accelerator
    model = share_batch_norms(_shards_of(task.spec, accelerator) or task.spec.build(), accelerator)
    if not accelerator.is_fsdp2:
        model = model.to(accelerator.device)
    if config.init_from and run.checkpoint is None:
        source, is_adapted = config.init_from, config.train.adapter is not None
        report = warm_start(model, source, task.images.classes, accelerator, whole=is_adapted)
        warnings = changes_of_meaning(source, task.codec, config.diffusion, accelerator)
        accelerator.print("; ".join([report, *warnings]))
    return model


def _shards_of(spec: ModelSpec, accelerator: Accelerator) -> Backbone | None:
    """Build the backbone in shards, if FSDP divides it among all processes."""
    if not accelerator.is_fsdp2 or accelerator.torch_device_mesh is not None:
        return None
    random_state = torch.get_rng_state()
    try:
        return build_in_shards(spec.build, init_device_mesh(accelerator.device.type, (accelerator.num_processes,)))
    except (RuntimeError, AssertionError) as error:  # FreedWeightError, or what else a whole build may not raise
        torch.set_rng_state(random_state)
        accelerator.print(f"--model {spec.name} is first built whole, in the main memory of each process ({error})")
        return None


def build_objective(run: Run[ExperimentConfig], task: Task, model: Backbone) -> tuple[Objective, LatentCache | None]:
    """Create the objective, and open the features of the training images that its alignment needs."""
    diffusion, device = task.diffusion, run.accelerator.device
    alignment, features = open_alignment(run, model, task.images)
    auxiliary = build_auxiliary(run.config.auxiliary, model, task.codec, device, clean_time(diffusion))
    return objective_class(diffusion)(diffusion, auxiliary, alignment), features


def build_batches(
    run: Run[ExperimentConfig], task: Task, objective: Objective, features: LatentCache | None
) -> Batches:
    """Open the encoded images, and create the training batches; this process gets its part of each."""
    config, accelerator = run.config, run.accelerator
    cache = open_cache(config.data, task.codec, task.images, accelerator, flips=config.data.flip)
    ranks = accelerator.process_index, accelerator.num_processes
    return Batches(cache, task.codec, objective, config.train, features, *ranks, accelerator.device)


def prepare(run: Run[ExperimentConfig], model: Backbone, objective: Objective) -> tuple[nn.Module, Optimizers]:
    """Prepare for training: adapter, recomputation, compilation, casts, processes; return model and optimizers."""
    config, accelerator = run.config, run.accelerator
    if config.train.adapter:
        accelerator.print(adapt(model, config.train, type(objective), accelerator))
    optimizers = build_optimizers(model, objective.heads, config.optim)
    if config.train.recompute:
        recompute_blocks(model, accelerator.device)
    if config.train.compile:
        compile_blocks(model, flag="--train.compile")
    fuse_casts_where_useful(model, config.train, accelerator)
    weights, fsdp = weights_of(model), getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp is not None and isinstance(fsdp.cpu_offload, CPUOffloadPolicy):  # as FSDP then has them
        weights = {name: weight.cpu() for name, weight in weights.items()}
    prepared, optimizers["optimizer"] = accelerator.prepare(model, optimizers["optimizer"])
    place_shards(prepared, weights)
    return prepared, optimizers
