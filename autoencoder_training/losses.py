"""Losses of an autoencoder: the variational bound with a perceptual distance, and an adversarial term."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from autoencoder_training.autoencoder_config import DiscriminatorConfig, LossConfig
from autoencoder_training.model import AutoencoderOutput, Autoencoding
from metrics.perceptual import perceptual_network

Critic = Callable[[Tensor], Tensor]  # a discriminator: images to logits, positive for real images


NORMS: dict[str, Callable[[nn.Conv2d], list[nn.Module]]] = {
    "group": lambda conv: [conv, nn.GroupNorm(min(32, conv.out_channels // 4), conv.out_channels)],
    "spectral": lambda conv: [spectral_norm(conv)],
}


class PatchDiscriminator(nn.Module):
    """Patch discriminator: a logit per overlapping patch, positive for real images (Isola et al. 2017, section 3.2.2).

    It has `num_layers` convolutions of stride two, whose width doubles up to eight times `channels`, and two of stride
    one. With three layers a logit has a receptive field of 70 pixels. `norm` is `group`, or `spectral` (Miyato et al.
    2018); neither mixes the images of a batch.
    """

    def __init__(self, *, channels: int = 64, num_layers: int = 3, norm: str = "group") -> None:
        super().__init__()
        widths = [channels * min(2**level, 8) for level in range(num_layers + 1)]
        strides = [2] * (num_layers - 1) + [1]
        layers: list[nn.Module] = [_conv(3, channels, 2), nn.LeakyReLU(0.2)]
        for narrow, wide, stride in zip(widths[:-1], widths[1:], strides, strict=True):
            layers += [*NORMS[norm](_conv(narrow, wide, stride)), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, _conv(widths[-1], 1, 1))

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h_out w_out"]:
        return self.layers(images)


def _conv(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, 4, stride, padding=1)
    nn.init.normal_(conv.weight, std=0.02)
    nn.init.zeros_(conv.bias)  # pyright: ignore[reportArgumentType]
    return conv


class Adversarial(NamedTuple):
    """Adversarial losses: the discriminator's, of logits of real and fake patches; the autoencoder's, of fake ones."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    autoencoder: Callable[[Tensor], Tensor]


ADVERSARIAL = {
    "hinge": Adversarial(lambda real, fake: (F.relu(1 - real) + F.relu(1 + fake)) / 2, lambda fake: -fake),
    "bce": Adversarial(lambda real, fake: (F.softplus(-real) + F.softplus(fake)) / 2, lambda fake: F.softplus(-fake)),
}


