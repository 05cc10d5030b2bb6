"""Diffusion and objective of the cascade: small images, upsampled and refined, trained in three phases.

A training step calls the model once, on a noisy image `x_t` of the coarse size:
`model(x_t, t, y, connect=..., condition=..., frozen=...) -> (coarse, upsampled, refined)`.

- `connect` maps the coarse stage's output to the upsampler's input, or to None where only the coarse stage is trained.
- `condition` is passed to a refiner that is a diffusion model.
- `frozen` detaches the coarse stage: it gets no gradient.

It is a single call so that wrappers such as DDP see one forward pass. Sampling calls the model's `coarse`, `upsampler`
and `refiner` separately.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor, nn

from diffusion.diffusion import Auxiliary, Denoiser, Diffusion, Prediction, Step, mean_per_sample, with_auxiliary
from diffusion.samplers import SamplerRun
from diffusion.transition import Images, Labels, Timesteps
from studies.cascade.refinement import Refinement
from training.batches import Batch
from training.objective import Objective, Phase


class TrainedStages(NamedTuple):
    """Which stages a phase trains."""

    coarse: bool
    others: bool  # upsampler and refiner


NO_CHAIN = (
    "a cascade has no chain from noise to its images, but to small ones: it cannot be reconstructed from a time, nor "
    "has it a likelihood; leave --reconstruct or --likelihood out, and see --stages"
)
PHASES = (TrainedStages(True, False), TrainedStages(False, True), TrainedStages(True, True))


class CascadeObjective(Objective):
    """Trains the coarse stage, then upsampler and refiner, then all stages; validation uses full teacher forcing."""

    trains_in_parts = True
    can_align = False
    diffusion: "Cascade"

    @property
    def phases(self) -> Sequence[int | float]:
        return self.diffusion.phases

    def __call__(self, model: nn.Module, batch: Batch, phase: Phase | None = None) -> dict[str, Float[Tensor, " b"]]:
        options = {} if phase is None else self.diffusion.phase_loss_args(phase.number, phase.progress)
        options |= {"draws": batch.loss_args, "auxiliary": self.auxiliary_terms(phase)}
        return self.diffusion.training_loss(model, batch.x_0, batch.y, t=batch.t, noise=batch.noise, **options)


class Cascade(Diffusion):
    """Three shallow stages in place of one deep model. Samplers walk the chain of the coarse stage.

    Training has three phases, of relative lengths `phases`: the coarse stage learns by its own objective; upsampler and
    refiner learn by the squared error of their images, while it is frozen; all stages learn by the sum of these losses.

    In phases 2 and 3 the upsampler's input is either the downsampled true image (teacher forcing) or the coarse stage's
    one-step prediction of `x_0` from a noisy version of it. In phase 3 the gradient of upsampler and refiner flows
    through that prediction into the coarse stage. Both inputs belong to the same image, which is the target. The
    probability of teacher forcing changes linearly between the two numbers that `forcing` has for phase 2, and for
    phase 3.

    Outside of a training, the loss is that of all stages under full teacher forcing. `model_args` are arguments that a
    backbone for this diffusion has to be built with.
    """

    stages = ("coarse", "upsampler", "refiner")
    objective = CascadeObjective

    def __init__(
        self,
        coarse: Diffusion,
        refinement: Refinement,
        factor: int,
        phases: Sequence[int | float],
        forcing: Sequence[Sequence[int | float]],
        model_args: Mapping[str, Any],
    ) -> None:
        samplers: dict[str, Any] = {"default_sampler": coarse.default_sampler, "samplers": coarse.samplers}
        super().__init__(coarse.path, coarse.prediction, times=coarse.sample_timesteps, **samplers)
        self.coarse, self.refinement, self.factor = coarse, refinement, factor
        self.phases, self.forcing, self.model_args = phases, forcing, model_args

    def reverse_steps(self, num_steps: int, spacing: str | None = None) -> list[Step]:
        return self.coarse.reverse_steps(num_steps, spacing)

    def phase_loss_args(self, phase: int, progress: float) -> dict[str, Any]:
        """Arguments of `training_loss` in a phase, at a fraction `progress` of its steps."""
        first, last = (1.0, 1.0) if phase == 0 else self.forcing[phase - 1]
        return {"trained": PHASES[phase], "forcing": first + (last - first) * progress}

    def draw_loss_args(
        self, shape: Sequence[int], generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        """Draw the random numbers of teacher forcing, in [0, 1), and those of the refinement."""
        forcing = torch.rand(shape[0], generator=generator, device=device)
        return {"forcing": forcing, **self.refinement.draw(shape, self.factor, generator, device)}

    def training_loss(
        self,
        model: Callable[..., Any],
        x_0: Images,
        y: Labels,
        *,
        t: Timesteps | None = None,
        noise: Images | None = None,
        generator: torch.Generator | None = None,
        auxiliary: Sequence[Auxiliary] = (),
        draws: Mapping[str, Tensor] | None = None,
        trained: TrainedStages = PHASES[-1],
        forcing: float = 1.0,
    ) -> dict[str, Float32[Tensor, " b"]]:
        """Compute `loss` and its terms for each image of a batch.

        Depending on the phase, these are the terms of the coarse stage, the squared errors `upsampled` and `refined`,
        auxiliary terms, and `forced`: whether teacher forcing was used.
        """
        t, noise = self.draw(x_0, t, noise, generator)
        draws = draws or self.draw_loss_args(x_0.shape, generator, x_0.device)
        x_0 = x_0.float()
        low_0, low_noise = self.downsample(x_0), self.downsample_noise(noise)
        x_t = self.coarse.q_sample(low_0, t, low_noise)
        forced = draws["forcing"] < forcing

        def connect(coarse: Tensor) -> Tensor | None:
            if not trained.others:
                return None
            predicted = self.coarse.predict(coarse.float(), x_t, t).x_0
            return self.refinement.augment(torch.where(forced[:, None, None, None], low_0, predicted), draws)

        condition = self.refinement.condition(x_0, y, draws)
        coarse, upsampled, output = model(x_t, t, y, connect=connect, condition=condition, frozen=not trained.coarse)

        terms: dict[str, Tensor] = {"loss": torch.zeros_like(forced, dtype=torch.float32)}
        if trained.coarse:
            target = self.coarse.target(low_0, low_noise, t)
            terms = self.coarse.terms(coarse.float(), target, low_0, x_t, t)
        if trained.others:
            refined = self.refinement.read(output.float(), x_0, draws)
            terms |= {"upsampled": mean_per_sample((upsampled.float() - x_0).square()), "refined": refined.loss}
            terms["loss"] = terms["loss"] + terms["upsampled"] + terms["refined"]
            terms["forced"] = forced.float()
            terms = with_auxiliary(terms, auxiliary, refined.x_0, x_0, y, refined.share)
        return terms

    def downsample(self, image: Images) -> Float[Tensor, "b c h2 w2"]:
        """Downsample images to the coarse size: the means of squares of `factor` x `factor` pixels."""
        return F.avg_pool2d(image, self.factor)

    def downsample_noise(self, noise: Images) -> Float[Tensor, "b c h2 w2"]:
        """Downsample noise to the coarse size, rescaled to unit variance."""
        return self.factor * self.downsample(noise)

    # Sampling.

    def generate(
        self,
        run_sampler: SamplerRun,
        model: Any,
        noise: Images,
        y: Labels,
        *,
        guide_model: Any,
        draw_noise: Any,
        on_stage: Any,
    ) -> Images:
        """Sample a coarse image by its chain, upsample and refine it. A `guide_model` guides the coarse stage alone;
        without it a diffusion refiner is guided by the null label, too."""
        guide: Denoiser | None = None if guide_model is None else guide_model.coarse
        low = run_sampler(self.coarse, model.coarse, self.downsample_noise(noise), y, guide_model=guide)
        overrides: dict[str, Any] = {} if guide is None else {"guidance_scale": 1.0}
        if self.samplers:  # the coarse stage has samplers of its own, which a diffusion refiner cannot use
            overrides |= {"sampler": "ddpm", "sampler_args": {}}
        run_refiner = replace(run_sampler, options=replace(run_sampler.options, **overrides))
        upsampled, refined = self.refinement.generate(run_refiner, model, low, y, draw_noise)
        for name, image in zip(self.stages, (low, upsampled, refined), strict=True):
            on_stage(name, image.to(noise.dtype))
        return refined.to(noise.dtype)

    # The full-size image has no noising process, so what needs one is refused.

    def q_sample(self, x_0: Images, t: Timesteps, noise: Images) -> Images:
        raise ValueError(NO_CHAIN)

    def predict(self, *args: object, **kwargs: object) -> Prediction:
        raise ValueError(NO_CHAIN)
