"""How the refiner of a cascade is trained and drawn from: as a regression, or as a diffusion of its own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion.diffusion import Diffusion, mean_per_sample
from diffusion.samplers import Walk
from diffusion.transition import Images, Labels

Condition = tuple[Tensor, Tensor, Tensor, Tensor]
"""(x_t, t, level, y): what a refiner that denoises is given beside the upsampled image."""
DrawNoise = Callable[[Tensor], Tensor]
Ends = tuple[Float[Tensor, "b c _ _"], Float[Tensor, "b c _ _"]]


class Refined(NamedTuple):
    """What a refiner's output says."""

    loss: Float[Tensor, " b"]
    x_0: Images
    share: Float[Tensor, " b"]  # what auxiliary terms of `x_0` count


class Refinement:
    """From the image that the upsampler is given on: by itself a regression of the refiner's output."""

    def draw(
        self, shape: Sequence[int], factor: int, generator: torch.Generator | None, device: torch.device | str
    ) -> dict[str, Tensor]:
        """What training draws for a batch of images of this shape, `factor` times the side of the coarse ones."""
        return {}

    def augment(self, low: Images, draws: Mapping[str, Tensor]) -> Images:
        """What the upsampler is given in training for a coarse image."""
        return low

    def condition(self, x_0: Images, y: Labels, draws: Mapping[str, Tensor]) -> Condition | None:
        """What the refiner is given in training, beside what the upsampler made."""
        return None

    def read(self, output: Images, x_0: Images, draws: Mapping[str, Tensor]) -> Refined:
        return Refined(mean_per_sample((output - x_0).square()), output, torch.ones(len(x_0), device=x_0.device))

    def generate(self, walk: Walk, model: Any, low: Images, y: Labels, draw_noise: DrawNoise) -> Ends:
        """What the model's upsampler and refiner make of a coarse image."""
        up = model.upsampler(low)
        return up, model.refiner(up, None)


class SuperResolution(Refinement):
    """Diffusion given the upsampled coarse image, with noise-conditioning augmentation: that image is noised, as the
    diffusion itself does it, and the refiner told how much, so that it learns to make up for what is wrong with coarse
    images at sampling time (Ho et al. 2021, section 4).

    Args:
        diffusion: of the images.
        augmentation: the largest time of that noise in training, where each up to it is as likely, and the one at
            sampling, as shares of the diffusion's times; zeros leave it out.
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
        """A time of the diffusion."""
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
        loss = self.diffusion.terms(output, x_0, x_t, t, noise)["loss"]
        return Refined(loss, self.diffusion.predict(output, x_t, t).x_0, self.diffusion.signal_share(t))

    def generate(self, walk: Walk, model: Any, low: Images, y: Labels, draw_noise: DrawNoise) -> Ends:
        level = self.level(torch.full((len(low),), float(self.at_sampling), device=low.device))
        up = model.upsampler(self.diffusion.q_sample(low, level, draw_noise(low)) if self.in_training else low)

        def denoise(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
            halves = len(x_t) // len(up)  # under guidance two, with and without label
            return model.refiner(up.repeat(halves, 1, 1, 1), (x_t, t, level.repeat(halves), y))

        silent = replace(walk, callback=None)
        return up, silent(self.diffusion, denoise, draw_noise(up), y, guide_model=None)
