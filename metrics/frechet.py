"""The Fréchet distance between Gaussians, and running moments of features in constant memory."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from metrics.scores import Score, too_few


@dataclass(frozen=True)
class Moments:
    """Mean and unbiased covariance of features, in float64 on the CPU; `num` is None if a file does not state it."""

    mean: Float[Tensor, " d"]
    covariance: Float[Tensor, "d d"]
    num: int | None = None


class RunningMoments:
    """Moments of features that arrive in batches, by a numerically stable update (Chan, Golub and LeVeque 1979)."""

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
        total, delta = self.num + num, mean - self.mean
        self.scatter = self.scatter + scatter + torch.outer(delta, delta) * (self.num * num / total)
        self.num, self.mean = total, self.mean + delta * (num / total)

    @staticmethod
    def merged(parts: Iterable["RunningMoments"]) -> "RunningMoments":
        whole = RunningMoments()
        for part in parts:
            if part.num:
                whole._merge(part.num, part.mean, part.scatter)
        return whole

    def moments(self) -> Moments:
        """Return the moments so far; with fewer than two images the covariance is NaN."""
        divisor = self.num - 1 if self.num > 1 else float("nan")
        return Moments(self.mean, self.scatter / divisor, self.num)


def moments_of(features: Float[Tensor, "n d"]) -> Moments:
    running = RunningMoments()
    running.update(features)
    return running.moments()


def frechet_distance(a: Moments, b: Moments) -> float:
    """Compute `|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`, the squared Wasserstein-2 distance of two Gaussians
    (Heusel et al. 2017, eq. 6).

    The trace of the square root is the sum of the square roots of the eigenvalues of `R^T C_b R`, with `C_a = R R^T`.
    This matrix is symmetric, so its eigenvalues are real and accurate even if both covariances are singular. R has as
    many columns as the rank of C_a.
    """
    root = semidefinite_root(a.covariance)
    cross = torch.linalg.eigvalsh(root.T @ b.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(distance.item(), 0.0)  # rounding may make it negative for equal Gaussians


def semidefinite_root(matrix: Float[Tensor, "d d"]) -> Float[Tensor, "d r"]:
    """Factor a positive semidefinite matrix of rank r as `R R^T`, up to rounding, by a Cholesky decomposition with
    complete pivoting (Higham 2002, section 10.3)."""
    from scipy.linalg.lapack import dpstrf  # pyright: ignore[reportAttributeAccessIssue]

    factor, order, rank, _ = dpstrf(matrix.numpy(), lower=1)
    root = torch.empty(len(matrix), rank, dtype=matrix.dtype)
    root[torch.from_numpy(order).long() - 1] = torch.from_numpy(factor).tril()[:, :rank]
    return root


def frechet_score(samples: Moments, reference: Moments) -> float | Score:
    """Return the Fréchet distance, or no number if a set has fewer than two images and hence no covariance."""
    fewest = min(2 if moments.num is None else moments.num for moments in (samples, reference))
    return too_few(fewest, 2) if fewest < 2 else frechet_distance(samples, reference)


def extrapolated_distance(
    samples: Float[Tensor, "n d"], reference: Float[Tensor, "m d"], *, sizes: int = 15, seed: int = 0
) -> float | Score:
    """Extrapolate the distance to infinitely many samples (Chong and Forsyth 2020).

    The bias is proportional to 1 / N, so a line is fitted to the distances of random subsets against 1 / N and
    evaluated at 0. Subset sizes run from a tenth of the samples, or twice the number of features if that is more, to
    all samples. The bias due to the size of the reference stays.
    """
    num, num_features = samples.shape
    if num < 4 * num_features:
        return too_few(num, 4 * num_features)
    generator, reference_moments = torch.Generator().manual_seed(seed), moments_of(reference)
    subset_sizes = torch.linspace(max(num / 10, 2 * num_features), num, sizes).round().long().tolist()
    subsets = (samples[torch.randperm(num, generator=generator)[:size]] for size in subset_sizes)
    distances = [frechet_distance(reference_moments, moments_of(subset)) for subset in subsets]
    inverse = 1 / torch.tensor(subset_sizes, dtype=torch.float64)
    design = torch.stack([torch.ones_like(inverse), inverse], dim=1)
    intercept = torch.linalg.lstsq(design, torch.tensor(distances, dtype=torch.float64)[:, None]).solution[0]
    return max(intercept.item(), 0.0)
