"""Codecs: what stands between images and the space a backbone denoises.

A codec splits encoding in two, so that the costly, deterministic half can be cached and the cheap, random
half drawn anew every epoch:

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
    """How one of diffusers' autoencoders is used.

    `encoding` names the modules that latents depend on; `factors` of its configuration says by how much it reduces
    images and enlarges latents; `store` takes what its `encode` returns. A `representation` autoencoder has the
    features of a frozen network for latents, normalises them itself, and takes and gives images in [0, 1] of one size.
    """

    encoding: frozenset[str]
    factors: Callable[[Any], tuple[int, int]]
    store: Callable[[Any], Tensor]
    draw: Callable[[Tensor, Tensor], Tensor] = lambda latents, noise: latents  # without a posterior
    representation: bool = False


def _posterior_sample(moments: Float[Tensor, "b moments h w"], noise: Latents) -> Latents:
    """Reparameterised (Kingma and Welling 2014, eq. 10)."""
    mean, log_variance = moments.chunk(2, dim=1)
    return mean + torch.exp(0.5 * log_variance) * noise


def _halvings(blocks: Sequence[Any], by: int = 2) -> int:
    return by ** (len(blocks) - 1)


ENCODER = frozenset({"encoder"})
_TINY = Kind(  # takes and gives images in [-1, 1] like the others
    ENCODER,
    lambda c: (_halvings(c.num_encoder_blocks), _halvings(c.num_decoder_blocks, c.upsampling_scaling_factor)),
    store=lambda encoded: encoded.latents,
)
KINDS = {
    "AutoencoderKL": Kind(
        ENCODER | {"quant_conv"},
        lambda c: (_halvings(c.block_out_channels), _halvings(c.block_out_channels)),
        store=lambda encoded: torch.cat([encoded.latent_dist.mean, encoded.latent_dist.logvar], dim=1),
        draw=_posterior_sample,
    ),
    "AutoencoderTiny": _TINY,
    "PooledTinyAutoencoder": _TINY,
    "AutoencoderDC": Kind(  # Chen et al. 2025: a factor of 32 and more
        ENCODER,
        lambda c: (_halvings(c.encoder_block_out_channels), _halvings(c.decoder_block_out_channels)),
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
    """What every codec is: frozen, in eval mode, and without trainable parameters."""

    source: str  # as `--autoencoder` names it
    channels: int  # of `x_0`
    factor: int  # by how much it reduces the sides of an image
    identity: Any  # what latent caches must agree on: all that `x_0` depends on, weights by content
    provenance: Any  # for records: the identity, and where it came from
    density_offset: float = 0.0  # bits per dimension from the density of `x_0` to what is coded
    limit: float | None = None  # of the absolute values of `x_0`

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Channels, height and width of `x_0` of an image of this size."""
        return self.channels, height // self.factor, width // self.factor

    def prepare(self, images: Images) -> Shaped[Tensor, "b ..."]:
        """What is stored of images: by default they themselves."""
        check_images(images)
        return images

    def draw(self, stored: Shaped[Tensor, "b ..."], noise: Latents) -> Latents:
        """`x_0` of what is stored; `noise` is of its shape."""
        raise NotImplementedError

    def encode(self, images: Images, generator: torch.Generator | None = None) -> Latents:
        """`draw(prepare(images))`, without a generator with no noise."""
        shape, device = (len(images), *self.latent_shape(*images.shape[-2:])), images.device
        noise = torch.zeros(shape, device=device)
        if generator is not None:  # not in place: the order of normal_ follows the memory format
            noise = torch.randn(shape, generator=generator, device=device)
        return self.draw(self.prepare(images), noise)

    def decode(self, x_0: Latents) -> Images:
        raise NotImplementedError


