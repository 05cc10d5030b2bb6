"""Samplers, each a function that follows its paper's algorithm, and `sample`, which runs one by name."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from diffusion.calls import eval_mode
from diffusion.diffusion import Denoiser, Diffusion, Prediction
from diffusion.guidance import check_guidance_input, guidance_rule, guide, scale_at
from diffusion.options import SamplingOptions
from diffusion.samplers.chain import Chain, Trajectory
from diffusion.samplers.multistep import dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, exponential_ab3, unipc
from diffusion.samplers.one_step import average_velocity_steps, ddim, ddpm, euler, euler_maruyama, heun
from diffusion.transition import Images, Labels, Transition
from settings import check_arguments, check_name, check_settings

Sampler = Callable[..., Trajectory]
"""`(chain, x_t, **arguments) -> Trajectory`; the ranges of its own arguments are in its signature (see `settings`)."""

ONE_STEP = (ddpm, ddim, euler, euler_maruyama, heun)
MULTISTEP = (dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, exponential_ab3, unipc)
SAMPLERS: dict[str, Sampler] = {sampler.__name__: sampler for sampler in (*ONE_STEP, *MULTISTEP)}
AVERAGES: dict[str, Sampler] = {"meanflow": average_velocity_steps, "shortcut": average_velocity_steps}
"""Samplers by average velocities; each is only for the kind of diffusion of its name."""

Callback = Callable[[int, Tensor, Tensor], None]
"""Called after each step with (step, x_t, predicted x_0)."""

OnStage = Callable[[str, Tensor], None]
"""Called with (name of a stage, its output)."""

Generators = torch.Generator | Sequence[torch.Generator] | Callable[[Tensor], Tensor]
"""One generator for the batch, one for each sample, or a function that returns noise like a tensor."""


def samplers_for(diffusion: Diffusion) -> Mapping[str, Sampler]:
    """Return the samplers that support a diffusion: the ones it names, or all."""
    return diffusion.samplers or SAMPLERS


@runtime_checkable
class Staged(Protocol):
    """A diffusion that generates samples in several stages, of which some run a sampler, by `run_sampler`.

    `generate` is also passed `guide_model`; `draw_noise(like)`, which returns fresh noise; and `on_stage`, to be called
    with each stage's output.
    """

    stages: Sequence[str]

    def generate(self, run_sampler: "SamplerRun", model: Any, noise: Images, y: Labels, **extras: Any) -> Images: ...


def num_steps_for(options: SamplingOptions, diffusion: Diffusion) -> int:
    """Return the number of steps: by default 1 for samplers by average velocities, 150 for all others."""
    sampler = options.sampler or diffusion.default_sampler
    return options.num_steps or (1 if sampler in AVERAGES else 150)


def num_calls(diffusion: Diffusion, options: SamplingOptions) -> int:
    """Count a sampler's calls of the model, by a run on one number; see `num_evaluations` for guided ones."""
    return len(_guidance_scales(diffusion, options))


def num_evaluations(diffusion: Diffusion, options: SamplingOptions) -> int:
    """Count the network evaluations of a sample. A call with guidance takes two, unless the model is told its scale."""
    is_told = diffusion.takes_guidance(options.sampler or diffusion.default_sampler)
    return sum(1 if is_told or scale == 1 else 2 for scale in _guidance_scales(diffusion, options))


def _guidance_scales(diffusion: Diffusion, options: SamplingOptions) -> list[float]:
    """Return the guidance scale of each call that a sampler makes."""
    scales, pixel = [], torch.zeros(1, 1, 1, 1)

    def denoise(x_t: Tensor, t: int | float, at: Transition, **extras: Any) -> Prediction:
        scales.append(scale_at(options, (at.sigma / at.alpha).item()))
        return Prediction(x_t, x_t, x_t)

    steps = diffusion.reverse_steps(num_steps_for(options, diffusion), options.spacing)
    sampler = samplers_for(diffusion)[options.sampler or diffusion.default_sampler]
    deque(sampler(Chain(diffusion, steps, denoise, lambda: pixel), pixel, **options.sampler_args), maxlen=0)
    return scales


def check_options(options: SamplingOptions, diffusion: Diffusion, *, has_guide: bool = False) -> None:
    """Validate options before sampling, with a guide model or without; a `ValueError` names the flag."""
    check_settings(options, "--sampling.")
    samplers, name = samplers_for(diffusion), options.sampler or diffusion.default_sampler
    if name in AVERAGES and name not in samplers:
        hint = f"choose from {', '.join(samplers)}"
        raise ValueError(f"--sampling.sampler {name}: for models of --diffusion.kind {name} alone; {hint}")
    check_name("--sampling.sampler", name, samplers)
    check_arguments(samplers[name], options.sampler_args, "--sampling.sampler_args")
    diffusion.check_options(options)
    if diffusion.guidance_max is not None and diffusion.takes_guidance(name):
        check_guidance_input(options, diffusion.guidance_max, has_guide=has_guide)


