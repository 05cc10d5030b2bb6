"""Frozen networks whose features perceptual losses compare; their inputs are images in [-1, 1]."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.transforms.v2.functional import normalize

from metrics.programs import load_program

IMAGENET_MEAN, IMAGENET_STD = [2 * m - 1 for m in (0.485, 0.456, 0.406)], [2 * s for s in (0.229, 0.224, 0.225)]
LPIPS_HEADS = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth"
LPIPS_FILE = "lpips_vgg_v0.1.pth"  # the heads' file in torch hub's folder
UNREADABLE = (OSError, RuntimeError, KeyError, pickle.UnpicklingError)  # errors of downloading or reading a file


class VGG19Features(nn.Module):
    """VGG19 (Simonyan and Zisserman 2015) up to its fourth convolution, before the ReLU, with torchvision's weights."""

    def __init__(self) -> None:
        from torchvision.models import VGG19_Weights, vgg19

        super().__init__()
        self.layers = _first_layers("vgg19", vgg19, VGG19_Weights.IMAGENET1K_V1, 8)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 128 h_out w_out"]:
        return self.layers(normalize(images, IMAGENET_MEAN, IMAGENET_STD))


class LPIPSFeatures(nn.Module):
    """Features whose mean squared difference is LPIPS, version 0.1, with VGG16 (Zhang et al. 2018, eq. 1).

    LPIPS sums squared differences of normalised features, weighted by channel; here, features are scaled by the root of
    the weight instead. (torch-fidelity's LPIPS has no gradient.) `heads` is the file of these weights; None downloads
    it.
    """

    ENDS = (4, 9, 16, 23, 30)  # last layers of VGG16's slices: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3

    def __init__(self, heads: str | None = None) -> None:
        from torchvision.models import VGG16_Weights, vgg16

        super().__init__()
        for number, weight in enumerate(_read_heads(heads)):
            self.register_buffer(f"scale_{number}", weight.sqrt())  # [1 c 1 1]
        layers = _first_layers("lpips", vgg16, VGG16_Weights.IMAGENET1K_V1, self.ENDS[-1])
        starts = (0, *self.ENDS[:-1])
        self.slices = nn.ModuleList(layers[start:end] for start, end in zip(starts, self.ENDS, strict=True))

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        x, features = normalize(images, IMAGENET_MEAN, IMAGENET_STD), []
        for number, layers in enumerate(self.slices):
            x = layers(x)
            positions = x.shape[-2] * x.shape[-1]
            unit = F.normalize(x.float(), dim=1, eps=1e-10)
            features.append((self.get_buffer(f"scale_{number}") * unit / positions**0.5).flatten(1))
        joined = torch.cat(features, dim=1)
        return joined * joined.shape[1] ** 0.5  # a mean of squares is then what their sum was


class ProgramFeatures(nn.Module):
    """A program that takes images in [0, 255]; its features are its output, or the first of several."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.program = load_program(path)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Tensor:
        output = self.program((images + 1) * 127.5)
        return output[0] if isinstance(output, tuple | list) else output


def _first_layers(name: str, network: Callable[[], Any], weights: Any, num: int) -> nn.Sequential:
    """Load the first `num` layers of torchvision's network, with ReLUs that are not in place."""
    with torch.device("meta"):
        layers = network().features[:num]
    try:
        state_dict = weights.get_state_dict(progress=True, check_hash=True)
    except UNREADABLE as error:
        raise ValueError(
            f"network {name}: its weights could not be downloaded ({error}); put torchvision's file into "
            f"{torch.hub.get_dir()}/checkpoints, or give network a program that you trust, a .pt2 or TorchScript file"
        ) from error
    layers.load_state_dict({key: state_dict[f"features.{key}"] for key in layers.state_dict()}, assign=True)
    return nn.Sequential(*(nn.ReLU() if isinstance(layer, nn.ReLU) else layer for layer in layers))


def _read_heads(path: str | None) -> list[Tensor]:
    """Read the nonnegative weights of each layer's channels from a file, or download them."""
    folder, options = f"{torch.hub.get_dir()}/checkpoints", {"map_location": "cpu", "weights_only": True}
    try:
        if path is None:
            heads = torch.hub.load_state_dict_from_url(LPIPS_HEADS, file_name=LPIPS_FILE, **options)
        else:
            heads = torch.load(Path(path), **options)
        return [heads[f"lin{index}.model.1.weight"].float().clamp(min=0) for index in range(len(LPIPSFeatures.ENDS))]
    except UNREADABLE as error:
        problem = f"network lpips: its heads could not be downloaded; put them into {folder}/{LPIPS_FILE}"
        problem = f"heads {path}: not the file of LPIPS's heads for VGG16" if path else problem
        raise ValueError(f"{problem} ({error}); give heads the lpips package's weights/v0.1/vgg.pth") from error


NETWORKS: dict[str, type[nn.Module]] = {"vgg19": VGG19Features, "lpips": LPIPSFeatures}


def perceptual_network(name: str, heads: str | None = None) -> nn.Module:
    """Load a frozen network by name, or a program's file; `heads` is LPIPS's file, by default downloaded."""
    if name not in NETWORKS and not Path(name).is_file():
        raise ValueError(
            f"network {name}: no such file; choose from {', '.join(NETWORKS)}, or a program (.pt2) that you trust"
        )
    if heads is not None and name != "lpips":
        raise ValueError(f"--auxiliary heads {heads}: network {name} has none; leave it out, or use network lpips")
    options = {} if heads is None else {"heads": heads}
    network = NETWORKS[name](**options) if name in NETWORKS else ProgramFeatures(name)
    return network.requires_grad_(False).eval()
