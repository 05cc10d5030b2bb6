"""Samplers: each one function that reads like its paper's algorithm; `sample` calls them by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from diffusion.diffusion import Denoiser, Diffusion, Prediction
from diffusion.guidance import Guidance, guide
from diffusion.samplers.chain import Chain, Moments
from diffusion.samplers.multistep import dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, exponential_ab3, unipc
from diffusion.samplers.one_step import ddim, ddpm, euler, euler_maruyama, heun
from diffusion.transition import Transition

Sampler = Callable[[Chain, Tensor], Moments]

SAMPLERS: dict[str, Sampler] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "euler_maruyama": euler_maruyama,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m": dpmpp_3m,
    "exponential_ab3": exponential_ab3,
    "unipc": unipc,
}


def samplers_of(diffusion: Diffusion) -> Mapping[str, Sampler]:
    """The samplers that a diffusion can be sampled by: its own, where it has some, else all."""
    return diffusion.samplers or SAMPLERS


Walk = Callable[..., Tensor]
"""Down one chain as `sample` was told to: `(diffusion, model, noise, y, *, guide_model, callback) -> x_0`."""


@runtime_checkable
class Staged(Protocol):
    """A diffusion whose samples are made in several stages, of which a chain is one."""

    stages: Sequence[str]

    def generate(
        self,
        chain: Walk,
        model: Any,
        noise: Float[Tensor, "b c h w"],
        y: Int64[Tensor, " b"],
        *,
        guide_model: Any | None,
        draw_noise: Callable[[Tensor], Tensor],
        on_stage: Callable[[str, Tensor], None],
    ) -> Float[Tensor, "b c h w"]:
        """Data from unit normal `noise`. `draw_noise` gives more of it, like what it is given, and `on_stage` is to be
        told what each stage puts out."""
        ...


TWO_CALLS_A_STEP = {"heun"}  # but one in the step to the data


def num_calls(sampler: str, num_steps: int) -> int:
    """Of the model, in a chain of this sampler."""
    return 2 * num_steps - 1 if sampler in TWO_CALLS_A_STEP else num_steps


Callback = Callable[[int, Tensor, Tensor], None]
"""Called with (step, x_t after the step, x_0 predicted in it)."""

Generators = torch.Generator | Sequence[torch.Generator]
"""One for the batch, or one a sample."""


@torch.no_grad()
def sample(
    diffusion: Diffusion,
    model: Denoiser,
    noise: Float[Tensor, "b c h w"],
    y: Int64[Tensor, " b"],
    *,
    sampler: str | None = None,
    num_steps: int = 150,
    spacing: str | None = None,
    eta: float = 0.0,
    churn: float = 0.0,
    guidance_scale: float = 1.0,
    guidance: Guidance | None = None,
    guide_model: Denoiser | None = None,
    legacy_cfg_channels: int | None = None,
    clip: float | None = None,
    num_classes: int | None = None,
    start: int | float | None = None,
    step_noise: Float[Tensor, "num_steps b c h w"] | None = None,
    generator: Generators | None = None,
    callback: Callback | None = None,
    on_stage: Callable[[str, Tensor], None] | None = None,
) -> Float[Tensor, "b c h w"]:
    """From unit normal `noise` to data, `x_0`, in `num_steps` steps of a call of the model each (`heun`: two), or as a
    diffusion of several stages has it.

    Random steps take their noise from `step_noise`, one slice a step in order, else from `generator`. With a
    generator for each sample, a sample depends on its own noise, label and stream alone, whatever batch it is
    in. `num_classes`, the null label that guidance needs, is by default the model's attribute of that name. A model
    that is training is evaluated, and left as it was.

    Args:
        sampler: name in `SAMPLERS`; by default the diffusion's own.
        spacing: of the steps' times: name in `SPACINGS`, or a text file of noise levels; by default its own.
        eta: of DDIM, from 0 (deterministic) to 1 (as random as DDPM); the others do not use it.
        churn: of Heun's sampler: noise added on the way; the others do not use it.
        guidance_scale: strength of guidance, none at 1; see `guide`.
        guidance: how it is applied, by default evenly and as it is.
        clip: largest absolute value of the data, to which each step's prediction of `x_0` is cut (Ho et al. 2020); None
            leaves it as it is.
        guide_model: the worse model of autoguidance, in place of the unlabelled half of classifier-free guidance.
        start: a time of the chain to begin at; `noise` is then the `x_t` there.
        callback: called after each step with (step, `x_t`, predicted `x_0`).
        on_stage: called after each stage of a diffusion that has several, with (its name, what it put out).

    Raises:
        ValueError: for an unknown sampler, a number out of its range, or guidance of an unconditional model,
            naming the flag.
    """
    name = sampler or diffusion.default_sampler
    if name not in samplers_of(diffusion):
        raise ValueError(f"--sampler {sampler}: unknown, choose from {', '.join(samplers_of(diffusion))}")
    if not 0 <= eta <= 1:
        raise ValueError(f"--eta {eta} must lie in [0, 1]")
    if not churn >= 0:
        raise ValueError(f"--churn {churn} must not be negative")
    if clip is not None and not clip > 0:
        raise ValueError(f"--clip {clip} must be above 0")
    if step_noise is not None and step_noise.shape != (num_steps, *noise.shape):
        raise ValueError(f"step_noise {list(step_noise.shape)} must be {[num_steps, *noise.shape]}: a slice a step")

    chain = partial(
        walk,
        sampler=name,
        num_steps=num_steps,
        spacing=spacing,
        eta=eta,
        churn=churn,
        guidance_scale=guidance_scale,
        guidance=guidance or Guidance(),
        legacy_cfg_channels=legacy_cfg_channels,
        clip=clip,
        num_classes=getattr(model, "num_classes", 0) if num_classes is None else num_classes,
        start=start,
        step_noise=step_noise,
        generator=generator,
        callback=callback,
    )
    with evaluating(model, guide_model):
        if not isinstance(diffusion, Staged):
            return chain(diffusion, model, noise, y, guide_model=guide_model)
        return diffusion.generate(
            chain,
            model,
            noise,
            y,
            guide_model=guide_model,
            draw_noise=lambda like: randn_like(like, generator),
            on_stage=on_stage or (lambda name, x_0: None),
        )


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


def walk(
    diffusion: Diffusion,
    model: Denoiser,
    noise: Float[Tensor, "b c h w"],
    y: Int64[Tensor, " b"],
    *,
    sampler: str,
    num_steps: int,
    spacing: str | None,
    eta: float,
    churn: float,
    guidance_scale: float,
    guidance: Guidance,
    guide_model: Denoiser | None,
    legacy_cfg_channels: int | None,
    clip: float | None,
    num_classes: int,
    start: int | float | None,
    step_noise: Tensor | None,
    generator: Generators | None,
    callback: Callback | None,
) -> Float[Tensor, "b c h w"]:
    """Down one chain; see `sample`."""
    mix = guidance.mix(diffusion)

    @cache
    def guided(scale: float) -> Denoiser:
        return guide(
            diffusion.precondition(model),
            num_classes,
            scale,
            latent_channels=noise.shape[1],
            legacy_cfg_channels=legacy_cfg_channels,
            guide_model=None if guide_model is None else diffusion.precondition(guide_model),
            mix=mix,
        )

    guided(guidance_scale)  # refuses what cannot be guided before the first step

    def denoise(x_t: Tensor, t: int | float, at: Transition) -> Prediction:
        times = torch.full((len(x_t),), t, device=x_t.device)
        progress = 1 - diffusion.noise_rank(torch.tensor(t, dtype=torch.float64)).item()
        scale = guidance.scale_at(guidance_scale, progress, (at.sigma / at.alpha).item())
        prediction = diffusion.predict(guided(scale)(x_t, times, y), x_t, times, at)
        return prediction if clip is None else prediction.clipped(clip, x_t, at)

    slices = None if step_noise is None else iter(step_noise)

    def draw_noise() -> Tensor:
        return randn_like(noise, generator) if slices is None else next(slices)

    steps = diffusion.reverse_steps(num_steps, spacing)
    x_t = diffusion.prior_std * noise
    if start is not None:
        steps, x_t = [step for step in steps if step[0] <= start], noise
    chain = Chain(diffusion, steps, denoise, draw_noise, eta, churn)
    moments = samplers_of(diffusion)[sampler](chain, x_t)
    for step, (x_t, x_0) in enumerate(moments):
        if callback is not None:
            callback(step, x_t, x_0)
    return x_t


def randn_like(like: Tensor, generator: Generators | None = None) -> Tensor:
    """Unit normal noise on `like`'s device, drawn on the generator's; of several, each draws for one sample.

    Raises:
        ValueError: when there are several generators, but not one for each sample.
    """
    if isinstance(generator, Sequence):
        if len(generator) != len(like):
            raise ValueError(f"{len(generator)} generators for {len(like)} samples: pass one, or one for each")
        drawn = [torch.randn(like.shape[1:], generator=own, device=own.device) for own in generator]
        return torch.stack(drawn).to(like.device)
    source = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=source).to(like.device)
