"""What a trainer and a sampler may ask of any diffusion process."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Generator, Tensor, device


Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A backbone, guided or not: a pure function of `(x_t, t, y)`."""


class Prediction(NamedTuple):
    """The one currency between model and sampler: what a raw model output says of `x_t`."""

    x_0: Float[Tensor, "b c h w"]
    noise: Float[Tensor, "b c h w"]
    log_variance: Float[Tensor, "b c h w"] | None  # of the reverse step, where the model learns it


@runtime_checkable
class Process(Protocol):
    """Couples data and noise over time; knows the model only as a callable."""

    num_timesteps: int

    def output_channels(self, channels: int) -> int:
        """Channels that the backbone has to put out for data of `channels`."""
        ...

    def sample_timesteps(self, num: int, *, generator: Generator | None, device: device | str) -> Tensor:
        """Training times [num] in the form that the backbone takes them."""
        ...

    def training_loss(
        self,
        model: Denoiser,
        x_0: Tensor,
        y: Tensor,
        *,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        generator: Generator | None = None,
    ) -> dict[str, Tensor]:
        """Per-sample terms [b]: `loss`, which is to be minimised, and what it is made of."""
        ...
