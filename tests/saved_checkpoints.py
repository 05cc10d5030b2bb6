"""A small backbone, and a checkpoint of a training of one step."""

import torch

from checkpoints.averages import EMA
from checkpoints.checkpoint import make_metadata
from checkpoints.training_state import TrainingState, copy_checkpoint
from experiment.config import ExperimentConfig, OptimConfig
from machine.checkpoint_folder import checkpoint_path, rotate
from models import ModelSpec
from training.guard import Guard
from training.optimizer import build_optimizer

SPEC = ModelSpec("DiT", {"dim": 16, "depth": 2, "num_heads": 2}, (4, 4), 4, 8, 3)


def objects(spec=SPEC):
    torch.manual_seed(0)
    model = spec.build()
    return model, EMA(model, 0.9), build_optimizer(model, OptimConfig())


def train_a_step(model, ema, optimizer):
    output = model(torch.randn(2, 4, 4, 4), torch.tensor([1, 2]), torch.tensor([0, 3]))
    (output - 1).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    ema.update(model, 0)


IDENTITY = {"codec": {"sha256": "c"}, "train": {"source": "a.zip", "split": "train-1"}, "test": {"split": "test-1"}}


def state(model, ema, optimizer, **others):
    return TrainingState({"model": model}, {"optimizer": optimizer}, ema, others)


def save(folder, step, *trained, keep=2, keep_every=0):
    metadata = make_metadata(ExperimentConfig(), step, IDENTITY, spec=SPEC, classes=["a", "b", "c"])
    training = state(*trained, **{"guard.model": Guard(skipped=3)})
    copy_checkpoint(folder, step, training, metadata, training.progress())()
    rotate(folder, keep=keep, keep_every=keep_every)
    return checkpoint_path(folder, step)


def save_trained(folder):
    """Save a checkpoint after the first step, and return it with what was trained."""
    trained = objects()
    train_a_step(*trained)
    return save(folder / "run" / "checkpoints", 1, *trained), trained
