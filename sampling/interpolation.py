"""Interpolation between two classes or two seeds."""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int64, Shaped, UInt8
from torch import Tensor, nn

from diffusion.samplers import Staged, randn_like
from machine.randomness import generator_for
from sampling.generation import Generator


class ClassMixture(nn.Module):
    """Mixes predictions for two classes linearly; labels are indices of `shares`, the second's weights."""

    def __init__(self, model: nn.Module, labels: tuple[int, int], shares: Float[Tensor, " n"]) -> None:
        super().__init__()
        self.model, self.labels, self.num_classes = model, labels, len(shares)
        self.shares = torch.cat([shares, shares.new_zeros(1)])

    def forward(
        self, x_t: Float[Tensor, "b c h w"], t: Shaped[Tensor, " b"], y: Int64[Tensor, " b"], **extras: Any
    ) -> Float[Tensor, "b c_out h w"]:
        null_label = torch.as_tensor(getattr(self.model, "num_classes", 0), device=y.device)
        labels = [torch.where(y == self.num_classes, null_label, label) for label in self.labels]
        first, second = (self.model(x_t, t, label, **extras).float() for label in labels)  # from bf16 under autocast
        return torch.lerp(first, second, self.shares[y][:, None, None, None])


def interpolate(
    generator: Generator, labels: tuple[int, int], seeds: tuple[int, int], num_images: int, only: int | None = None
) -> UInt8[Tensor, "n 3 H W"]:
    """Generate equidistant images along the way between two classes, whose predictions are mixed linearly, and two
    seeds, whose initial noises are interpolated spherically; both ends are included. Random steps use the first seed.
    With `only`, generate only the image of this index."""
    if isinstance(generator.diffusion, Staged) and labels[0] != labels[1]:
        raise ValueError("--interpolate: a cascade has no one prediction to mix; give --class one class, and --to_seed")
    if num_images < 2:
        raise ValueError(f"--interpolate {num_images} must be at least 2, both ends included")
    shape, device = generator.codec.latent_shape(*generator.image_size), generator.accelerator.device
    shares = torch.linspace(0, 1, num_images, device=device)
    if only is not None:
        shares, num_images = shares[only : only + 1], 1
    ends = [randn_like(torch.empty(1, *shape), [generator_for(seed, "sample", 0)]).to(device) for seed in seeds]
    random_streams = [generator_for(seeds[0], "sample", 0) for _ in range(num_images)]
    for random_stream in random_streams:
        torch.randn(shape, generator=random_stream)  # skip the initial noise, as `Generator.draw` samples it first
    noise = slerp(ends[0], ends[1], shares[:, None, None, None])
    if labels[0] == labels[1]:
        return generator.denoise(noise, torch.full((num_images,), labels[0], device=device), random_streams).cpu()
    models = {"model": generator.model, "guide_model": generator.guide_model}
    blend = replace(
        generator, **{name: model and ClassMixture(model, labels, shares) for name, model in models.items()}
    )
    return blend.denoise(noise, torch.arange(num_images, device=device), random_streams).cpu()


def slerp(
    first: Float[Tensor, "1 c h w"], second: Float[Tensor, "1 c h w"], share: Float[Tensor, "n 1 1 1"]
) -> Float[Tensor, "n c h w"]:
    """Spherical linear interpolation (Shoemake 1985)."""
    ends = (end.flatten().cpu().double() for end in (first, second))  # on the CPU, as not every device has float64
    angle = nn.functional.cosine_similarity(*ends, dim=0).clamp(-1, 1).acos().float()
    if angle.sin() < 1e-4:
        return torch.lerp(first.expand(len(share), -1, -1, -1), second.expand(len(share), -1, -1, -1), share)
    return (((1 - share) * angle).sin() * first + (share * angle).sin() * second) / angle.sin()
