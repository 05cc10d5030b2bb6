"""Samplers: each one function that reads like its paper's algorithm; `sample` calls them by name."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffusion.diffusion import NOTHING, Chain, Denoiser, Diffusion, Moments, Prediction
from diffusion.guidance import guide, mix_of, scale_at
from diffusion.options import SamplingOptions
from diffusion.samplers.multistep import dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, exponential_ab3, unipc
from diffusion.samplers.one_step import by_averages, ddim, ddpm, euler, euler_maruyama, heun
from diffusion.transition import Images, Labels, Transition
from settings import check_arguments, check_name, check_settings

Sampler = Callable[..., Moments]
"""Of (chain, x_t), and keyword arguments of its own, whose ranges stand in its signature (`settings`)."""

ONE_STEP = (ddpm, ddim, euler, euler_maruyama, heun)
MULTISTEP = (dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, exponential_ab3, unipc)
SAMPLERS: dict[str, Sampler] = {sampler.__name__: sampler for sampler in (*ONE_STEP, *MULTISTEP)}
AVERAGES: dict[str, Sampler] = {"meanflow": by_averages, "shortcut": by_averages}
"""Of the kinds of these names alone."""

Callback = Callable[[int, Tensor, Tensor], None]
"""Called with (step, x_t after the step, x_0 predicted in it)."""

OnStage = Callable[[str, Tensor], None]
"""Called with (name of a stage, what it put out)."""

Generators = torch.Generator | Sequence[torch.Generator]
"""One for the batch, or one a sample."""


def samplers_of(diffusion: Diffusion) -> Mapping[str, Sampler]:
    """The samplers that a diffusion can be sampled by: its own, where it has some, else all."""
    return diffusion.samplers or SAMPLERS


@runtime_checkable
class Staged(Protocol):
    """A diffusion whose samples are made in several stages, of which a walk down a chain is one. It is told a
    `guide_model`, `draw_noise` for more noise like what that is given, and `on_stage` for what each stage puts out."""

    stages: Sequence[str]

    def generate(self, walk: "Walk", model: Any, noise: Images, y: Labels, **told: Any) -> Images: ...


def num_steps_of(options: SamplingOptions, diffusion: Diffusion) -> int:
    """As asked for; else one of a sampler by averages, for which they are trained, and 150 of all others."""
    sampler = options.sampler or diffusion.default_sampler
    return options.num_steps or (1 if sampler in AVERAGES else 150)


def num_calls(diffusion: Diffusion, options: SamplingOptions) -> int:
    """How often a sampler calls the model: counted along a chain of one number."""
    times, number = [], torch.zeros(1, 1, 1, 1)

    def denoise(x_t: Tensor, t: int | float, at: Transition, **more: Any) -> Prediction:
        times.append(t)
        return Prediction(x_t, x_t, x_t)

    chain = Chain(diffusion, diffusion.reverse_steps(num_steps_of(options, diffusion)), denoise, lambda: number)
    deque(samplers_of(diffusion)[options.sampler or diffusion.default_sampler](chain, number), maxlen=0)
    return len(times)


def check_options(options: SamplingOptions, diffusion: Diffusion) -> None:
    """Refuses what can be seen to be wrong with options before the first step, naming the flag."""
    check_settings(options, "--sampling.")
    samplers, name = samplers_of(diffusion), options.sampler or diffusion.default_sampler
    if name in AVERAGES and name not in samplers:
        others = f"choose from {', '.join(samplers)}"
        raise ValueError(f"--sampling.sampler {name}: for models of --diffusion.kind {name} alone; {others}")
    check_name("--sampling.sampler", name, samplers)
    check_arguments(samplers[name], options.sampler_args, "--sampling.sampler_args")
    diffusion.check_options(options)


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
    extras: Mapping[str, Any] = NOTHING,
    start: int | float | None = None,
    step_noise: Float[Tensor, "num_steps b c h w"] | None = None,
    generator: Generators | None = None,
    callback: Callback | None = None,
    on_stage: OnStage | None = None,
    **settings: Any,
) -> Images:
    """From unit normal `noise` to data, `x_0`, as `options` say, or keywords by the names of `SamplingOptions`:
    `sample(..., sampler="ddim", num_steps=50)`.

    Random steps take their noise from `step_noise`, one slice a step in order, else from `generator`. With a
    generator for each sample, a sample depends on its own noise, label and stream alone, whatever batch it is
    in. A model that is training is evaluated, and left as it was. ValueErrors name the flag of an option.

    Args:
        guide_model: the worse model of autoguidance, in place of the unlabelled half of classifier-free guidance.
        num_classes: the null label that guidance needs; by default the model's attribute of that name.
        extras: what the model is called with beside (x_t, t, y); tensors have a row a sample.
        start: a time of the chain to begin at; `noise` is then the `x_t` there.
        callback: called after each step with (step, `x_t`, predicted `x_0`).
        on_stage: called after each stage of a diffusion that has several, with (its name, what it put out).
    """
    options = replace(options or SamplingOptions(), **settings)
    check_options(options, diffusion)
    expected = [num_steps_of(options, diffusion), *noise.shape]
    if step_noise is not None and list(step_noise.shape) != expected:
        raise ValueError(f"step_noise {list(step_noise.shape)} must be {expected}: a slice a step")
    null_label = getattr(model, "num_classes", 0) if num_classes is None else num_classes
    walk = Walk(options, null_label, extras, start, step_noise, generator, callback)
    with evaluating(model, guide_model):
        if not isinstance(diffusion, Staged):
            return walk(diffusion, model, noise, y, guide_model=guide_model)
        told: dict[str, Any] = {"guide_model": guide_model, "draw_noise": lambda like: randn_like(like, generator)}
        return diffusion.generate(walk, model, noise, y, on_stage=on_stage or (lambda name, x_0: None), **told)


@dataclass(frozen=True)
class Walk:
    """Down one chain from noise to data, as `sample` was told to."""

    options: SamplingOptions
    num_classes: int
    extras: Mapping[str, Any]
    start: int | float | None
    step_noise: Tensor | None
    generator: Generators | None
    callback: Callback | None

    def __call__(
        self, diffusion: Diffusion, model: Denoiser, noise: Images, y: Labels, *, guide_model: Denoiser | None
    ) -> Images:
        options, told, worse = self.options, diffusion.precondition(model), guide_model
        rule: dict[str, Any] = {"mix": mix_of(options, diffusion), "latent_channels": noise.shape[1]}
        rule |= {"legacy_cfg_channels": options.legacy_cfg_channels}
        rule |= {"guide_model": None if worse is None else diffusion.precondition(worse)}

        @cache
        def guided(scale: float) -> Denoiser:
            return guide(told, self.num_classes, scale, **rule)

        guided(options.guidance_scale)  # refuses what cannot be guided before the first step

        def denoise(x_t: Tensor, t: int | float, at: Transition, **more: Any) -> Prediction:
            times = torch.full((len(x_t),), t, device=x_t.device)
            scale = scale_at(options, (at.sigma / at.alpha).item())
            output = guided(scale)(x_t, times, y, **self.extras, **more)
            prediction = diffusion.predict(output, x_t, times, at)
            return prediction if options.clip is None else prediction.clipped(options.clip, x_t, at)

        slices = None if self.step_noise is None else iter(self.step_noise)

        def draw_noise() -> Tensor:
            return randn_like(noise, self.generator) if slices is None else next(slices)

        num_steps = num_steps_of(options, diffusion)
        steps, x_t = diffusion.reverse_steps(num_steps, options.spacing), diffusion.path.prior_std * noise
        if self.start is not None:
            steps, x_t = [step for step in steps if step[0] <= self.start], noise
        sampler = samplers_of(diffusion)[options.sampler or diffusion.default_sampler]
        moments = sampler(Chain(diffusion, steps, denoise, draw_noise), x_t, **options.sampler_args)
        for step, (x_t, x_0) in enumerate(moments):
            if self.callback is not None:
                self.callback(step, x_t, x_0)
        return x_t


@contextmanager
def evaluating(*models: object) -> Iterator[None]:
    """Those that are modules in eval mode, without dropout; afterwards each part is in its own mode again."""
    parts = [part for model in models if isinstance(model, nn.Module) for part in model.modules() if part.training]
    for part in parts:
        part.training = False
    try:
        yield
    finally:
        for part in parts:
            part.training = True


def randn_like(like: Tensor, generator: Generators | None = None) -> Tensor:
    """Unit normal noise on `like`'s device, drawn on the generator's; of several, each draws for one sample."""
    if isinstance(generator, Sequence):
        if len(generator) != len(like):
            raise ValueError(f"{len(generator)} generators for {len(like)} samples: pass one, or one for each")
        rows = [torch.randn(like.shape[1:], generator=stream, device=stream.device) for stream in generator]
        return torch.stack(rows).to(like.device)
    source = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=source).to(like.device)
