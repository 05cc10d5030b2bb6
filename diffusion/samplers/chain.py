"""What every sampler is given: the steps to take, and the model as a denoiser."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from diffusion.diffusion import Diffusion, Prediction, Step

Moments = Iterator[tuple[Tensor, Tensor]]
"""(x_t, predicted x_0) after each step."""


@dataclass(frozen=True)
class Chain:
    """The way from noise to data.

    Args:
        steps: each time, noisiest first, and the step from it to the next one; the last leads to the data.
        denoise: of (x_t, time, step): calls the model, guided; keywords are passed on to it.
        draw_noise: unit normal noise, fresh at each call.
    """

    diffusion: Diffusion
    steps: Sequence[Step]
    denoise: Callable[..., Prediction]
    draw_noise: Callable[[], Tensor]
