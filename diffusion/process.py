"""What a trainer and a sampler may ask of any diffusion process."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A backbone, guided or not: a pure function of `(x_t [b c h w], t [b], y [b])`."""


class Prediction(NamedTuple):
    """The one currency between model and sampler: what a raw model output says of `x_t`."""

    x_0: Float[Tensor, "b c h w"]
    noise: Float[Tensor, "b c h w"]
    log_variance: Float[Tensor, "b c h w"] | None = None  # of the reverse step, where the model learns it


@runtime_checkable
class Process(Protocol):
    """A coupling of data and noise over time, and the objective that goes with it.

    Times are those that the backbone is given; a process maps its own to them.
    """

    def output_channels(self, in_channels: int) -> int:
        """Channels that the backbone has to put out for data of `in_channels`."""
        ...

    def sample_timesteps(
        self, num: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Training times [num]."""
        ...

    def training_loss(
        self,
        model: Denoiser,
        x_0: Tensor,
        y: Tensor,
        *,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Per-sample terms [b]: `loss`, which is to be minimised, and what it is made of."""
        ...

    def timesteps(self, num_steps: int) -> Tensor:
        """The times [num_steps] at which a sampler calls the model, ascending."""
        ...

    def predict(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """What a raw model output says of `x_t`."""
        ...
