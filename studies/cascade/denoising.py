"""Denoising at a single level of noise, `alpha x_0 + sigma noise`: data are drawn by denoising again and again."""

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from diffusion.diffusion import Chain, Diffusion, Moments, Step
from diffusion.paths import Path, check_num_steps
from diffusion.transition import Images, Level, Timesteps, Transition


def iterated(chain: Chain, x_t: Images) -> Moments:
    """Denoised, then noised to the same level again: a Markov chain whose stationary distribution is the data's where
    the model draws from `p(x_0 | x_t)` (Bengio et al. 2013, theorem 1). Ours gives the mean, so it smooths."""
    for t, at in chain.steps:
        x_0 = chain.denoise(x_t, t, at).x_0
        x_t = at.alpha_next * x_0
        if at.sigma_next > 0:  # the last step leaves what was denoised
            x_t = x_t + at.sigma_next * chain.draw_noise()
        yield x_t, x_0


class SingleLevel(Path):
    """The same alpha and sigma at the only time, 0."""

    max_time = 0

    def __init__(self, alpha: float, sigma: float) -> None:
        if not sigma > 0:
            raise ValueError(f"--diffusion.sigma {sigma} must be above 0")
        self.alpha, self.sigma = alpha, sigma
        self.noise_range = (sigma / alpha, sigma / alpha) if alpha else (torch.inf, torch.inf)

    def __call__(self, t: Shaped[Tensor, "*n"]) -> Level:
        ones = torch.ones(t.shape, dtype=torch.float64)
        return Level(self.alpha * ones, self.sigma * ones)

    def levels(self, t: Timesteps) -> Level:
        """Without a transfer from the CPU."""
        ones = torch.ones(len(t), 1, 1, 1, device=t.device)
        return Level(self.alpha * ones, self.sigma * ones)

    def time_at(self, ratio: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return torch.zeros_like(ratio)

    def noise_rank(self, t: Shaped[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return torch.zeros(t.shape, device=t.device)

    def timesteps(self, num_steps: int) -> Int64[Tensor, " num_steps"]:
        check_num_steps(num_steps)
        return torch.zeros(num_steps, dtype=torch.int64)

    def model_inputs(self, x_t: Images, t: Timesteps) -> tuple[Images, Timesteps]:
        return x_t, t


class Denoising(Diffusion):
    """A denoising autoencoder (Vincent et al. 2008), by the squared error of `x_0`; of pure noise if `alpha = 0`."""

    def __init__(self, alpha: float = 1.0, sigma: float = 0.5) -> None:
        super().__init__(
            SingleLevel(alpha, sigma),
            "x_0",
            times=lambda num, generator, device: torch.zeros(num, dtype=torch.int64, device=device),
            default_sampler="iterated",
            samplers={"iterated": iterated},
        )

    def reverse_steps(self, num_steps: int, spacing: str | None = None) -> list[Step]:
        """From the level to itself, and at last to the data; there is nothing to space."""
        times = self.path.timesteps(num_steps)
        here = self.path(times[0])
        data = Level(torch.ones_like(here.alpha), torch.zeros_like(here.sigma))
        ends = [here] * (len(times) - 1) + [data]
        return [(0, Transition.between(*here, *end)) for end in ends]
