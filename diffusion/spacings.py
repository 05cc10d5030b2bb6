"""Spacings of a sampler's times, each a function `(path, num_steps) -> ascending times`."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from diffusion.paths import ProbabilityPath

RHO = 7  # Karras et al. 2022, table 1


def spaced_times(path: ProbabilityPath, num_steps: int, spacing: str) -> Shaped[Tensor, " num_steps"]:
    """Return ascending times by the name of a spacing or a file of noise levels; one step starts at the last time."""
    path.timesteps(num_steps)  # validates num_steps, for all spacings
    if num_steps == 1:
        return torch.tensor([path.max_time])
    if spacing in SPACINGS:
        return SPACINGS[spacing](path, num_steps)
    if Path(spacing).is_file():
        return times_at_ratios(path, interpolate(read_table(spacing), num_steps))
    raise ValueError(f"--spacing {spacing}: unknown, choose from {', '.join(SPACINGS)}, or a text file of noise levels")


def uniform(path: ProbabilityPath, num_steps: int) -> Shaped[Tensor, " num_steps"]:
    """Space times evenly; in a discrete chain both ends are included."""
    return path.timesteps(num_steps)


def trailing(path: ProbabilityPath, num_steps: int) -> Shaped[Tensor, " num_steps"]:
    """Space times evenly from the last time down to the data (Lin et al. 2023, table 2)."""
    last = path.max_time
    fraction = torch.arange(1, num_steps + 1, dtype=torch.float64) / num_steps
    if isinstance(last, int):  # a discrete chain, whose time 0 is one step from the data
        return (fraction * (last + 1)).round().long() - 1
    return fraction * last


def quadratic(path: ProbabilityPath, num_steps: int) -> Float[Tensor, " num_steps"]:
    """Space square roots of the time evenly (Song et al. 2021, appendix D.2): denser near the data."""
    low = path.time_at(torch.tensor(path.noise_range[0], dtype=torch.float64))
    root = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    return low + (path.max_time - low) * root**2


def karras(path: ProbabilityPath, num_steps: int) -> Float[Tensor, " num_steps"]:
    """Space `(sigma / alpha)^(1 / rho)` evenly, with rho = 7 (Karras et al. 2022, eq. 5)."""
    low, high = (ratio ** (1 / RHO) for ratio in path.noise_range)
    return times_at_ratios(path, torch.linspace(low, high, num_steps, dtype=torch.float64) ** RHO)


def log_snr(path: ProbabilityPath, num_steps: int) -> Float[Tensor, " num_steps"]:
    """Space `log(sigma / alpha)` evenly (Lu et al. 2022a, section 3.4)."""
    low, high = (math.log(ratio) for ratio in path.noise_range)
    return times_at_ratios(path, torch.linspace(low, high, num_steps, dtype=torch.float64).exp())


SPACINGS: dict[str, Callable[[ProbabilityPath, int], Tensor]] = {
    spacing.__name__: spacing for spacing in (uniform, trailing, quadratic, karras, log_snr)
}


def times_at_ratios(path: ProbabilityPath, ratios: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Convert ascending ratios sigma / alpha to times; the last becomes the path's, where it may be infinite."""
    low, high = path.noise_range
    times = path.time_at(ratios.clamp(low, high)).double()
    times[-1] = path.max_time
    return times


def read_table(path: str) -> Float[Tensor, " n"]:
    """Read noise levels sigma / alpha from a text file, in either order, and sort them; a 0 for the data is dropped."""
    try:
        numbers = sorted({float(word) for word in Path(path).read_text().replace(",", " ").split()} - {0.0})
    except ValueError as error:
        raise ValueError(f"--spacing {path}: not a list of numbers ({error})") from None
    if len(numbers) < 2 or numbers[0] < 0 or not math.isfinite(sum(numbers)):
        raise ValueError(f"--spacing {path}: needs two or more different positive noise levels sigma / alpha")
    return torch.tensor(numbers, dtype=torch.float64)


def interpolate(levels: Float[Tensor, " n"], num_steps: int) -> Float[Tensor, " num_steps"]:
    """Interpolate a table of noise levels log-linearly to another number of steps (Sabour et al. 2024, section 4)."""
    position = torch.linspace(0, len(levels) - 1, num_steps, dtype=torch.float64)
    below = position.long().clamp(max=len(levels) - 2)
    return torch.lerp(levels.log()[below], levels.log()[below + 1], position - below).exp()
