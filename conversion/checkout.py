"""The published XSwin implementation, from a user's checkout of its repository, for `scripts/benchmark.py --compare`.

This repository contains none of that code: its packages are imported from the checkout under other names, and models
are trained and sampled as its scripts do it.
"""

import importlib.util
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

BASELINES = {"DiT": ("dit", "DiT_S_2"), "UViT": ("uvit", "UViT_S_2")}  # module and constructor


class PublishedCheckout:
    """Models and diffusion of a checkout of the XSwin authors' repository. Raises FileNotFoundError if it is none."""

    def __init__(self, checkout: Path) -> None:
        self.models = _load_package("published_models", checkout / "models")
        self.diffusion = _load_package("published_diffusion", checkout / "diffusion")

    def create(self, name: str, *, latent_size: int, num_classes: int) -> Any:
        """Create a model of the paper, in training mode. Raises ValueError for an unknown name."""
        if name in BASELINES:
            module, constructor = BASELINES[name]
            create_model = getattr(importlib.import_module(f"published_models.{module}"), constructor)
            return create_model(input_size=latent_size, num_classes=num_classes).train()
        if name not in ("XSwin", "USwin"):
            raise ValueError(f"--models {name}: the published implementation has XSwin, USwin, DiT and UViT")
        sizes = {"num_classes": num_classes, "input_size": [latent_size] * 2, "input_channels": 4, "output_channels": 8}
        parts = {"global_stages": 3, "final_downsample": False, "smooth_conv": True, "class_dropout_prob": 0.1}
        parts["residual_cross_attention"] = name == "XSwin"
        return self.models.XNetSwinTransformerDiffusion([1, 1], 192, [3, 3], [6, 12], [2, 2], **sizes, **parts).train()

    def step(
        self, name: str, num_classes: int, device: torch.device, precision: str, batch: Callable[[], tuple[Any, Any]]
    ) -> Callable[[], None]:
        """Return an optimizer step as in the authors' script, fused in bf16; `batch()` gives latents and labels."""
        model = self.create(name, latent_size=8, num_classes=num_classes).to(device)
        ema = deepcopy(model).requires_grad_(False).eval()
        ema_parameters = dict(ema.named_parameters())
        bf16, diffusion = precision == "bf16", self.diffusion.create_diffusion(timestep_respacing="")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0, fused=bf16 or None)

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                x_0, y = batch()
                t = torch.randint(0, diffusion.num_timesteps, (len(x_0),), device=device)
                loss = diffusion.training_losses(model, x_0, t, {"y": y})["loss"].mean()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    ema_parameters[key].mul_(0.9999).add_(parameter.data, alpha=1 - 0.9999)

        return step

    def sample(self, model: Any, noise: Tensor, y: Tensor, *, num_classes: int, num_steps: int, scale: float) -> Tensor:
        """Sample as the authors' scripts do: ancestral sampling with classifier-free guidance in a doubled batch."""
        diffusion = self.diffusion.create_diffusion(str(num_steps))
        labels = torch.cat([y, torch.full_like(y, num_classes)])
        doubled = torch.cat([noise, noise])
        options = {"clip_denoised": False, "model_kwargs": {"y": labels, "cfg_scale": scale}, "device": noise.device}
        return diffusion.p_sample_loop(model.forward_with_cfg, doubled.shape, doubled, **options).chunk(2)[0]


def _load_package(name: str, folder: Path) -> ModuleType:
    """Import the package in a folder under another name."""
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