@dataclass(frozen=True)
class AutoencoderObjective:
    """Loss terms of the autoencoder and the discriminator, each averaged over an image's values, and their gradient."""

    config: LossConfig
    discriminator: DiscriminatorConfig
    network: nn.Module | None  # of the perceptual distance

    def likelihood(
        self, reconstruction: Float[Tensor, "b 3 h w"], images: Float[Tensor, "b 3 h w"], s: Tensor
    ) -> dict[str, Float[Tensor, " b"]]:
        """Compute `error`, `perceptual` and `nll = (error + perceptual) / exp(s) + s`.

        Without the perceptual term and up to a constant, `nll` is the negative log-likelihood of the pixels under a
        Laplace distribution of scale exp(s) for l1, and twice that under a normal of variance exp(s) for l2.
        """
        difference = reconstruction - images
        error = _mean(difference.abs() if self.config.error == "l1" else difference.square())
        perceptual = torch.zeros_like(error)
        if self.network is not None:
            with torch.no_grad():
                target = self.network(images)
            perceptual = _mean((self.network(reconstruction) - target).float().square())
        nll = (error + self.config.perceptual_weight * perceptual) * torch.exp(-s) + s
        return {"error": error, "perceptual": perceptual, "nll": nll}

    def backward(
        self,
        accelerator: Accelerator,
        coded: AutoencoderOutput,
        images: Float[Tensor, "b 3 h w"],
        autoencoding: Autoencoding,
        critic: Critic | None,
    ) -> dict[str, Float[Tensor, " b"]]:
        """Compute the loss, accumulate its gradient in the autoencoder's parameters, and return the terms.

        The gradient with respect to the reconstruction is assembled first: the adaptive weight needs its two parts at
        the decoder's last layer, and so one backward pass through the autoencoder suffices.
        """
        s = autoencoding.log_scale
        reconstruction = coded.reconstruction.float()
        pixels = reconstruction.detach().requires_grad_()
        with accelerator.autocast():
            terms = self.likelihood(pixels, images, s.detach())
        (gradient,) = torch.autograd.grad(terms["nll"].mean(), pixels)
        terms["kl"] = kl_divergence(coded.mean.float(), coded.log_variance.float())
        loss = terms["nll"] + self.config.kl_weight * terms["kl"]

        if critic is not None:
            with accelerator.autocast():
                logits = critic(pixels).float()
            terms["adversarial"] = _mean(ADVERSARIAL[self.discriminator.loss].autoencoder(logits))
            (adversarial,) = torch.autograd.grad(terms["adversarial"].mean(), pixels)

            def at_last_layer(pixel_gradient: Tensor) -> Tensor:
                weight = autoencoding.autoencoder.decoder.conv_out.weight
                (weight_gradient,) = torch.autograd.grad(reconstruction, weight, pixel_gradient, retain_graph=True)
                return accelerator.reduce(weight_gradient, "mean")  # pyright: ignore[reportReturnType]

            gradients = at_last_layer(gradient), at_last_layer(adversarial)
            adaptive = adaptive_weight(*gradients, self.discriminator.max_adaptive)
            # A gradient that is not finite is ignored here; the discriminator's own guard deals with its cause.
            adaptive, adversarial = (torch.nan_to_num(tensor, 0.0, 0.0, 0.0) for tensor in (adaptive, adversarial))
            weight = self.discriminator.weight * adaptive
            gradient = gradient + weight * adversarial
            loss = loss + weight * torch.nan_to_num(terms["adversarial"], 0.0, 0.0, 0.0)
            terms["adaptive_weight"] = adaptive.expand(len(loss))

        # A surrogate loss with the assembled gradient: at the reconstruction, at s, and of the KL divergence.
        through_pixels = (reconstruction * gradient).sum()
        error = terms["error"] + self.config.perceptual_weight * terms["perceptual"]
        through_scale = (error.detach() * torch.exp(-s) + s).mean()
        accelerator.backward(through_pixels + through_scale + self.config.kl_weight * terms["kl"].mean())
        return {"loss": loss, **terms}

    def discriminator_loss(
        self, critic: Critic, images: Float[Tensor, "b 3 h w"], reconstruction: Float[Tensor, "b 3 h w"]
    ) -> dict[str, Float[Tensor, " b"]]:
        """Compute the discriminator's loss, and its accuracy on patches of either kind (`real_found`, `fake_found`)."""
        real, fake = critic(torch.cat([images, reconstruction])).float().chunk(2)
        return {
            "discriminator": _mean(ADVERSARIAL[self.discriminator.loss].discriminator(real, fake)),
            "real_found": _mean((real > 0).float()),
            "fake_found": _mean((fake < 0).float()),
        }


def build_discriminator(
    config: DiscriminatorConfig, device: torch.device
) -> tuple[PatchDiscriminator, torch.optim.Optimizer]:
    critic = PatchDiscriminator(channels=config.channels, num_layers=config.num_layers, norm=config.norm).to(device)
    return critic, torch.optim.AdamW(critic.parameters(), config.lr, (0.5, 0.9), weight_decay=0.0, fused=True)


def build_objective(
    config: LossConfig, discriminator: DiscriminatorConfig, device: torch.device
) -> AutoencoderObjective:
    """Build the objective and load its perceptual network. Raises ValueError with the alternatives if that fails."""
    if config.perceptual is None:
        if config.heads is not None:
            raise ValueError(f"--loss.heads {config.heads}: it belongs to --loss.perceptual lpips, which is null")
        return AutoencoderObjective(config, discriminator, None)
    try:
        network = perceptual_network(config.perceptual, config.heads).to(device)
    except ValueError as error:
        raise ValueError(f"--loss.perceptual: {error}, or null for none") from error
    return AutoencoderObjective(config, discriminator, network)


def kl_divergence(mean: Float[Tensor, "b c h w"], log_variance: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """KL divergence of the posterior from a standard normal in nats per value (Kingma and Welling 2014, appendix B)."""
    return _mean((mean.square() + log_variance.exp() - 1 - log_variance) / 2)


def adaptive_weight(likelihood: Tensor, adversarial: Tensor, at_most: float) -> Float[Tensor, ""]:
    """Ratio of the norms of two gradients, clamped (Esser et al. 2021, eq. 7)."""
    return (likelihood.norm() / (adversarial.norm() + 1e-6)).clamp(max=at_most)


def _mean(values: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    return values.flatten(1).mean(dim=1)
