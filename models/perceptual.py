"""Frozen networks in whose features images are compared: modules of images in [-1, 1]."""

from __future__ import annotations

from urllib.error import URLError

import torch
from jaxtyping import Float
from torch import Tensor, nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VGG19Features(nn.Module):
    """VGG19 (Simonyan and Zisserman 2015) up to its fourth convolution, `conv_4`, before the ReLU; torchvision's
    ImageNet weights.

    Raises:
        ValueError: when the weights cannot be had, saying what can be done.
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        from torchvision.models import VGG19_Weights, vgg19

        super().__init__()
        with torch.device("meta"):
            layers = nn.Sequential(*list(vgg19().features.children())[:8])
        try:
            weights = VGG19_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
        except (URLError, OSError, RuntimeError) as error:
            raise ValueError(
                f"network vgg19: its weights could not be downloaded ({error}); put torchvision's file into "
                f"{torch.hub.get_dir()}/checkpoints, or give network a TorchScript file"
            ) from error
        layers.load_state_dict({name: weights[f"features.{name}"] for name in layers.state_dict()}, assign=True)
        # Its ReLUs write over activations that the gradient needs.
        self.layers = nn.Sequential(*(nn.ReLU() if isinstance(layer, nn.ReLU) else layer for layer in layers))
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None])

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 128 h_out w_out"]:
        return self.layers(((images + 1) / 2 - self.mean) / self.std)


class ScriptFeatures(nn.Module):
    """A loaded TorchScript network of images from 0 to 255, as feature extractors are: its output, or the first of
    several."""

    def __init__(self, script: nn.Module) -> None:
        super().__init__()
        self.script = script

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Tensor:
        output = self.script((images + 1) * 127.5)
        return output[0] if isinstance(output, tuple) else output


NETWORKS = {"vgg19": VGG19Features}
