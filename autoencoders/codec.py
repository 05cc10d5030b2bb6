"""Codecs, which convert between images and the space in which a backbone denoises.

Encoding has two steps. The first is expensive and deterministic, so it can be cached; the second is cheap and random,
and runs again in every epoch:

    stored = codec.prepare(images)      # once: posterior moments, latents, or the pixels themselves
    x_0 = codec.draw(stored, noise)     # every time: about zero mean and unit variance
    images = codec.decode(x_0)
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor, nn

from autoencoders.pretrained import EMBEDDED as EMBEDDED
from autoencoders.pretrained import AutoencoderError as AutoencoderError
from autoencoders.pretrained import load_autoencoder

Latents = Float[Tensor, "b c h w"]
Images = UInt8[Tensor, "b 3 H W"]


@dataclass(frozen=True)
class Kind:
    """How to use one of diffusers' autoencoder classes.

    Args:
        encoding: names of the modules that latents depend on.
        factors: computes from its configuration the factors of downsampling and upsampling.
        store: extracts the tensor to store from the result of its `encode`.
        draw: computes a latent from what is stored and noise; the default is for autoencoders without a posterior.
        representation: its latents are the features of a frozen network; it normalises them itself, and its images are
            in [0, 1] and of one size.
    """

    encoding: frozenset[str]
    factors: Callable[[Any], tuple[int, int]]
    store: Callable[[Any], Tensor]
    draw: Callable[[Tensor, Tensor], Tensor] = lambda latents, noise: latents
    representation: bool = False


def _posterior_sample(moments: Float[Tensor, "b moments h w"], noise: Latents) -> Latents:
    """Sample the posterior by reparameterisation (Kingma and Welling 2014, eq. 10)."""
    mean, log_variance = moments.chunk(2, dim=1)
    return mean + torch.exp(0.5 * log_variance) * noise


def _total_factor(levels: Sequence[Any], factor: int = 2) -> int:
    """The factor between the first and the last of several levels, if adjacent ones differ by `factor`."""
    return factor ** (len(levels) - 1)


ENCODER = frozenset({"encoder"})
_TINY = Kind(  # in diffusers, its images are in [-1, 1] too
    ENCODER,
    lambda c: (_total_factor(c.num_encoder_blocks), _total_factor(c.num_decoder_blocks, c.upsampling_scaling_factor)),
    store=lambda encoded: encoded.latents,
)
KINDS = {
    "AutoencoderKL": Kind(
        ENCODER | {"quant_conv"},
        lambda c: (_total_factor(c.block_out_channels), _total_factor(c.block_out_channels)),
        store=lambda encoded: torch.cat([encoded.latent_dist.mean, encoded.latent_dist.logvar], dim=1),
        draw=_posterior_sample,
    ),
    "AutoencoderTiny": _TINY,
    "PooledTinyAutoencoder": _TINY,
    "AutoencoderDC": Kind(  # Chen et al. 2025: a factor of 32 and more
        ENCODER,
        lambda c: (_total_factor(c.encoder_block_out_channels), _total_factor(c.decoder_block_out_channels)),
        store=lambda encoded: encoded.latent,
    ),
    "AutoencoderRAE": Kind(  # Zheng et al. 2025
        ENCODER | {"encoder_mean", "encoder_std", "_latents_mean", "_latents_std"},
        lambda c: (c.patch_size, c.patch_size),
        store=lambda encoded: encoded.latent,
        representation=True,
    ),
}


class Codec(nn.Module):
    """Base class of codecs: frozen, always in eval mode, without trainable parameters."""

    source: str  # its name in `--autoencoder`
    channels: int  # channels of `x_0`
    factor: int  # downsampling factor of the sides of an image
    identity: Any  # all that `x_0` depends on, weights by hash; latent caches must match it
    provenance: Any  # the identity and where it came from, for records
    density_offset: float = 0.0  # added to the bits per dimension of `x_0`'s density to get those of 8-bit pixels
    limit: float | None = None  # largest absolute value of `x_0`
    in_pixel_space: bool = False  # whether `x_0` is the image itself

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return channels, height and width of `x_0` for an image of this size."""
        return self.channels, height // self.factor, width // self.factor

    def prepare(self, images: Images) -> Shaped[Tensor, "b ..."]:
        """Return what is stored for images: by default, the images themselves."""
        check_images(images)
        return images

    def draw(self, stored: Shaped[Tensor, "b ..."], noise: Latents) -> Latents:
        """Compute `x_0` from what is stored and unit normal `noise` of the shape of `x_0`."""
        raise NotImplementedError

    def encode(self, images: Images, generator: torch.Generator | None = None) -> Latents:
        """Prepare images and draw `x_0`; without a generator, the noise is zero."""
        shape, device = (len(images), *self.latent_shape(*images.shape[-2:])), images.device
        noise = torch.zeros(shape, device=device)
        if generator is not None:  # not by normal_, whose values depend on the memory format
            noise = torch.randn(shape, generator=generator, device=device)
        return self.draw(self.prepare(images), noise)

    def decode(self, x_0: Latents) -> Images:
        raise NotImplementedError


