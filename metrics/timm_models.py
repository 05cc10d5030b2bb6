"""timm's image models as feature extractors."""

import math
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from jaxtyping import Float, Shaped, UInt8
from timm.data import resolve_model_data_config
from timm.models import is_model, load_state_dict
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms


class TimmFeatures(nn.Module):
    """A timm model on uint8 images of any size: returns features before the classifier and, if it has one,
    log-probabilities. Preprocessing is timm's for evaluation, but in float32 rather than PIL's 8 bits."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        config = resolve_model_data_config(model)
        self.model: Any = model
        self.size: tuple[int, int] = config["input_size"][1:]
        self.scale_size = tuple(math.floor(side / config["crop_pct"]) for side in self.size)
        self.crop_mode, self.interpolation = config["crop_mode"], InterpolationMode(config["interpolation"])
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(config[name])[:, None, None], persistent=False)
        self.num_classes = int(getattr(model, "num_classes", 0))

    def forward(self, images: UInt8[Tensor, "n 3 h w"]) -> tuple[Tensor, ...]:
        hidden = self.model.forward_features(self.preprocess(images))
        features = self.model.forward_head(hidden, pre_logits=True).flatten(1)
        if not self.num_classes:
            return (features,)
        return features, self.model.forward_head(hidden).float().log_softmax(dim=1)

    def maps(self, images: Shaped[Tensor, "n 3 h w"]) -> Float[Tensor, "n d h_out w_out"]:
        """Return the last spatial features of images in [0, 255], which are resized without a crop."""
        pixels = transforms.resize(images.float(), list(self.size), self.interpolation, antialias=True)
        normalised = (pixels.clamp(0, 255) / 255 - self.mean) / self.std
        options = {"indices": 1, "norm": True, "output_fmt": "NCHW", "intermediates_only": True}
        return self.model.forward_intermediates(normalised, **options)[0]

    def preprocess(self, images: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h_out w_out"]:
        """Resize with antialiasing, normalise and crop to the centre, as the model's configuration says."""
        pixels = transforms.resize(images.float(), self._scaled(images.shape[-2:]), self.interpolation, antialias=True)
        normalised = (pixels.clamp(0, 255) / 255 - self.mean) / self.std
        return transforms.center_crop(normalised, list(self.size))  # pads small images with 0, the mean colour

    def _scaled(self, size: Sequence[int]) -> list[int]:
        """Return the size before the crop: `scale_size` if squashed, or one of the image's aspect ratio that covers
        `scale_size` or, with a border, fits into it."""
        if self.crop_mode == "squash":
            return list(self.scale_size)
        if self.crop_mode == "center" and len(set(self.scale_size)) == 1:
            return [self.scale_size[0]]  # torchvision's rule: the shorter side
        ratios = [side / scaled for side, scaled in zip(size, self.scale_size, strict=True)]
        ratio = max(ratios) if self.crop_mode == "border" else min(ratios)
        return [round(side / ratio) for side in size]


def find_timm(name: str) -> None:
    """Raise `ValueError`, with similar names, unless timm has a model of this name."""
    architecture, _, tag = name.partition(".")
    tagged = timm.list_models(f"{architecture}.*", pretrained=True) if is_model(architecture) else []
    if not is_model(name) or (tag and name not in tagged):
        close = get_close_matches(name, tagged or timm.list_models(), n=3)
        hint = f"; it has {', '.join(close)}" if close else ""
        raise ValueError(f"timm {timm.__version__} has no such model{hint}")


def is_downloaded(name: str) -> bool:
    """Whether the cache of the hub has weights of this model."""
    repository = getattr(timm.get_pretrained_cfg(name), "hf_hub_id", None)
    files = ("model.safetensors", "pytorch_model.bin")
    return bool(repository) and any(isinstance(try_to_load_from_cache(repository, file), str) for file in files)


def load_timm(name: str, weights_path: str | Path | None = None) -> TimmFeatures:
    """Load a model with timm's weights or a file's; without the classifier's, it has features only."""
    settings: dict[str, Any] = {}
    if weights_path is not None:
        state_dict = load_state_dict(str(weights_path), weights_only=True)
        classifiers = getattr(timm.get_pretrained_cfg(name), "classifier", None) or ()
        classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
        keys = [f"{classifier}.{kind}" for classifier in classifiers for kind in ("weight", "bias")]
        num_classes = next((len(state_dict[key]) for key in keys if key in state_dict), 0)
        overlay = {"state_dict": state_dict, "num_classes": num_classes, "label_offset": 0}
        settings = {"num_classes": num_classes, "pretrained_cfg_overlay": overlay}
    model: Any = timm.create_model(name, pretrained=True, **settings)
    model.pretrained_cfg.pop("state_dict", None)  # a second copy of the weights
    return TimmFeatures(model.eval().requires_grad_(False))
