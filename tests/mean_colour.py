"""An extractor whose features tests can compute themselves, and random images for it."""

import torch
from torch import Tensor, nn

PROBE = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)


class MeanColour(nn.Module):
    """Network whose features are channel means, and whose probabilities are their shares (NaN for black images)."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        colour = images.float().mean(dim=(2, 3))  # [n 3]
        return colour, colour / colour.sum(dim=1, keepdim=True)


def random_images(num: int, *, seed: int = 0, low: int = 0, high: int = 256) -> Tensor:
    """Images of a random colour each, between `low` and `high`, with some noise."""
    generator = torch.Generator().manual_seed(seed)
    colour = torch.randint(low, high, (num, 3, 1, 1), generator=generator)
    noise = torch.randint(0, 9, (num, 3, 8, 8), generator=generator)
    return (colour + noise).clamp(1, 255).to(torch.uint8)
