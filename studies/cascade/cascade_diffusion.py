"""Images in three stages: small ones from noise, upsampled, refined; trained in three phases.

A model for it puts out what its stages make of a small noisy image `x_t` of the coarse size:
`model(x_t, t, y, connect=..., condition=..., frozen=...) -> (coarse, upsampled, refined)`, where `connect` turns the
coarse output into the image that the upsampler is given, or into None where the coarse stage is all that is asked for,
`condition` goes to a refiner that denoises, and a `frozen` coarse stage gets no gradient. One call a step: whatever is
wrapped around the model sees all of it. To sample, its `coarse`, `upsampler` and `refiner` are called by themselves.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor, nn

from diffusion.diffusion import Auxiliary, Denoiser, Diffusion, Prediction, Step, mean_per_sample, with_auxiliary
from diffusion.samplers import Walk
from diffusion.transition import Images, Labels, Timesteps
from studies.cascade.refinement import Refinement
from training.batches import Batch
from training.objective import Objective, Phase


class Trained(NamedTuple):
    coarse: bool
    others: bool  # upsampler and refiner


NO_CHAIN = (
    "a cascade has no chain from noise to its images, but to small ones: it cannot be reconstructed from a time, nor "
    "has it a likelihood; leave --reconstruct or --likelihood out, and see --stages"
)
PHASES = (Trained(True, False), Trained(False, True), Trained(True, True))


class CascadeObjective(Objective):
    """The coarse stage, then upsampler and refiner, then all of them (see `Cascade`); validated under full forcing."""

    trains_in_parts = True
    can_align = False
    diffusion: "Cascade"

    @property
    def phases(self) -> Sequence[int | float]:
        return self.diffusion.phases

    def __call__(self, model: nn.Module, batch: Batch, phase: Phase | None = None) -> dict[str, Float[Tensor, " b"]]:
        during = {} if phase is None else self.diffusion.during(phase.number, phase.progress)
        during |= {"t": batch.t, "noise": batch.noise, "draws": batch.more, "auxiliary": self.auxiliary_terms(phase)}
        return self.diffusion.training_loss(model, batch.x_0, batch.y, **during)


class Cascade(Diffusion):
    """Three shallow stages in place of one deep model. The chain that a sampler walks is the coarse stage's.

    Phases: the coarse stage by its own objective; upsampler and refiner by the squared errors of the images that they
    make, the coarse stage frozen; then all of it, by the sum of these losses. In the last two the upsampler is given,
    with the probability of teacher forcing, the true image made small, else what the coarse stage makes of its noised
    version in one step: the predicted `x_0`, through which, in the last phase, the gradient of upsampler and refiner
    flows into the coarse stage. Both are made of one image, so that there is a truth to hold them against.

    By itself, outside of a training's phases, the loss is that of all stages under full teacher forcing.

    Args:
        coarse: objective of the coarse stage.
        refinement: of upsampler and refiner.
        factor: side of the image over that of the coarse one.
        phases: relative lengths of the three.
        forcing: probability of teacher forcing at the beginning and at the end of the second and of the third phase,
            between which it falls linearly.
        model_args: what a backbone for it has to be built with.
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
        sampled: dict[str, Any] = {"default_sampler": coarse.default_sampler, "samplers": coarse.samplers}
        super().__init__(coarse.path, coarse.prediction, times=coarse.sample_timesteps, **sampled)
        self.coarse, self.refinement, self.factor = coarse, refinement, factor
        self.phases, self.forcing, self.model_args = phases, forcing, model_args

    def reverse_steps(self, num_steps: int, spacing: str | None = None) -> list[Step]:
        return self.coarse.reverse_steps(num_steps, spacing)

    def during(self, phase: int, progress: float) -> dict[str, Any]:
        """What a phase asks of `training_loss` at a share of its steps, 0 to 1."""
        first, last = (1.0, 1.0) if phase == 0 else self.forcing[phase - 1]
        return {"trained": PHASES[phase], "forcing": first + (last - first) * progress}

    def draw_more(
        self, shape: Sequence[int], generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        """Whether the teacher forces, as numbers in [0, 1), and what the refinement draws."""
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
        trained: Trained = PHASES[-1],
        forcing: float = 1.0,
    ) -> dict[str, Float32[Tensor, " b"]]:
        """`loss` and, by phase, `mse` of the coarse stage, `upsampled`, `refined`, auxiliary terms, `forced`."""
        t, noise = self.draw(x_0, t, noise, generator)
        draws = draws or self.draw_more(x_0.shape, generator, x_0.device)
        x_0 = x_0.float()
        low_0, low_noise = self.shrink(x_0), self.shrink_noise(noise)
        x_t = self.coarse.q_sample(low_0, t, low_noise)
        forced = draws["forcing"] < forcing

        def connect(coarse: Tensor) -> Tensor | None:
            if not trained.others:
                return None
            predicted = self.coarse.predict(coarse.float(), x_t, t).x_0
            return self.refinement.augment(torch.where(forced[:, None, None, None], low_0, predicted), draws)

        condition = self.refinement.condition(x_0, y, draws)
        coarse, up, output = model(x_t, t, y, connect=connect, condition=condition, frozen=not trained.coarse)

        terms: dict[str, Tensor] = {"loss": torch.zeros_like(forced, dtype=torch.float32)}
        if trained.coarse:
            terms = self.coarse.terms(coarse.float(), low_0, x_t, t, low_noise)
        if trained.others:
            refined = self.refinement.read(output.float(), x_0, draws)
            terms |= {"upsampled": mean_per_sample((up.float() - x_0).square()), "refined": refined.loss}
            terms["loss"] = terms["loss"] + terms["upsampled"] + terms["refined"]
            terms["forced"] = forced.float()
            terms = with_auxiliary(terms, auxiliary, refined.x_0, x_0, y, refined.share)
        return terms

    def shrink(self, image: Images) -> Float[Tensor, "b c h2 w2"]:
        """An image of the coarse size: means of squares of `factor` pixels."""
        return F.avg_pool2d(image, self.factor)

    def shrink_noise(self, noise: Images) -> Float[Tensor, "b c h2 w2"]:
        """Unit normal noise of the coarse size, from noise of the image's."""
        return self.factor * self.shrink(noise)

    # Sampling.

    def generate(
        self, walk: Walk, model: Any, noise: Images, y: Labels, *, guide_model: Any, draw_noise: Any, on_stage: Any
    ) -> Images:
        """A coarse image down its chain, upsampled, refined; a refiner that denoises is guided by the null label."""
        guide: Denoiser | None = None if guide_model is None else guide_model.coarse
        low = walk(self.coarse, model.coarse, self.shrink_noise(noise), y, guide_model=guide)
        changed: dict[str, Any] = {} if guide is None else {"guidance_scale": 1.0}
        if self.samplers:  # those are for the coarse stage alone
            changed |= {"sampler": "ddpm", "sampler_args": {}}
        rest = replace(walk, options=replace(walk.options, **changed))
        up, refined = self.refinement.generate(rest, model, low, y, draw_noise)
        for name, image in zip(self.stages, (low, up, refined), strict=True):
            on_stage(name, image.to(noise.dtype))
        return refined.to(noise.dtype)

    # There is no path from the image itself.

    def q_sample(self, x_0: Images, t: Timesteps, noise: Images) -> Images:
        raise ValueError(NO_CHAIN)

    def predict(self, *args: object, **kwargs: object) -> Prediction:
        raise ValueError(NO_CHAIN)
