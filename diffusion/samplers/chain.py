"""What a sampler is given: the steps from noise to data, and the functions that it needs for them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from diffusion.diffusion import Diffusion, Prediction, Step

Trajectory = Iterator[tuple[Tensor, Tensor]]
"""(x_t, predicted x_0) after each step."""


@dataclass(frozen=True)
class Chain:
    """The sequence of steps from noise to data that a sampler runs, and the functions that it needs for them.

    Args:
        steps: times, noisiest first, each with the transition to the next; the last leads to the data.
        denoise: `(x_t, t, transition, **extras) -> Prediction`, by the guided model; extras are passed on to it.
        draw_noise: returns fresh unit normal noise at each call.
    """

    diffusion: Diffusion
    steps: Sequence[Step]
    denoise: Callable[..., Prediction]
    draw_noise: Callable[[], Tensor]
