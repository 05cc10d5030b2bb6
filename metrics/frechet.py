"""The Fréchet distance between Gaussians, and their moments taken in one pass, whatever the number of images."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from metrics.scores import Score, too_few


@dataclass(frozen=True)
class Moments:
    """Mean and unbiased covariance of features, in float64 on the CPU; `num` is None where a file did not say."""

    mean: Float[Tensor, " d"]
    covariance: Float[Tensor, "d d"]
    num: int | None = None


class RunningMoments:
    """Moments of features in batches, merged pairwise (Chan, Golub and LeVeque 1979), which keeps digits."""

    def __init__(self) -> None:
        self.num, self.mean, self.scatter = 0, torch.zeros(()), torch.zeros(())

    def update(self, features: Float[Tensor, "n d"]) -> None:
        if len(features):
            x = features.cpu().double()
            mean = x.mean(dim=0)
            self._merge(len(x), mean, (x - mean).T @ (x - mean))

    def _merge(self, num: int, mean: Tensor, scatter: Tensor) -> None:
        if self.num == 0:
            self.num, self.mean, self.scatter = num, mean, scatter
            return
        total, gap = self.num + num, mean - self.mean
        self.scatter = self.scatter + scatter + torch.outer(gap, gap) * (self.num * num / total)
        self.num, self.mean = total, self.mean + gap * (num / total)

    @staticmethod
    def merged(parts: Iterable["RunningMoments"]) -> "RunningMoments":
        whole = RunningMoments()
        for part in parts:
            if part.num:
                whole._merge(part.num, part.mean, part.scatter)
        return whole

    def moments(self) -> Moments:
        """Of what was taken in; the covariance of fewer than two images is not a number."""
        divisor = self.num - 1 if self.num > 1 else float("nan")
        return Moments(self.mean, self.scatter / divisor, self.num)


def moments_of(features: Float[Tensor, "n d"]) -> Moments:
    running = RunningMoments()
    running.update(features)
    return running.moments()


def frechet_distance(a: Moments, b: Moments) -> float:
    """`|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`, squared Wasserstein-2 of two Gaussians (Heusel et al. 2017,
    eq. 6). The root's trace is that of the eigenvalues of `R^T C_b R`, `C_a = R R^T`: symmetric, so they are real and
    exact to rounding even where both covariances are singular; of R only columns that are more than rounding count."""
    values, vectors = torch.linalg.eigh(a.covariance)
    known = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    root = vectors[:, known] * values[known].sqrt()
    cross = torch.linalg.eigvalsh(root.T @ b.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(distance.item(), 0.0)  # it rounds below zero where the two are equal


def frechet_score(samples: Moments, reference: Moments) -> float | Score:
    """The distance, where both sets have a covariance, which is singular with fewer images than features."""
    fewest = min(2 if one.num is None else one.num for one in (samples, reference))
    return too_few(fewest, 2) if fewest < 2 else frechet_distance(samples, reference)


def extrapolated_distance(
    samples: Float[Tensor, "n d"], reference: Float[Tensor, "m d"], *, sizes: int = 15, seed: int = 0
) -> float | Score:
    """The distance that endlessly many samples would have (Chong and Forsyth 2020): its bias falls as 1 / N, so that a
    line through the distances of random subsets over 1 / N ends in it. Subsets have a tenth of the samples, but twice
    as many as there are features, and more. The bias of the reference's number stays."""
    num, num_features = samples.shape
    if num < 4 * num_features:
        return too_few(num, 4 * num_features)
    generator, whole = torch.Generator().manual_seed(seed), moments_of(reference)
    numbers = torch.linspace(max(num / 10, 2 * num_features), num, sizes).round().long().tolist()
    subsets = (samples[torch.randperm(num, generator=generator)[:number]] for number in numbers)
    distances = [frechet_distance(whole, moments_of(subset)) for subset in subsets]
    inverse = 1 / torch.tensor(numbers, dtype=torch.float64)
    line = torch.stack([torch.ones_like(inverse), inverse], dim=1)
    found = torch.linalg.lstsq(line, torch.tensor(distances, dtype=torch.float64)[:, None]).solution
    return max(found[0].item(), 0.0)