class LatentCodec(Codec):
    """A frozen autoencoder in diffusers' format (Rombach et al. 2022, section 3.1): `x_0 = (z - shift) * scale`.

    `z` is a sample of the posterior of an `AutoencoderKL`, or the latent of another class. `scale` and `shift` are the
    autoencoder's `scaling_factor` and `shift_factor`, or follow from its `latents_mean` and `latents_std` per channel.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, source: str = "embedded") -> None:
        super().__init__()
        self.source = source
        self.autoencoder: Any = load_autoencoder(source, KINDS).requires_grad_(False)
        self.kind = KINDS[type(self.autoencoder).__name__]
        config = self.autoencoder.config
        is_representation = self.kind.representation
        self.channels = int(config.encoder_hidden_size if is_representation else config.latent_channels)
        self.factor, upsampling = self.kind.factors(config)
        in_channels = config.num_channels if is_representation else config.in_channels
        out_channels = config.get("out_channels", in_channels)
        if self.factor != upsampling or not in_channels == out_channels == 3:
            raise AutoencoderError(
                f"--autoencoder {source}: it makes {out_channels} channels of {in_channels} and "
                f"{upsampling} pixels of {self.factor}; images come back as RGB of the same size, take one that does so"
            )
        self.only_size = self.autoencoder.decoder_image_size if is_representation else None
        if is_representation:
            self.normalisation = {"scale": float(config.scaling_factor), "shift": 0.0}
            self.autoencoder.register_to_config(scaling_factor=1.0)  # diffusers would scale a second time
        else:
            self.normalisation = _normalisation(source, config)
        for name, values in self.normalisation.items():
            per_channel = torch.tensor(values).expand(self.channels)
            self.register_buffer(name, per_channel[:, None, None].clone(), persistent=False)
        super().train(False)

    def train(self, mode: bool = True) -> "LatentCodec":
        """Stay in eval mode, since the autoencoder is frozen."""
        return self

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that latents depend on, which a latent cache must match; excludes the decoder and the source."""
        return {
            "codec": type(self.autoencoder).__name__,
            "sha256": self._sha256(encoding=True),
            "input_range": "[-1, 1]",
            **self.normalisation,
        }

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """The identity, the source of the autoencoder and a hash of its decoder, for records."""
        return {**self.identity, "autoencoder": self.source, "decoder_sha256": self._sha256(encoding=False)}

    def _sha256(self, *, encoding: bool) -> str:
        """Hash the weights that latents depend on, or all the others."""
        weights = self.autoencoder.state_dict()
        part = {name: weights[name] for name in weights if (name.partition(".")[0] in self.kind.encoding) == encoding}
        return weights_sha256(part)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the shape of `x_0`; raise `AutoencoderError` for an image size that the autoencoder cannot encode."""
        if min(height, width) < self.factor:
            raise AutoencoderError(
                f"--data.image_size {height}x{width} is smaller than one latent pixel of the autoencoder "
                f"'{self.source}', {self.factor}x{self.factor}; use larger images or --autoencoder pixel"
            )
        if height % self.factor or width % self.factor:
            raise AutoencoderError(
                f"--data.image_size {height}x{width}: the autoencoder '{self.source}' reduces by {self.factor}, "
                f"which must divide both sides; take a multiple of {self.factor} or --autoencoder pixel"
            )
        if self.only_size and (height, width) != (self.only_size, self.only_size):
            raise AutoencoderError(
                f"--data.image_size {height}x{width}: '{self.source}' only gives images of {self.only_size} pixels"
            )
        return super().latent_shape(height, width)

    @torch.inference_mode()
    def prepare(self, images: Images) -> Float[Tensor, "b moments h w"]:
        """Return the latents or, for an `AutoencoderKL`, the posterior's mean and log-variance along the channels."""
        check_images(images)
        self.latent_shape(*images.shape[-2:])
        pixels = images.float() / 127.5 - 1
        return self.kind.store(self.autoencoder.encode((pixels + 1) / 2 if self.kind.representation else pixels))

    def draw(self, stored: Float[Tensor, "b moments h w"], noise: Latents) -> Latents:
        """Sample the posterior, if there is one, and normalise the latent."""
        return (self.kind.draw(stored.float(), noise) - self.shift) * self.scale

    @torch.inference_mode()
    def decode(self, x_0: Latents) -> Images:
        pixels = self.autoencoder.decode(x_0.float() / self.scale + self.shift).sample
        return _to_uint8(2 * pixels - 1 if self.kind.representation else pixels)


