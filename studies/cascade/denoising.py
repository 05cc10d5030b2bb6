"""Denoising autoencoder at a single noise level, `alpha x_0 + sigma noise`, sampled by repeated denoising."""

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from diffusion.diffusion import Diffusion, Step
from diffusion.paths import ProbabilityPath, check_num_steps
from diffusion.samplers.chain import Chain, Trajectory
from diffusion.transition import Images, Level, Timesteps, Transition


def iterated_denoising(chain: Chain, x_t: Images) -> Trajectory:
    """Sample by denoising and adding noise of the same level, in turn.

    If the model sampled from `p(x_0 | x_t)`, the stationary distribution of this Markov chain would be that of the data
    (Bengio et al. 2013, theorem 1). Ours predicts the mean instead, so samples are smoother.
    """
    for t, at in chain.steps:
        x_0 = chain.denoise(x_t, t, at).x_0
        x_t = at.alpha_next * x_0
        if at.sigma_next > 0:  # the last step adds no noise
            x_t = x_t + at.sigma_next * chain.draw_noise()
        yield x_t, x_0


class SingleLevel(ProbabilityPath):
    """Path with a single time, 0, and constant alpha and sigma."""

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
        """Alpha and sigma as images, made on the device of `t`, so that nothing is copied from the CPU."""
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
    """Denoising autoencoder (Vincent et al. 2008) that predicts `x_0`; with `alpha = 0` its input is pure noise."""

    def __init__(self, alpha: float = 1.0, sigma: float = 0.5) -> None:
        super().__init__(
            SingleLevel(alpha, sigma),
            "x_0",
            times=lambda num, generator, device: torch.zeros(num, dtype=torch.int64, device=device),
            default_sampler="iterated",
            samplers={"iterated": iterated_denoising},
        )

    def reverse_steps(self, num_steps: int, spacing: str | None = None) -> list[Step]:
        """Steps from the noise level to itself, the last one to the data; `spacing` has no effect."""
        times = self.path.timesteps(num_steps)
        noisy = self.path(times[0])
        data = Level(torch.ones_like(noisy.alpha), torch.zeros_like(noisy.sigma))
        ends = [noisy] * (len(times) - 1) + [data]
        return [(0, Transition.between(*noisy, *end)) for end in ends]
