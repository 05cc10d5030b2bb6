"""The training of a cascade in phases, with teacher forcing."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from studies.cascade.cascade import Cascade
from training.batches import Batch
from training.objective import Objective, Phase


class CascadeObjective(Objective):
    """The coarse stage, then upsampler and refiner, then all of them (see `Cascade`); validated under full forcing."""

    trains_in_parts = True
    diffusion: Cascade

    @property
    def phases(self) -> Sequence[int | float]:
        return self.diffusion.phases

    def draw_more(
        self, shape: Sequence[int], generator: torch.Generator, device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        return self.diffusion.draw_more(shape, generator, device)

    def __call__(self, model: nn.Module, batch: Batch, phase: Phase | None = None) -> dict[str, Float[Tensor, " b"]]:
        during = {} if phase is None else self.diffusion.during(phase.number, phase.progress)
        return self.diffusion.training_loss(
            model,
            batch.x_0,
            batch.y,
            t=batch.t,
            noise=batch.noise,
            auxiliary=self.auxiliary_terms(phase),
            draws=batch.more,
            **during,
        )