class PixelCodec(Codec):
    """Pixel space as a codec: `x_0` is the image in [-1, 1]."""

    source = "pixel"
    channels = 3
    factor = 1
    density_offset = math.log2(127.5)
    limit = 1.0
    in_pixel_space = True
    identity: ClassVar[dict] = {"codec": "pixel", "sha256": "", "input_range": "[-1, 1]", "scale": 1.0, "shift": 0.0}
    provenance: ClassVar[dict] = {**identity, "autoencoder": "pixel", "decoder_sha256": ""}

    def draw(self, stored: Images, noise: Latents) -> Latents:
        return stored.float() / 127.5 - 1

    def encode(self, images: Images, generator: torch.Generator | None = None) -> Latents:
        """Map [0, 255] to [-1, 1]; a generator adds uniform dequantisation noise, for densities (Theis et al. 2016)."""
        check_images(images)
        levels = images.float()
        if generator is not None:
            levels = levels + torch.rand(images.shape, generator=generator, device=images.device) - 0.5
        return levels / 127.5 - 1

    def decode(self, x_0: Latents) -> Images:
        """Map [-1, 1] to [0, 255], rounded to the nearest integer."""
        return _to_uint8(x_0)


CODECS: dict[str, Callable[[], Codec]] = {"pixel": PixelCodec}  # all other names are sources of autoencoders


def create_codec(autoencoder: str) -> Codec:
    """Create a codec by name: one of `CODECS`, an embedded autoencoder, a folder in diffusers' format, or a hub id."""
    return CODECS[autoencoder]() if autoencoder in CODECS else LatentCodec(autoencoder)


def check_images(images: Tensor) -> None:
    """Raise `AutoencoderError` unless images are RGB in uint8; floats in [0, 1] would pass for almost black ones."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        kind = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
        raise AutoencoderError(f"images are {kind}; a codec takes RGB from 0 to 255 in uint8, [n, 3, h, w]")


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """Hash names and float32 values of weights, independent of their file format and precision."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        add_to_hash(digest, name, tensor)
    return digest.hexdigest()


def add_to_hash(digest: "hashlib._Hash", name: str, weight: Tensor) -> None:
    """Update the digest of weights whose names come in ascending order."""
    digest.update(name.encode())
    digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())


def _to_uint8(images: Tensor) -> Tensor:
    if not images.isfinite().all():  # NaN would silently become black
        raise AutoencoderError(
            "images are not finite: the weights of the model or of --autoencoder are broken (use an earlier "
            "checkpoint), or the sampler diverged (use more --num_steps, or another --sampler)"
        )
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def _normalisation(source: str, config: Any) -> dict[str, float | list[float]]:
    """Return scale and shift as diffusers' pipelines apply them: a number for all channels, or one for each."""
    scale, shift = float(config.scaling_factor), float(config.get("shift_factor") or 0.0)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None and std is None:
        return {"scale": scale, "shift": shift}
    if shift or mean is None or std is None or {len(mean), len(std)} != {int(config.latent_channels)}:
        raise AutoencoderError(
            f"--autoencoder {source}: config.json has to give latents_mean and latents_std together, of "
            f"{config.latent_channels} channels, and no shift_factor; fix it, or set both to null"
        )
    return {"scale": [scale / float(value) for value in std], "shift": [float(value) for value in mean]}
