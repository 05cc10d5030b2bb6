"""Flows whose model is told both ends of a step, and puts out the average velocity from one to the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from diffusion.diffusion import Auxiliary, Denoiser, Diffusion, mean_per_sample, with_auxiliary
from diffusion.paths import Flow
from diffusion.samplers import AVERAGES, SAMPLERS
from diffusion.times import Device, DrawTimes
from diffusion.transition import Images, Labels, Timesteps

LEAST_ERROR = 1e-3  # c of the adaptive weight (Geng et al. 2025, section 4.3)


class AverageVelocity(Diffusion, ABC):
    """A model of `u(x_t, r, t) = (x_t - x_r) / (t - r)`, by which a step of any length takes one call.

    For a share of a batch r is not t, and the model is held against a target of its own making. For all others r is t
    and this is flow matching: `u(x_t, t, t)` is the velocity, which is all that samplers but its own ask for.

    Args:
        path: linear.
        times: draws training times.
        sampler: its own, of `AVERAGES`.
        interval_share: of the samples for whom r is not t.
        adaptive_power: p of the weight `1 / (mse + c)^p`.
    """

    model_args = {"second_time": True}  # noqa: RUF012

    def __init__(
        self, path: Flow, *, times: DrawTimes, sampler: str, interval_share: float, adaptive_power: float
    ) -> None:
        samplers = {sampler: AVERAGES[sampler], **SAMPLERS}
        super().__init__(path, "velocity", times=times, default_sampler=sampler, samplers=samplers)
        self.interval_share, self.adaptive_power = interval_share, adaptive_power

    @abstractmethod
    def step_of(self, t: Timesteps, second: Timesteps) -> tuple[Timesteps, Timesteps]:
        """(r, t) of a step, by a training time and the second number that was drawn for it."""

    @abstractmethod
    def average_velocity(
        self, model: Denoiser, x_t: Images, r: Timesteps, t: Timesteps, y: Labels, v: Images, index: Int64[Tensor, " n"]
    ) -> Images:
        """What the model is held against: of samples at `index` the average velocity, of all others the velocity. `v`
        is that of each sample's own data and noise."""

    def precondition(self, model: Denoiser) -> Denoiser:
        """The model as a function of the path's own `x_t`, `t` and `r`, by default `t`."""
        told = super().precondition(model)

        def preconditioned(x_t: Tensor, t: Tensor, y: Tensor, *, r: Tensor | None = None, **extras: Any) -> Tensor:
            return told(x_t, t, y, r=self.path.told(x_t, t if r is None else r)[1], **extras)

        return preconditioned

    def draw_more(
        self, shape: Sequence[int], generator: torch.Generator | None = None, device: Device = "cpu"
    ) -> dict[str, Tensor]:
        """A second number for each sample, and whether it counts: for every so many in the order of the batch. That
        lies on the CPU, where it is known without waiting for the device how many these are."""
        places = torch.arange(shape[0] + 1, dtype=torch.float64)
        counts = (places * self.interval_share).floor().diff() > 0
        return {"second": self.draw_second(shape[0], generator, device), "counts": counts}

    def draw_second(self, num: int, generator: torch.Generator | None, device: Device) -> Tensor:
        """The second number: another training time."""
        return self.sample_timesteps(num, generator, device)

    def training_loss(
        self,
        model: Denoiser,
        x_0: Images,
        y: Labels,
        *,
        t: Timesteps | None = None,
        noise: Images | None = None,
        generator: torch.Generator | None = None,
        auxiliary: Sequence[Auxiliary] = (),
        second: Timesteps | None = None,
        counts: Bool[Tensor, " b"] | None = None,
    ) -> dict[str, Float32[Tensor, " b"]]:
        """Per sample `mse`, and `loss`, which is it times the adaptive weight. Auxiliary terms are of those samples for
        whom r is t, as no other output tells the data."""
        t, noise = self.draw(x_0, t, noise, generator)
        if second is None or counts is None:
            second, counts = self.draw_more(x_0.shape, generator, x_0.device).values()
        apart = counts.nonzero().flatten().to(x_0.device, non_blocking=True)
        r, later = self.step_of(t[apart], second[apart])
        r, t = t.index_copy(0, apart, r), t.index_copy(0, apart, later)

        x_0 = x_0.float()
        x_t, v = self.q_sample(x_0, t, noise), self.target(x_0, noise, t)
        some = apart if len(apart) else apart.new_zeros(1)  # so that all processes call the model as often
        target = self.average_velocity(model, x_t, r, t, y, v, some)
        output = self.precondition(model)(x_t, t, y, r=r).float()
        mse = mean_per_sample((target - output).square())
        terms = {"loss": mse / (mse.detach() + LEAST_ERROR) ** self.adaptive_power, "mse": mse}
        if auxiliary:
            share = self.signal_share(t) * (r == t)
            terms = with_auxiliary(terms, auxiliary, self.predict(output, x_t, t).x_0, x_0, y, share)
        return terms

    def with_and_without_label(
        self, model: Denoiser, x_t: Images, r: Timesteps, t: Timesteps, y: Labels
    ) -> tuple[Images, Images]:
        """The model's average velocities, of a batch of twice the size."""
        told = torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, num_classes_of(model))])
        labelled, unlabelled = self.precondition(model)(*told, r=torch.cat([r, r])).to(x_t.dtype).chunk(2)
        return labelled, unlabelled


def num_classes_of(model: Any) -> int:
    """The backbone's, whatever it is wrapped in."""
    return next(part.num_classes for part in model.modules() if hasattr(part, "num_classes"))


def over_images(numbers: Timesteps) -> Tensor:
    return rearrange(numbers, "b -> b 1 1 1")
