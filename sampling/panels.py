"""Grids of intermediate results of sampling: steps of the denoising, and the outputs of a cascade's stages."""

import torch
from einops import rearrange
from jaxtyping import UInt8
from torch import Tensor, nn

from autoencoders.codec import Codec
from diffusion import Diffusion
from diffusion.samplers import Staged


class DenoisingPanel:
    """A `callback` of the sampler that records evenly spaced steps of the first six samples, to be shown as a grid."""

    def __init__(self, num_moments: int, num_steps: int) -> None:
        if not 1 <= num_moments <= num_steps:
            raise ValueError(f"--panel {num_moments} must lie in 1..{num_steps}, the sampling steps")
        self.steps = torch.linspace(0, num_steps - 1, num_moments).round().long().tolist()
        self.column_names = [f"step {step + 1}" for step in self.steps]
        self.moments: list[tuple[Tensor, Tensor]] = []

    def __call__(self, step: int, x_t: Tensor, x_0: Tensor) -> None:
        if len(self.moments) < len(self.steps) and step == self.steps[len(self.moments)]:
            self.moments.append((x_t[:6], x_0[:6]))

    def images(self, codec: Codec) -> UInt8[Tensor, "n 3 h w"]:
        """Decode a row of `x_t` and a row of predicted `x_0` for each image."""
        moments = torch.stack([torch.stack(moment) for moment in self.moments])  # [moments 2 images c h w]
        return codec.decode(rearrange(moments, "m kind b c h w -> (b kind m) c h w")).cpu()


class StagesPanel:
    """An `on_stage` callback that records all stages' outputs of the first 36 samples, to be shown as a grid."""

    def __init__(self, diffusion: Diffusion) -> None:
        if not isinstance(diffusion, Staged):
            raise ValueError("--stages true: this model draws in one stage; it is for cascades, see --panel")
        self.column_names = [*diffusion.stages] * 3
        self.outputs: dict[str, Tensor] = {}

    def __call__(self, name: str, x_0: Tensor) -> None:
        self.outputs.setdefault(name, x_0[:36])

    def images(self, codec: Codec) -> UInt8[Tensor, "n 3 h w"]:
        """Decode the outputs of all stages for each sample, enlarged to the size of the largest."""
        decoded = [codec.decode(x_0).cpu() for x_0 in self.outputs.values()]  # not all devices resize uint8
        size = max(tuple(images.shape[-2:]) for images in decoded)
        enlarged = [nn.functional.interpolate(images, size=size, mode="nearest") for images in decoded]
        return torch.stack(enlarged, dim=1).flatten(0, 1)
