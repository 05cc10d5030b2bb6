"""Exact backbones for known data distributions: the optimum that a training would converge to."""

import torch

from diffusion import EDM, FlowMatching, GaussianDiffusion
from diffusion.paths import Flow, VarianceExploding


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed))


def labels(num: int) -> torch.Tensor:
    return torch.zeros(num, dtype=torch.int64)


def own_input(diffusion, x, t):
    """Invert what a diffusion does to the backbone's inputs: returns its own `x_t` and `t`."""
    if isinstance(diffusion.path, Flow):
        return x, t / 999
    if isinstance(diffusion.path, VarianceExploding):
        low, high = (torch.tensor(sigma, dtype=torch.float64).log() for sigma in diffusion.path.noise_range)
        sigma = (low + t.double() / 999 * (high - low)).exp().to(x.dtype)
        return x * (sigma**2 + diffusion.path.sigma_data**2).sqrt()[:, None, None, None], sigma
    return x, t


def backbone(diffusion, posterior_mean):
    """Make the backbone whose predicted `x_0` is `posterior_mean(x_t, alpha, sigma, y)`."""

    def model(x, t, y):
        x_t, t = own_input(diffusion, x, t)
        at = diffusion.path.levels(t)
        x_0 = posterior_mean(x_t, at.alpha, at.sigma, y)
        return diffusion.target(x_0, (x_t - at.alpha * x_0) / at.sigma, t)

    return model


def gaussian_data(mean: float, std: float):
    """Posterior mean `E[x_0 | x_t]` of data N(mean, std^2)."""
    return lambda x_t, alpha, sigma, y: mean + std**2 * alpha / ((alpha * std) ** 2 + sigma**2) * (x_t - alpha * mean)


DIFFUSIONS = {
    "linear epsilon": lambda: GaussianDiffusion(variance="fixed_small"),
    "cosine v": lambda: GaussianDiffusion("cosine", prediction="v", variance="fixed_large"),
    "sigmoid x_0": lambda: GaussianDiffusion("sigmoid", prediction="x_0", variance="fixed_small"),
    "zero terminal SNR": lambda: GaussianDiffusion(prediction="v", variance="fixed_small", zero_terminal_snr=True),
    "linear flow": FlowMatching,
    "trigonometric flow": lambda: FlowMatching("trigonometric"),
    "shifted flow": lambda: FlowMatching(shift=3.0),
    "EDM": EDM,
}
