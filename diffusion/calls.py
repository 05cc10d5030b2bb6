"""Calls of a backbone beside the one that is trained: in eval mode, and with and without labels."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.transition import Images, Labels, Output, Timesteps


@contextmanager
def eval_mode(*models: object) -> Iterator[None]:
    """A context in which models are in eval mode; afterwards each submodule is back in its own mode."""
    parts = [part for model in models if isinstance(model, nn.Module) for part in model.modules() if part.training]
    for part in parts:
        part.training = False
    try:
        yield
    finally:
        for part in parts:
            part.training = True


def num_classes_of(model: Any) -> int:
    """Return the backbone's number of classes, even if the backbone is wrapped."""
    return next(part.num_classes for part in model.modules() if hasattr(part, "num_classes"))


def with_and_without_label(
    model: Any, num_classes: int, x_t: Images, t: Timesteps, y: Labels, **extras: Any
) -> tuple[Output, Output]:
    """Return outputs with the labels and with the null label, by one call; extra tensors have a row per sample."""
    doubled = {name: torch.cat([value] * 2) if isinstance(value, Tensor) else value for name, value in extras.items()}
    null_label = torch.full_like(y, num_classes)
    output = model(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([y, null_label]), **doubled)
    labelled, unlabelled = output.chunk(2)
    return labelled, unlabelled
