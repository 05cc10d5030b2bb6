"""What a training step minimises: the diffusion's loss, auxiliary terms, and the weights that their times ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from autoencoders.codec import Codec, PixelCodec
from diffusion.diffusion import Auxiliary, Diffusion
from diffusion.times import Times
from experiment.config import AuxiliaryConfig
from metrics.perceptual import perceptual_network
from training.batches import Batch
from training.phases import Phase


@dataclass(frozen=True)
class Objective:
    """Per-sample terms of a batch; `times` that learn from the losses are shown those of all processes."""

    diffusion: Diffusion
    times: Times
    accelerator: Accelerator
    auxiliary: Sequence[Auxiliary] = ()

    def __call__(self, model: nn.Module, batch: Batch, phase: Phase) -> dict[str, Float[Tensor, " b"]]:
        """`loss`, which is to be minimised in this phase of the training, and what it is made of."""
        terms = self.diffusion.during(phase.number, phase.progress).training_loss(
            model, batch.x_0, batch.y, t=batch.t, noise=batch.noise, auxiliary=self.auxiliary, more=batch.more
        )
        if self.times.learns:
            t, losses = self.accelerator.gather((batch.t, terms["loss"].detach()))
            self.times.observe(t, losses)
        return {name: batch.weight * values for name, values in terms.items()}


class Perceptual:
    """Squared distance between a frozen network's features of two images (Johnson et al. 2016, eq. 2).

    Raises:
        ValueError: where `x_0` is no image, or the network cannot be had.
    """

    is_fixed = True

    def __init__(self, config: AuxiliaryConfig, model: nn.Module, codec: Codec, device: torch.device) -> None:
        if not isinstance(codec, PixelCodec):
            raise ValueError("--auxiliary perceptual: it looks at images, not at latents; use --autoencoder pixel")
        self.network = perceptual_network(config.network, config.heads).to(device)

    def __call__(self, predicted: Tensor, x_0: Tensor, y: Tensor) -> Float[Tensor, " b"]:
        with torch.no_grad():
            true = self.network(x_0)
        return (self.network(predicted) - true).float().square().flatten(1).mean(dim=1)


class FeatureMatching:
    """Squared distance between the backbone's own encoder features of the predicted and the true `x_0`, as it sees data
    without noise; the true side is detached. The mean over the features.

    Raises:
        ValueError: where the backbone has no encoder to ask.
    """

    is_fixed = False

    def __init__(self, config: AuxiliaryConfig, model: nn.Module, codec: Codec, device: torch.device) -> None:
        if not hasattr(model, "encode"):
            raise ValueError(
                f"--auxiliary feature_matching: it wants the features of a U-Net's encoder, and {type(model).__name__} "
                "has none; use --model UNet-..."
            )
        self.encode: Callable[..., list[Tensor]] = model.encode  # pyright: ignore[reportAttributeAccessIssue]

    def __call__(self, predicted: Tensor, x_0: Tensor, y: Tensor) -> Float[Tensor, " b"]:
        t = torch.zeros(len(y), device=y.device)
        with torch.no_grad():
            true = self.encode(x_0, t, y)
        pairs = zip(self.encode(predicted, t, y), true, strict=True)
        return torch.stack([(ours - theirs).float().square().flatten(1).mean(dim=1) for ours, theirs in pairs]).mean(0)


AUXILIARY = {"perceptual": Perceptual, "feature_matching": FeatureMatching}


def build_auxiliary(
    configs: Sequence[AuxiliaryConfig], model: nn.Module, codec: Codec, device: torch.device
) -> list[Auxiliary]:
    """The auxiliary terms of a configuration; `model` is the backbone as it was built, which they may look into.

    Raises:
        ValueError: for an unknown or repeated kind, or one that does not fit, in words.
    """
    terms: list[Auxiliary] = []
    for config in configs:
        if config.kind not in AUXILIARY:
            raise ValueError(f"--auxiliary {config.kind}: unknown, choose from {', '.join(AUXILIARY)}")
        if config.kind in [term.name for term in terms]:
            raise ValueError(f"--auxiliary {config.kind}: given twice")
        if not config.weight > 0:
            raise ValueError(f"--auxiliary {config.kind}: weight {config.weight} must be above 0")
        term = AUXILIARY[config.kind](config, model, codec, device)
        terms.append(Auxiliary(config.kind, config.weight, term, term.is_fixed))
    return terms