class LatentCodec(Codec):
    """A frozen autoencoder in diffusers' format (Rombach et al. 2022, section 3.1): `x_0 = (z - shift) * scale`.

    `z` is drawn from the posterior of an `AutoencoderKL`, or is what others encode to. `scale` and `shift` are the
    autoencoder's `scaling_factor` and `shift_factor`, or its `latents_mean` and `latents_std` of each channel.
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
        self.factor, enlarged = self.kind.factors(config)
        in_channels = config.num_channels if is_representation else config.in_channels
        out_channels = config.get("out_channels", in_channels)
        if self.factor != enlarged or not in_channels == out_channels == 3:
            raise AutoencoderError(
                f"--autoencoder {source}: it makes {out_channels} channels of {in_channels} and "
                f"{enlarged} pixels of {self.factor}; images come back as RGB of the same size, take one that does so"
            )
        self.only_size = self.autoencoder.decoder_image_size if is_representation else None
        if is_representation:
            self.normalisation = {"scale": float(config.scaling_factor), "shift": 0.0}
            self.autoencoder.register_to_config(scaling_factor=1.0)  # it would scale too
        else:
            self.normalisation = _normalisation(source, config)
        for name, values in self.normalisation.items():
            per_channel = torch.tensor(values).expand(self.channels)
            self.register_buffer(name, per_channel[:, None, None].clone(), persistent=False)
        super().train(False)

    def train(self, mode: bool = True) -> "LatentCodec":
        """Stay in eval mode: a frozen autoencoder has no other."""
        return self

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a latent cache must agree on: all that latents depend on, by content; not the decoder, nor where it
        lay."""
        return {
            "codec": type(self.autoencoder).__name__,
            "sha256": self._sha256(encoding=True),
            "input_range": "[-1, 1]",
            **self.normalisation,
        }

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """For records: the identity, where the autoencoder came from, and its decoder, by content."""
        return {**self.identity, "autoencoder": self.source, "decoder_sha256": self._sha256(encoding=False)}

    def _sha256(self, *, encoding: bool) -> str:
        weights = self.autoencoder.state_dict()
        part = {name: weights[name] for name in weights if (name.partition(".")[0] in self.kind.encoding) == encoding}
        return weights_sha256(part)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Channels, height and width of the latent of an image of this size."""
        if min(height, width) < self.factor:
            raise AutoencoderError(
                f"--data.image_size {height}x{width} is smaller than the {self.factor}x{self.factor} pixels that the "
                f"autoencoder '{self.source}' makes one of; take larger images or --autoencoder pixel"
            )
        if height % self.factor or width % self.factor:
            raise AutoencoderError(
                f"--data.image_size {height}x{width}: the autoencoder '{self.source}' reduces by {self.factor}, "
                f"which must divide both sides; take a multiple of {self.factor} or --autoencoder pixel"
            )
        if self.only_size and (height, width) != (self.only_size, self.only_size):
            raise AutoencoderError(
                f"--data.image_size {height}x{width}: '{self.source}' gives images of {self.only_size} pixels alone"
            )
        return super().latent_shape(height, width)

    @torch.inference_mode()
    def prepare(self, images: Images) -> Float[Tensor, "b moments h w"]:
        """Of an AutoencoderKL the posterior's mean and log-variance along the channels, else the latents."""
        check_images(images)
        self.latent_shape(*images.shape[-2:])
        pixels = images.float() / 127.5 - 1
        return self.kind.store(self.autoencoder.encode((pixels + 1) / 2 if self.kind.representation else pixels))

    def draw(self, stored: Float[Tensor, "b moments h w"], noise: Latents) -> Latents:
        """A sample of the posterior, where there is one, normalised."""
        return (self.kind.draw(stored.float(), noise) - self.shift) * self.scale

    @torch.inference_mode()
    def decode(self, x_0: Latents) -> Images:
        pixels = self.autoencoder.decode(x_0.float() / self.scale + self.shift).sample
        return _to_uint8(2 * pixels - 1 if self.kind.representation else pixels)


class PixelCodec(Codec):
    """Pixel space as one more codec: `x_0` is the image in [-1, 1], nothing is drawn."""

    source = "pixel"
    channels = 3
    factor = 1
    density_offset = math.log2(127.5)
    limit = 1.0
    identity: ClassVar[dict] = {"codec": "pixel", "sha256": "", "input_range": "[-1, 1]", "scale": 1.0, "shift": 0.0}
    provenance: ClassVar[dict] = {**identity, "autoencoder": "pixel", "decoder_sha256": ""}

    def draw(self, stored: Images, noise: Latents) -> Latents:
        return stored.float() / 127.5 - 1

    def encode(self, images: Images, generator: torch.Generator | None = None) -> Latents:
        """[0, 255] to [-1, 1]; a generator draws from each level's width (Theis et al. 2016), which gives a density."""
        check_images(images)
        levels = images.float()
        if generator is not None:
            levels = levels + torch.rand(images.shape, generator=generator, device=images.device) - 0.5
        return levels / 127.5 - 1

    def decode(self, x_0: Latents) -> Images:
        """[-1, 1] to [0, 255], rounded to the nearest level."""
        return _to_uint8(x_0)


CODECS: dict[str, Callable[[], Codec]] = {"pixel": PixelCodec}  # by name; any other is an autoencoder's


def create_codec(autoencoder: str) -> Codec:
    """The codec by name: one of `CODECS`, an embedded one, a folder in diffusers' format, or a hub id."""
    return CODECS[autoencoder]() if autoencoder in CODECS else LatentCodec(autoencoder)


def check_images(images: Tensor) -> None:
    """Numbers from 0 to 1, or -1 to 1, would be taken for all but black. Raises AutoencoderError."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        kind = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
        raise AutoencoderError(f"images are {kind}; a codec takes RGB from 0 to 255 in uint8, [n, 3, h, w]")


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """By name and content in float32, whatever file or precision they were kept in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _to_uint8(images: Tensor) -> Tensor:
    if not images.isfinite().all():  # as bytes they would be black
        raise AutoencoderError(
            "images came out as numbers that are not finite: the weights of the model or of --autoencoder are ruined "
            "(take an earlier checkpoint), or the sampler ran away (take more --num_steps, or another --sampler)"
        )
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def _normalisation(source: str, config: Any) -> dict[str, float | list[float]]:
    """Scale and shift, a number for all channels or one for each, as diffusers' pipelines apply them."""
    scale, shift = float(config.scaling_factor), float(config.get("shift_factor") or 0.0)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None and std is None:
        return {"scale": scale, "shift": shift}
    if shift or mean is None or std is None or {len(mean), len(std)} != {int(config.latent_channels)}:
        raise AutoencoderError(
            f"--autoencoder {source}: config.json has to give latents_mean and latents_std together, of "
            f"{config.latent_channels} channels, and no shift_factor; mend it, or set both to null"
        )
    return {"scale": [scale / float(value) for value in std], "shift": [float(value) for value in mean]}
