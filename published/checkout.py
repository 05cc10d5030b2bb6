"""The published implementation, from a user's own checkout of its repository, for `scripts/benchmark.py --compare`.

Nothing of it is kept here: its packages are loaded under other names, and trained and sampled as its scripts do.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = {"DiT": ("dit", "DiT_S_2"), "UViT": ("uvit", "UViT_S_2")}  # modules and constructors


class Published:
    """Models and diffusion of a checkout of the XSwin authors' repository.

    Raises:
        FileNotFoundError: when the folder is not such a checkout.
    """

    def __init__(self, checkout: Path) -> None:
        self.models = _load_package("published_models", checkout / "models")
        self.diffusion = _load_package("published_diffusion", checkout / "diffusion")

    def create(self, name: str, *, latent_size: int, num_classes: int) -> nn.Module:
        """The paper's model of that name, in training mode.

        Raises:
            ValueError: for a model that the paper does not have.
        """
        if name in PLAIN:
            module, size = PLAIN[name]
            constructor = getattr(importlib.import_module(f"published_models.{module}"), size)
            return constructor(input_size=latent_size, num_classes=num_classes).train()
        if name not in ("XSwin", "USwin"):
            raise ValueError(f"--models {name}: the published implementation has XSwin, USwin, DiT and UViT")
        return self.models.XNetSwinTransformerDiffusion(
            [1, 1],
            192,
            [3, 3],
            [6, 12],
            [2, 2],
            num_classes=num_classes,
            global_stages=3,
            input_size=[latent_size, latent_size],
            final_downsample=False,
            residual_cross_attention=name == "XSwin",
            input_channels=4,
            output_channels=8,
            class_dropout_prob=0.1,
            smooth_conv=True,
        ).train()

    def loss(self) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
        """Of (model, x_0, y), as their training script computes it."""
        diffusion = self.diffusion.create_diffusion(timestep_respacing="")

        def loss(model: nn.Module, x_0: Tensor, y: Tensor) -> Tensor:
            t = torch.randint(0, diffusion.path.num_timesteps, (len(x_0),), device=x_0.device)
            return diffusion.training_losses(model, x_0, t, {"y": y})["loss"].mean()

        return loss

    def sample(self, model: Any, noise: Tensor, y: Tensor, *, num_classes: int, num_steps: int, scale: float) -> Tensor:
        """Guided ancestral sampling as their scripts do it: both halves of guidance as one batch of twice the size."""
        diffusion = self.diffusion.create_diffusion(str(num_steps))
        labels = torch.cat([y, torch.full_like(y, num_classes)])
        doubled = torch.cat([noise, noise])
        return diffusion.p_sample_loop(
            model.forward_with_cfg,
            doubled.shape,
            doubled,
            clip_denoised=False,
            model_kwargs={"y": labels, "cfg_scale": scale},
            device=noise.device,
        ).chunk(2)[0]


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float = 0.9999) -> None:
    """Parameter by parameter, as their training script does it."""
    averages = dict(average.named_parameters())
    for name, parameter in model.named_parameters():
        averages[name].mul_(decay).add_(parameter.data, alpha=1 - decay)


def _load_package(name: str, folder: Path) -> ModuleType:
    source = folder / "__init__.py"
    if not source.is_file():
        raise FileNotFoundError(
            f"--compare {folder.parent}: no {folder.name}/ package there; give the repository's folder"
        )
    spec = importlib.util.spec_from_file_location(name, source, submodule_search_locations=[str(folder)])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
