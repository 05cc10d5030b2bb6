"""What every sampler is given: the steps to take, and the model as a denoiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.diffusion import Diffusion, Prediction, Step
from diffusion.transition import Transition

Moments = Iterator[tuple[Tensor, Tensor]]
"""(x_t, predicted x_0) after each step."""


@dataclass(frozen=True)
class Chain:
    """The way from noise to data.

    Args:
        steps: each time, noisiest first, and the step from it to the next one; the last leads to the data.
        denoise: of (x_t, time, step): calls the model.
        draw_noise: unit normal noise, fresh at each call.
        eta: randomness of DDIM.
        churn: of EDM's sampler, over the whole chain.
    """

    diffusion: Diffusion
    steps: Sequence[Step]
    denoise: Callable[[Tensor, int | float, Transition], Prediction]
    draw_noise: Callable[[], Tensor]
    eta: float = 0.0
    churn: float = 0.0

    def churned(self, x_t: Tensor, t: int | float, at: Transition) -> tuple[Tensor, int | float, Transition]:
        """Noise added, and the step that leads from there (Karras et al. 2022, algorithm 2, lines 4 to 6, S_noise = 1):
        sigma / alpha rises by the share `churn / num_steps`, at most sqrt(2) - 1, as far as the diffusion goes."""
        ratio = (at.sigma / at.alpha).item()
        raised = ratio * (1 + min(self.churn / len(self.steps), math.sqrt(2) - 1))
        raised = min(raised, self.diffusion.noise_range[1])
        if raised <= ratio:
            return x_t, t, at
        time = self.diffusion.time_at(torch.tensor([raised], dtype=torch.float64))[0]
        alpha, sigma = (number[0] for number in self.diffusion.path(time[None]))  # scalars leave x_t in its precision
        x_t = alpha / at.alpha * x_t + alpha * math.sqrt(raised**2 - ratio**2) * self.draw_noise()
        return x_t, time.item(), Transition.between(alpha, sigma, at.alpha_next, at.sigma_next)
