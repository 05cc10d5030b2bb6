"""Training and sampling of a cascade's upsampler and refiner: as a regression, or as a diffusion of its own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion.diffusion import Diffusion, mean_per_sample
from diffusion.samplers import SamplerRun
from diffusion.transition import Images, Labels

Condition = tuple[Tensor, Tensor, Tensor, Tensor]
"""(x_t, t, level, y): inputs of a diffusion refiner beside the upsampled image; `level` is that image's noise level."""
DrawNoise = Callable[[Tensor], Tensor]
Ends = tuple[Float[Tensor, "b c _ _"], Float[Tensor, "b c _ _"]]


class Refined(NamedTuple):
    """Loss and predicted image of a refiner's output."""

    loss: Float[Tensor, " b"]
    x_0: Images
    share: Float[Tensor, " b"]  # weight of auxiliary loss terms on `x_0`


class Refinement:
    """Upsampler and refiner as a regression of the image, trained by squared error."""

    def draw(
        self, shape: Sequence[int], factor: int, generator: torch.Generator | None, device: torch.device | str
    ) -> dict[str, Tensor]:
        """Draw the random numbers of a training step for images of this shape, `factor` times the coarse side."""
        return {}

    def augment(self, low: Images, draws: Mapping[str, Tensor]) -> Images:
        """Map a coarse image to the upsampler's input in training."""
        return low

    def condition(self, x_0: Images, y: Labels, draws: Mapping[str, Tensor]) -> Condition | None:
        """The refiner's inputs in training beside the upsampled image; None for a regression."""
        return None

    def read(self, output: Images, x_0: Images, draws: Mapping[str, Tensor]) -> Refined:
        """Compute loss and predicted image from the refiner's output."""
        return Refined(mean_per_sample((output - x_0).square()), output, torch.ones(len(x_0), device=x_0.device))

    def generate(self, run_sampler: SamplerRun, model: Any, low: Images, y: Labels, draw_noise: DrawNoise) -> Ends:
        """Upsample and refine a coarse image; returns both results."""
        upsampled = model.upsampler(low)
        return upsampled, model.refiner(upsampled, None)


class SuperResolution(Refinement):
    """Super-resolution diffusion, conditioned on the upsampled coarse image, with noise conditioning augmentation.

    The coarse image is noised by the diffusion's forward process, and the refiner is told the noise level. So it learns
    to correct errors of the coarse images that it is given at sampling time (Ho et al. 2021, section 4).

    Args:
        diffusion: diffusion of the full-size images.
        augmentation: timestep of the noise on the coarse image, as a fraction of the diffusion's timesteps: the upper
            end of a uniform distribution in training, and the constant at sampling. Zeros turn it off.
    """

    def __init__(self, diffusion: Diffusion, augmentation: Sequence[int | float]) -> None:
        if len(augmentation) != 2 or not 0 <= augmentation[1] <= augmentation[0] <= 1:
            raise ValueError(
                f"--diffusion.augmentation {list(augmentation)}: give the most noise in training and that at sampling, "
                "not more than it, as shares of the diffusion's times, such as [0.5, 0.1]"
            )
        self.diffusion = diffusion
        self.in_training, self.at_sampling = augmentation

    def level(self, share: Float[Tensor, " b"]) -> Labels:
        """Timestep of the diffusion at a fraction of its range."""
        return (share * self.diffusion.path.max_time).long()

    def draw(
        self, shape: Sequence[int], factor: int, generator: torch.Generator | None, device: torch.device | str
    ) -> dict[str, Tensor]:
        b, c, h, w = shape
        return {
            "t": self.diffusion.sample_timesteps(b, generator, device),
            "noise": torch.randn(b, c, h, w, generator=generator, device=device),
            "level": self.level(self.in_training * torch.rand(b, generator=generator, device=device)),
            "level_noise": torch.randn(b, c, h // factor, w // factor, generator=generator, device=device),
        }

    def augment(self, low: Images, draws: Mapping[str, Tensor]) -> Images:
        if not self.in_training:
            return low
        return self.diffusion.q_sample(low, draws["level"], draws["level_noise"])

    def condition(self, x_0: Images, y: Labels, draws: Mapping[str, Tensor]) -> Condition | None:
        return self.diffusion.q_sample(x_0, draws["t"], draws["noise"]), draws["t"], draws["level"], y

    def read(self, output: Images, x_0: Images, draws: Mapping[str, Tensor]) -> Refined:
        t, noise = draws["t"], draws["noise"]
        x_t = self.diffusion.q_sample(x_0, t, noise)
        loss = self.diffusion.terms(output, self.diffusion.target(x_0, noise, t), x_0, x_t, t)["loss"]
        return Refined(loss, self.diffusion.predict(output, x_t, t).x_0, self.diffusion.signal_share(t))

    def generate(self, run_sampler: SamplerRun, model: Any, low: Images, y: Labels, draw_noise: DrawNoise) -> Ends:
        level = self.level(torch.full((len(low),), float(self.at_sampling), device=low.device))
        upsampled = model.upsampler(self.diffusion.q_sample(low, level, draw_noise(low)) if self.in_training else low)

        def denoise(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
            repeats = len(x_t) // len(upsampled)  # 2 under guidance: the batch with labels and without
            return model.refiner(upsampled.repeat(repeats, 1, 1, 1), (x_t, t, level.repeat(repeats), y))

        run_refiner = replace(run_sampler, callback=None)
        return upsampled, run_refiner(self.diffusion, denoise, draw_noise(upsampled), y, guide_model=None)
