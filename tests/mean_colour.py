"""An extractor whose features are known without it, and images for it."""

import torch
from torch import Tensor, nn

PROBE = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)


class MeanColour(nn.Module):
    """Features: the mean of each channel. Probabilities: its share of the light, undefined in the dark."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        colour = images.float().mean(dim=(2, 3))  # [n 3]
        return colour, colour / colour.sum(dim=1, keepdim=True)


def random_images(num: int, *, seed: int = 0, low: int = 0, high: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tint = torch.randint(low, high, (num, 3, 1, 1), generator=generator)
    grain = torch.randint(0, 9, (num, 3, 8, 8), generator=generator)
    return (tint + grain).clamp(1, 255).to(torch.uint8)
