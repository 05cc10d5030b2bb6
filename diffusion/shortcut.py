"""Shortcut models: a flow's average velocity, of a step as two steps of half its length."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from diffusion.average_velocity import AverageVelocity, over_images
from diffusion.diffusion import Denoiser
from diffusion.options import SamplingOptions
from diffusion.paths import Flow
from diffusion.samplers import evaluating
from diffusion.times import Device, DrawTimes
from diffusion.transition import Images, Labels, Timesteps


class Shortcut(AverageVelocity):
    """Steps of 1, 1/2, 1/4, ... of the path (Frans et al. 2024), each of which leads where two of half its length do:
    `u(x_t, r, t) = (u(x_t, m, t) + u(x_m, r, m)) / 2`, m the middle, is what the model is held against (section 3.2).
    Both halves are its own, without gradients. Halves of the shortest step are Euler's, by the velocity.

    Guidance is trained: it is that of the velocity in these, so that all steps have it and the velocity itself has not.

    Args:
        path: linear.
        times: draws training times, which fall into the intervals of the grid.
        interval_share: as in `AverageVelocity`.
        adaptive_power: as in `AverageVelocity`.
        sections: the path's, a power of two: as many as Euler's steps in place of all.
        guidance_scale: 1 is none.
    """

    def __init__(
        self,
        path: Flow,
        *,
        times: DrawTimes,
        interval_share: float,
        adaptive_power: float,
        sections: int,
        guidance_scale: float,
    ) -> None:
        if sections < 2 or not is_power_of_two(sections):
            raise ValueError(f"--diffusion.sections {sections} must be a power of two, such as 128")
        shares = {"interval_share": interval_share, "adaptive_power": adaptive_power}
        super().__init__(path, times=times, sampler="shortcut", **shares)
        self.sections, self.guidance_scale = sections, guidance_scale
        if guidance_scale != 1:
            self.guided_samplers, self.guidance_settings = ("shortcut",), "guidance_scale"

    def check_options(self, options: SamplingOptions) -> None:
        """Of its own sampler: steps of lengths that are trained, or shorter ones, which are taken for the shortest."""
        if (options.sampler or self.default_sampler) != "shortcut":
            return
        most = self.sections // 2
        if options.num_steps < most and not is_power_of_two(options.num_steps):
            raise ValueError(
                f"--sampling.num_steps {options.num_steps}: a shortcut's steps are 1, 2, 4, ... {most}; give one of "
                "these, or another --sampling.sampler, such as euler"
            )
        if options.spacing not in (None, "uniform"):
            raise ValueError(f"--sampling.spacing {options.spacing}: a shortcut's steps are uniform; leave it out")

    def precondition(self, model: Denoiser) -> Denoiser:
        """Steps shorter than any that is trained are told as the shortest."""
        told, shortest = super().precondition(model), 2 / self.sections

        def preconditioned(x_t: Tensor, t: Tensor, y: Tensor, *, r: Tensor | None = None, **extras: Any) -> Tensor:
            r = t if r is None else torch.where(r < t, torch.minimum(r, t - shortest), t)
            return told(x_t, t, y, r=r, **extras)

        return preconditioned

    def draw_second(self, num: int, generator: torch.Generator | None, device: Device) -> Tensor:
        return torch.rand(num, generator=generator, device=device)

    def step_of(self, t: Timesteps, second: Timesteps) -> tuple[Timesteps, Timesteps]:
        """That in which t lies, of all those of a length; each length is as likely."""
        num_lengths = self.sections.bit_length() - 1
        num_steps = (num_lengths * second).floor().exp2().round()
        end = (num_steps * t).ceil().clamp(min=1)
        return (end - 1) / num_steps, end / num_steps

    @torch.no_grad()
    def average_velocity(
        self, model: Denoiser, x_t: Images, r: Timesteps, t: Timesteps, y: Labels, v: Images, index: Int64[Tensor, " n"]
    ) -> Images:
        """The mean of two half steps' of samples at `index`, and `v` of all others."""
        x, r, t, y = x_t[index], r[index], t[index], y[index]
        middle = (r + t) / 2
        with evaluating(model):
            first = self.half(model, x, middle, t, y)
            second = self.half(model, x - over_images(t - middle) * first, r, middle, y)
        average = torch.where(over_images(r == t), v[index], (first + second) / 2)
        return v.index_copy(0, index, average)

    def half(self, model: Denoiser, x_t: Images, r: Timesteps, t: Timesteps, y: Labels) -> Images:
        """A half step's average velocity, or the velocity, guided, where that is the shortest step's."""
        is_shortest = (t - r) * self.sections <= 1
        r = torch.where(is_shortest, t, r)
        if self.guidance_scale == 1:
            return self.precondition(model)(x_t, t, y, r=r).to(x_t.dtype)
        labelled, unlabelled = self.with_and_without_label(model, x_t, r, t, y)
        scale = torch.where(is_shortest, self.guidance_scale, 1.0).to(x_t.dtype)
        return torch.lerp(unlabelled, labelled, over_images(scale))


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0
