"""Codecs: what stands between images and the space a backbone denoises.

A codec splits encoding in two, so that the costly, deterministic half can be cached and the cheap, random
half drawn anew every epoch:

    stored = codec.prepare(images)      # once: posterior moments, or the pixels themselves
    x_0 = codec.draw(stored, noise)     # every time: about zero mean and unit variance
    images = codec.decode(x_0)
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

EMBEDDED = Path(__file__).parent.parent / "assets" / "autoencoder"


class AutoencoderError(ValueError):
    """An autoencoder that cannot be had, or does not fit the images, in the user's words."""


class LatentCodec(nn.Module):
    """A frozen AutoencoderKL (Rombach et al. 2022, section 3.1): `x_0 = (z - shift) * scale`, `z ~ q(z | image)`.

    `scale` and `shift` are the autoencoder's own `scaling_factor` and `shift_factor` (0.18215 and none for
    `stabilityai/sd-vae-ft-ema`). The module is in eval mode for good and has no trainable parameter.
    """

    density_offset = 0.0  # bits per dimension from the density of `x_0` to what is coded: latents are not
    limit = None  # of the absolute values of `x_0`

    def __init__(self, source: str = "embedded") -> None:
        super().__init__()
        self.source = source
        self.autoencoder: Any = _load_autoencoder(source).requires_grad_(False)
        config = self.autoencoder.config
        self.scale = float(config.scaling_factor)
        self.shift = float(config.shift_factor or 0.0)
        self.channels = int(config.latent_channels)
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        super().train(False)

    def train(self, mode: bool = True) -> LatentCodec:
        """Stay in eval mode: a frozen autoencoder has no other."""
        return self

    @property
    def identity(self) -> dict[str, str | float]:
        """What a latent cache must agree on: where the weights came from and what they are, by content."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.autoencoder.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return {
            "autoencoder": self.source,
            "sha256": digest.hexdigest(),
            "input_range": "[-1, 1]",
            "scale": self.scale,
            "shift": self.shift,
        }

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Channels, height and width of the latent of an image of this size.

        Raises:
            AutoencoderError: when the autoencoder's reduction does not divide the image.
        """
        if height % self.factor or width % self.factor:
            raise AutoencoderError(
                f"--data.image_size {height}x{width}: the autoencoder '{self.source}' reduces by {self.factor}, "
                f"which must divide both sides; take a multiple of {self.factor} or --autoencoder pixel"
            )
        return self.channels, height // self.factor, width // self.factor

    @torch.inference_mode()
    def prepare(self, images: UInt8[Tensor, "b 3 H W"]) -> Float[Tensor, "b moments h w"]:
        """Posterior mean and log-variance, one after the other along the channels."""
        self.latent_shape(*images.shape[-2:])
        posterior = self.autoencoder.encode(images.float() / 127.5 - 1).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    def draw(self, stored: Float[Tensor, "b moments h w"], noise: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Reparameterised sample of the posterior (Kingma and Welling 2014, eq. 10), normalised."""
        mean, log_variance = stored.float().chunk(2, dim=1)
        return (mean + torch.exp(0.5 * log_variance) * noise - self.shift) * self.scale

    def encode(
        self, images: UInt8[Tensor, "b 3 H W"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "b c h w"]:
        """`draw(prepare(images))`; without a generator, the posterior's mean."""
        stored = self.prepare(images)
        shape, device = stored[:, : self.channels].shape, stored.device
        noise = torch.zeros(shape, device=device)
        if generator is not None:  # not in place: the order of normal_ follows the memory format
            noise = torch.randn(shape, generator=generator, device=device)
        return self.draw(stored, noise)

    @torch.inference_mode()
    def decode(self, x_0: Float[Tensor, "b c h w"]) -> UInt8[Tensor, "b 3 H W"]:
        """Images of a latent, rounded to the nearest of 256 levels."""
        images = self.autoencoder.decode(x_0.float() / self.scale + self.shift).sample
        return _to_uint8(images)


class PixelCodec(nn.Module):
    """Pixel space as one more codec: `x_0` is the image in [-1, 1], nothing is drawn."""

    source = "pixel"
    channels = 3
    factor = 1
    density_offset = math.log2(127.5)
    limit = 1.0
    identity: ClassVar[dict[str, str | float]] = {
        "autoencoder": "pixel",
        "sha256": "",
        "input_range": "[-1, 1]",
        "scale": 1.0,
        "shift": 0.0,
    }

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Three channels at the image's own size."""
        return self.channels, height, width

    def prepare(self, images: UInt8[Tensor, "b 3 h w"]) -> UInt8[Tensor, "b 3 h w"]:
        """The image itself."""
        return images

    def draw(self, stored: UInt8[Tensor, "b 3 h w"], noise: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """[0, 255] to [-1, 1]; `noise` is not used."""
        return stored.float() / 127.5 - 1

    def encode(
        self, images: UInt8[Tensor, "b 3 h w"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "b 3 h w"]:
        """[0, 255] to [-1, 1]; a generator draws from the whole width of each level (Theis et al. 2016, section 3.1),
        so that the result has a density."""
        levels = images.float()
        if generator is not None:
            levels = levels + torch.rand(images.shape, generator=generator, device=images.device) - 0.5
        return levels / 127.5 - 1

    def decode(self, x_0: Float[Tensor, "b 3 h w"]) -> UInt8[Tensor, "b 3 h w"]:
        """[-1, 1] to [0, 255], rounded to the nearest level."""
        return _to_uint8(x_0)


Codec = LatentCodec | PixelCodec


def create_codec(autoencoder: str) -> Codec:
    """The codec by name: `pixel`, `embedded`, a folder in diffusers' format, or a hub id.

    Raises:
        AutoencoderError: when the weights cannot be had; says what can be used in their place.
    """
    return PixelCodec() if autoencoder == "pixel" else LatentCodec(autoencoder)


def _to_uint8(images: Tensor) -> Tensor:
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def _load_autoencoder(source: str) -> Any:
    from diffusers import AutoencoderKL

    folder = EMBEDDED if source == "embedded" else Path(source)
    if folder.is_dir():
        return _load_folder(AutoencoderKL, folder)
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise AutoencoderError(f"--autoencoder {source}: no such folder; {_ALTERNATIVES}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # diffusers passes huggingface_hub arguments it deprecated
            return AutoencoderKL.from_pretrained(source, torch_dtype=torch.float32)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise AutoencoderError(
            f"--autoencoder {source}: not a local folder, and the hub did not serve it ({reason}); {_ALTERNATIVES}"
        ) from error


def _load_folder(autoencoder_class: Any, folder: Path) -> Any:
    config = folder / "config.json"
    try:
        kind = json.loads(config.read_text()).get("_class_name")
    except (OSError, ValueError) as error:
        raise AutoencoderError(f"--autoencoder {folder}: {config.name} is missing or not JSON") from error
    if kind != "AutoencoderKL":
        raise AutoencoderError(f"--autoencoder {folder}: config.json describes {kind}, not an AutoencoderKL")
    try:
        return autoencoder_class.from_pretrained(folder, torch_dtype=torch.float32, low_cpu_mem_usage=False)
    except Exception as error:  # diffusers raises a different type for each way a weight file can be broken
        reason = str(error).strip().splitlines()[0]
        raise AutoencoderError(f"--autoencoder {folder}: its weights do not load ({reason})") from error


_ALTERNATIVES = "give --autoencoder a folder in diffusers' format, or 'embedded' for the one in assets/"