@torch.no_grad()
def sample(
    diffusion: Diffusion,
    model: Denoiser,
    noise: Images,
    y: Labels,
    options: SamplingOptions | None = None,
    *,
    guide_model: Denoiser | None = None,
    num_classes: int | None = None,
    start: int | float | None = None,
    generator: Generators | None = None,
    callback: Callback | None = None,
    on_stage: OnStage | None = None,
    **settings: Any,
) -> Images:
    """Generate data `x_0` from unit normal `noise`, by the raw model.

    The model runs in eval mode and is left in the mode it had. With a generator for each sample, a sample depends only
    on its own noise, label and generator, not on the batch. Invalid options raise `ValueError`, naming the flag.

    Args:
        options: sampler, steps and guidance; `settings` replace some by name, such as `sampler="ddim", num_steps=50`.
        guide_model: the worse model of autoguidance, in place of the model without a label.
        num_classes: the null label for guidance; by default the model's attribute of that name.
        start: a time at which the chain starts; `noise` is then `x_t` at that time.
        generator: what draws the noise of stochastic steps; see `Generators`.
        callback: called after each step with (step, `x_t`, predicted `x_0`).
        on_stage: called after each stage of a diffusion that has several, with (its name, its output).
    """
    options = replace(options or SamplingOptions(), **settings)
    check_options(options, diffusion, has_guide=guide_model is not None)
    null_label = getattr(model, "num_classes", 0) if num_classes is None else num_classes
    run_sampler = SamplerRun(options, null_label, start, generator, callback)
    with eval_mode(model, guide_model):
        if not isinstance(diffusion, Staged):
            return run_sampler(diffusion, model, noise, y, guide_model=guide_model)
        return diffusion.generate(
            run_sampler,
            model,
            noise,
            y,
            guide_model=guide_model,
            draw_noise=lambda like: randn_like(like, generator),
            on_stage=on_stage or (lambda name, x_0: None),
        )


@dataclass(frozen=True)
class SamplerRun:
    """Runs a sampler from noise to data, with the arguments of `sample`."""

    options: SamplingOptions
    num_classes: int
    start: int | float | None
    generator: Generators | None
    callback: Callback | None

    def __call__(
        self, diffusion: Diffusion, model: Denoiser, noise: Images, y: Labels, *, guide_model: Denoiser | None
    ) -> Images:
        options, preconditioned = self.options, diffusion.precondition(model)
        inputs: dict[str, Tensor] = {}
        if diffusion.takes_guidance(options.sampler or diffusion.default_sampler):  # by the model itself, at one call
            inputs["g"] = torch.full((len(noise),), options.guidance_scale, device=noise.device)
            options = replace(options, guidance_scale=1.0)
        guidance: dict[str, Any] = {
            "latent_channels": noise.shape[1],
            "legacy_cfg_channels": options.legacy_cfg_channels,
            "guide_model": None if guide_model is None else diffusion.precondition(guide_model),
            "mix": guidance_rule(options, diffusion),
        }

        @cache
        def guided(scale: float) -> Denoiser:
            return guide(preconditioned, self.num_classes, scale, **guidance)

        guided(options.guidance_scale)  # validates the guidance before the first step

        def denoise(x_t: Tensor, t: int | float, at: Transition, **extras: Any) -> Prediction:
            times = torch.full((len(x_t),), t, device=x_t.device)
            scale = scale_at(options, (at.sigma / at.alpha).item())
            output = guided(scale)(x_t, times, y, **inputs, **extras)
            prediction = diffusion.predict(output, x_t, times, at)
            return prediction if options.clip is None else prediction.clipped(options.clip, x_t, at)

        num_steps = num_steps_for(options, diffusion)
        steps, x_t = diffusion.reverse_steps(num_steps, options.spacing), diffusion.path.prior_std * noise
        if self.start is not None:
            steps, x_t = [step for step in steps if step[0] <= self.start], noise
        sampler = samplers_for(diffusion)[options.sampler or diffusion.default_sampler]
        trajectory = sampler(
            Chain(diffusion, steps, denoise, lambda: randn_like(noise, self.generator)), x_t, **options.sampler_args
        )
        for step, (x_t, x_0) in enumerate(trajectory):
            if self.callback is not None:
                self.callback(step, x_t, x_0)
        return x_t


def randn_like(like: Tensor, generator: Generators | None = None) -> Tensor:
    """Return unit normal noise on `like`'s device, drawn on the generator's; several generators draw a sample each."""
    if callable(generator):
        return generator(like)
    if isinstance(generator, Sequence):
        if len(generator) != len(like):
            raise ValueError(f"{len(generator)} generators for {len(like)} samples: pass one, or one for each")
        rows = [torch.randn(like.shape[1:], generator=stream, device=stream.device) for stream in generator]
        return _send(torch.stack(rows), like.device)
    source = like.device if generator is None else generator.device
    return _send(torch.randn(like.shape, generator=generator, device=source), like.device)


def _send(noise: Tensor, device: torch.device) -> Tensor:
    """Move noise to a device without waiting, so that the CPU draws the next while a GPU computes this step."""
    if noise.device.type != "cpu" or device.type == "mps":  # only copies out of pinned memory can be left to run
        return noise.to(device)
    return (noise.pin_memory() if device.type == "cuda" else noise).to(device, non_blocking=True)
