"""What a trainer and a sampler may ask of any diffusion, and what all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Float32, Int64, Shaped
from torch import Tensor

from diffusion.predictions import AtLevel, Level
from diffusion.spacings import spaced_times
from diffusion.times import Times
from diffusion.transition import Transition

Denoiser = Callable[..., Tensor]
"""A backbone, guided or not: a pure function of `(x_t [b c h w], t [b], y [b], **extras)`."""

Step = tuple[int | float, Transition]
"""A time at which a sampler calls the model, and the step from it to the next lower one."""

NOTHING: Mapping[str, Any] = MappingProxyType({})


class Prediction(NamedTuple):
    """The one currency between model and sampler: what a raw model output says of `x_t`."""

    x_0: Float[Tensor, "b c h w"]
    noise: Float[Tensor, "b c h w"]
    log_variance: Float[Tensor, "b c h w"] | None = None  # of the reverse step, where the model learns it

    def clipped(self, limit: float, x_t: Float[Tensor, "b c h w"], at: AtLevel) -> Prediction:
        """With `x_0` cut to what data can be, and the noise that this leaves."""
        x_0 = self.x_0.clamp(-limit, limit)
        return self._replace(x_0=x_0, noise=(x_t - at.alpha * x_0) / at.sigma)


class Auxiliary(NamedTuple):
    """A further term of the loss, of what the model says of the data."""

    name: str
    weight: float
    term: Callable[[Tensor, Tensor, Tensor], Tensor]  # (predicted x_0, x_0, y) -> [b]
    is_fixed: bool = True  # or it changes with training, so that its values at two steps do not compare


class Diffusion(ABC):
    """A path from data to noise, `x_t = alpha(t) x_0 + sigma(t) noise`, and the objective that goes with it.

    Times are the diffusion's own and grow with the noise: 0..T-1 of a Gaussian chain, [0, 1] of a flow, sigma of EDM.
    `precondition` maps them to what a backbone is given, which is 0..999 for all.
    """

    default_sampler: str
    default_spacing: str = "uniform"
    samplers: Mapping[str, Callable[..., Iterator[tuple[Tensor, Tensor]]]] = NOTHING  # its own, where no other fits
    prior_std: float = 1.0  # of `x_t` at the last time
    noise_range: tuple[float, float]  # of sigma / alpha, both finite and above 0
    max_time: int | float  # the last, where the noise is

    @abstractmethod
    def path(self, t: Shaped[Tensor, "*n"]) -> Level:
        """`alpha` and `sigma` at times `t`; they may lie on the CPU."""

    @abstractmethod
    def time_at(self, ratio: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The times at which sigma / alpha is `ratio`."""

    @abstractmethod
    def noise_rank(self, t: Shaped[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Where a time lies on the way from the least noise, 0, to the most, 1."""

    @abstractmethod
    def sample_timesteps(
        self, num: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Shaped[Tensor, " num"]:
        """Training times; the generator lies on `device`."""

    def times(self) -> Times:
        """What draws the times of training steps: by default `sample_timesteps`, each time as it comes."""
        return Times(self.sample_timesteps)

    @abstractmethod
    def timesteps(self, num_steps: int) -> Shaped[Tensor, " num_steps"]:
        """Evenly spread times for a sampler, ascending.

        Raises:
            ValueError: where the diffusion has not so many.
        """

    @abstractmethod
    def target(
        self, x_0: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], t: Shaped[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        """What a perfect model puts out for `x_t` made of this `x_0` and `noise`."""

    @abstractmethod
    def read(
        self, raw: Float[Tensor, "b c h w"], x_t: Float[Tensor, "b c h w"], at: AtLevel
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        """`x_0` and noise, off a raw output for `x_t`: the inverse of `target`."""

    def predict(
        self,
        output: Float[Tensor, "b c_out h w"],
        x_t: Float[Tensor, "b c h w"],
        t: Shaped[Tensor, " b"],
        transition: Transition | None = None,
    ) -> Prediction:
        """What a raw model output says of `x_t`; a variance is that of the step `transition` from `t`."""
        return Prediction(*self.read(output.to(x_t.dtype), x_t, self.levels(t) if transition is None else transition))

    def precondition(self, model: Denoiser) -> Denoiser:
        """The model as a function of the diffusion's own `x_t` and `t`."""
        return model

    def output_channels(self, in_channels: int) -> int:
        """Channels that the backbone has to put out for data of `in_channels`."""
        return in_channels

    def loss_weight(self, t: Shaped[Tensor, " b"]) -> Float32[Tensor, " b"]:
        """What the squared error of the output at `t` counts."""
        return torch.ones(t.shape, device=t.device)

    def reverse_std(self, prediction: Prediction, transition: Transition) -> Tensor:
        """Standard deviation of the noise that an ancestral step adds: by default the true posterior's."""
        return transition.posterior_std

    def levels(self, t: Shaped[Tensor, " b"]) -> Level:
        """`alpha` and `sigma` in float32 as `[b 1 1 1]` on `t`'s device."""
        return Level(*(rearrange(number.float().to(t.device), "b -> b 1 1 1") for number in self.path(t)))

    def q_sample(
        self, x_0: Float[Tensor, "b c h w"], t: Shaped[Tensor, " b"], noise: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, "b c h w"]:
        """`x_t`, a draw from `q(x_t | x_0)` by way of unit normal `noise`."""
        alpha, sigma = self.levels(t)
        return alpha * x_0 + sigma * noise

    def reverse_steps(self, num_steps: int, spacing: str | None = None) -> list[Step]:
        """The chain that a sampler walks down to the data.

        The numbers are float64 scalars on the CPU, which a device takes with its kernels' arguments.

        Raises:
            ValueError: for an unknown spacing, or more steps than the diffusion has.
        """
        times = spaced_times(self, num_steps, spacing or self.default_spacing)
        chain = Transition.chain(*self.path(times))
        return [(t, Transition(*row)) for t, row in zip(times.tolist(), zip(*chain, strict=True), strict=True)][::-1]

    def training_loss(
        self,
        model: Denoiser,
        x_0: Float[Tensor, "b c h w"],
        y: Int64[Tensor, " b"],
        *,
        t: Shaped[Tensor, " b"] | None = None,
        noise: Float[Tensor, "b c h w"] | None = None,
        generator: torch.Generator | None = None,
        auxiliary: Sequence[Auxiliary] = (),
    ) -> dict[str, Float32[Tensor, " b"]]:
        """Per-sample `loss`, which is to be minimised, and the terms that it is made of, all in float32.

        `t` and `noise` are drawn when not given, by a generator on `x_0`'s device. An `auxiliary` term counts as the
        signal's share `alpha^2 / (alpha^2 + sigma^2)` says (alpha-bar of a Gaussian chain), so that it acts where `x_0`
        can be predicted.
        """
        t, noise = self.draw(x_0, t, noise, generator)
        x_0 = x_0.float()
        x_t = self.q_sample(x_0, t, noise)
        output = self.precondition(model)(x_t, t, y).float()
        terms = self.terms(output, x_0, x_t, t, noise)
        if auxiliary:
            terms = with_auxiliary(terms, auxiliary, self.predict(output, x_t, t).x_0, x_0, y, self.signal_share(t))
        return terms

    def signal_share(self, t: Shaped[Tensor, " b"]) -> Float32[Tensor, " b"]:
        """`alpha^2 / (alpha^2 + sigma^2)`."""
        alpha, sigma = self.levels(t)
        return (alpha**2 / (alpha**2 + sigma**2)).flatten()

    def terms(
        self,
        output: Float[Tensor, "b c_out h w"],
        x_0: Float[Tensor, "b c h w"],
        x_t: Float[Tensor, "b c h w"],
        t: Shaped[Tensor, " b"],
        noise: Float[Tensor, "b c h w"],
    ) -> dict[str, Float32[Tensor, " b"]]:
        """The objective: `loss`, and `mse`, the squared error of the model's output."""
        mse = mean_per_sample((self.target(x_0, noise, t) - output).square())
        return {"loss": self.loss_weight(t) * mse, "mse": mse}

    def draw(
        self, x_0: Tensor, t: Tensor | None, noise: Tensor | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Times and noise for a batch, where they are not given."""
        if t is None:
            t = self.sample_timesteps(len(x_0), generator, x_0.device)
        if noise is None:
            noise = torch.randn(x_0.shape, generator=generator, device=x_0.device)
        return t, noise.float()


def with_auxiliary(
    terms: dict[str, Tensor], auxiliary: Sequence[Auxiliary], predicted: Tensor, x_0: Tensor, y: Tensor, share: Tensor
) -> dict[str, Tensor]:
    """The terms, and auxiliary ones of the predicted `x_0`, which count in `loss` with their weights and this share."""
    for each in auxiliary:
        terms = {**terms, each.name: share * each.term(predicted, x_0, y).float()}
        terms["loss"] = terms["loss"] + each.weight * terms[each.name]
    return terms


def mean_per_sample(values: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """The mean over everything but the batch."""
    return reduce(values, "b c h w -> b", "mean")
