"""Loading of autoencoders in diffusers' format: embedded ones, those in a folder, and those of the hub."""

import json
import logging
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

ASSETS = Path(__file__).resolve().parent.parent / "assets"
EMBEDDED = {
    "embedded": ASSETS / "autoencoder",
    "embedded-f8c16": ASSETS / "autoencoder-f8c16",
    "embedded-taef2": ASSETS / "autoencoder-taef2",
}
_ALTERNATIVES = f"give --autoencoder a folder in diffusers' format, or one of assets/: {', '.join(map(repr, EMBEDDED))}"


class AutoencoderError(ValueError):
    """An autoencoder cannot be loaded or does not fit the images; the message is for users."""


def load_autoencoder(source: str, classes: Collection[str]) -> Any:
    """Load an autoencoder in float32 from one of `EMBEDDED`, a folder in diffusers' format, or a hub id. Raises
    AutoencoderError if that fails, or if it is not of one of the `classes`."""
    folder = EMBEDDED.get(source, Path(source))
    if source in EMBEDDED and (Path(source) / "config.json").exists():
        raise AutoencoderError(
            f"--autoencoder {source}: the clone's own, or this folder's? Call the folder something else"
        )
    if folder.is_dir():
        return _load(source, classes, folder / "config.json", folder)
    from huggingface_hub import hf_hub_download

    repo, subfolder = hub_id(source)
    try:
        config = Path(hf_hub_download(repo, "config.json", subfolder=subfolder))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise AutoencoderError(
            f"--autoencoder {source}: no folder, and the hub did not serve it ({reason}); {_ALTERNATIVES}"
        ) from error
    return _load(source, classes, config, repo, subfolder=subfolder)


def hub_id(source: str) -> tuple[str, str | None]:
    """Split `owner/name` or `owner/name/folder` into the repository and the folder in it, if any."""
    owner, *rest = source.split("/")
    if source.startswith((".", "/", "~")) or not rest or "" in (owner, *rest):
        raise AutoencoderError(f"--autoencoder {source}: no such folder; {_ALTERNATIVES}")
    return f"{owner}/{rest[0]}", "/".join(rest[1:]) or None


def _load(source: str, classes: Collection[str], config: Path, place: str | Path, **hub_options: str | None) -> Any:
    """Load the class that the configuration file names from `place`, a folder or a repository of the hub."""
    try:
        name = json.loads(config.read_text()).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise AutoencoderError(f"--autoencoder {source}: {config.name} is missing or not JSON") from error
    if name == "AutoencoderRAE" and find_spec("transformers") is None:
        raise AutoencoderError(f"--autoencoder {source}: its encoder needs transformers: pip install -e '.[rae]'")
    if name not in classes:
        raise AutoencoderError(f"--autoencoder {source}: {name} is not supported; give one of {', '.join(classes)}")
    files = [file.name for file in Path(place).glob("diffusion_pytorch_model*")]  # empty for a repository of the hub
    variant = "fp16" if files and all(".fp16." in file for file in files) else None
    try:
        with warnings.catch_warnings(), quiet_logger("diffusers.configuration_utils"):  # it does not know latents_mean
            warnings.simplefilter("ignore", UserWarning)  # diffusers passes huggingface_hub arguments it deprecated
            return find_class(name).from_pretrained(
                place, torch_dtype=torch.float32, low_cpu_mem_usage=False, variant=variant, **hub_options
            )
    except Exception as error:  # diffusers raises a different type for each way in which a weight file can be broken
        reason = str(error).strip().splitlines()[0]
        raise AutoencoderError(f"--autoencoder {source}: its weights do not load ({reason})") from error


def find_class(name: str) -> Any:
    """Return diffusers' class of that name, or ours from `autoencoders.tiny`, which diffusers lacks."""
    import diffusers

    from autoencoders import tiny

    return getattr(tiny if name in vars(tiny) else diffusers, name)


@contextmanager
def quiet_logger(name: str) -> Iterator[None]:
    """A context in which the logger of this name reports errors only."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@torch.inference_mode()
def sample_latents(autoencoder: Any, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n c h w"]:
    """Encode images in [-1, 1]; where there is a posterior, the latents are samples of it, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    encoded = [autoencoder.encode(batch.to(autoencoder.device)) for batch in images.split(64)]
    return torch.cat([e.latent_dist.sample(generator) if hasattr(e, "latent_dist") else e.latents for e in encoded])


def with_statistics(autoencoder: Any, images: Float[Tensor, "n 3 H W"]) -> Any:
    """Measure mean and standard deviation of each latent channel on `images`, and set them in the configuration."""
    std, mean = torch.std_mean(sample_latents(autoencoder, images), dim=(0, 2, 3))
    if dead := (std == 0).nonzero().flatten().tolist():
        raise ValueError(f"--data.path: latent channels {dead} are the same in all of these images; give other ones")
    autoencoder.register_to_config(scaling_factor=1.0, latents_mean=mean.tolist(), latents_std=std.tolist())
    return autoencoder
