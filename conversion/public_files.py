"""Weights of published models by file name: their public address, according to their authors, and their contents."""

from dataclasses import dataclass
from pathlib import Path

from machine.hugging_face import describe_error
from metrics.downloads import download


@dataclass(frozen=True)
class PublicFile:
    """A public file of weights: its format, a key of `conversion.weights.SOURCES`; its address, a repository of the
    hub, or a web page for a browser; and the backbone and image size that it must be of."""

    source: str
    url: str
    backbone: str
    image_size: int

    def check(self, name: str, backbone: str, image_size: int) -> None:
        """Check that a file by this name holds this model. Raises ValueError if it holds another."""
        if (backbone, image_size) != (self.backbone, self.image_size):
            raise ValueError(
                f"--weights {name}: a {backbone} of {image_size} pixels, not the published {self.backbone} of "
                f"{self.image_size}; download it again, or give the file another name"
            )


META, DRIVE = "https://dl.fbaipublicfiles.com/DiT/models", "https://drive.google.com/file/d"
DROPBOX = "https://www.dl.dropboxusercontent.com/scl/fi"
SIT = f"{DROPBOX}/as9oeomcbub47de5g4be0/SiT-XL-2-256.pt?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=0"
REPA = f"{DROPBOX}/cxedbs4da5ugjq5wg3zrg/last.pt?rlkey=8otgrdkno0nd89po3dpwngwcc&st=apcc645o&dl=0"
LIGHTNING = "lightningdit-xl-imagenet256"
FILES = {
    # facebookresearch/DiT and willisma/SiT, download.py; sihyun-yu/REPA, utils.py, which calls its own last.pt
    "DiT-XL-2-256x256.pt": PublicFile("dit", f"{META}/DiT-XL-2-256x256.pt", "DiT-XL/2", 256),
    "DiT-XL-2-512x512.pt": PublicFile("dit", f"{META}/DiT-XL-2-512x512.pt", "DiT-XL/2", 512),
    "SiT-XL-2-256x256.pt": PublicFile("sit", SIT, "DiT-XL/2", 256),
    "REPA-SiT-XL-2-256x256.pt": PublicFile("repa", REPA, "DiT-XL/2", 256),
    # hustvl/LightningDiT and baofff/U-ViT, README.md
    f"{LIGHTNING}-800ep.pt": PublicFile("lightningdit", f"hf://hustvl/{LIGHTNING}-800ep", "LightningDiT-XL/1", 256),
    f"{LIGHTNING}-64ep.pt": PublicFile("lightningdit", f"hf://hustvl/{LIGHTNING}-64ep", "LightningDiT-XL/1", 256),
    "imagenet256_uvit_large.pth": PublicFile("uvit", f"{DRIVE}/1w7T1hiwKODgkYyMH9Nc9JNUThbxFZgs3", "U-ViT-L/2", 256),
    "imagenet256_uvit_huge.pth": PublicFile("uvit", f"{DRIVE}/13StUdrjaaSXjfqqF7M47BzPyhMAArQ4u", "U-ViT-H/2", 256),
    "imagenet512_uvit_large.pth": PublicFile("uvit", f"{DRIVE}/1mkj4aN2utHMBTWQX9l1nYue9vleL7ZSB", "U-ViT-L/4", 512),
    "imagenet512_uvit_huge.pth": PublicFile("uvit", f"{DRIVE}/1uegr2o7cuKXtf2akWGAN2Vnlrtw5YKQq", "U-ViT-H/4", 512),
}
VA_VAE = "vavae-imagenet256-f16d32-dinov2"  # hustvl/LightningDiT, README.md, with its latents' statistics


def is_public(name: str) -> bool:
    """Whether a name, with or without its suffix, is that of a public file."""
    return any(name in (file, Path(file).stem) for file in (*FILES, f"{VA_VAE}.pt"))


def public_autoencoder(weights: Path, source: str | None) -> list[Path]:
    """Resolve VA-VAE's name to weights and statistics, downloaded unless here; other paths stay as given."""
    by_name = str(weights) in (VA_VAE, f"{VA_VAE}.pt") or (weights.name == f"{VA_VAE}.pt" and weights.is_file())
    if source not in (None, "ldm") or not by_name:
        return [weights]
    places = [weights.with_name(name) for name in (f"{VA_VAE}.pt", "latents_stats.pt")]
    flag = f"--weights {weights}"
    return [place if place.is_file() else from_hub(f"hustvl/{VA_VAE}", place.name, flag) for place in places]


def public_file(weights: Path) -> tuple[Path, PublicFile | None]:
    """Resolve a path of weights, or the name of a public file, with or without its suffix.

    A public file that does not exist here is downloaded. Returns the path, and what the file should hold if its name is
    that of a public file. Raises ValueError saying why a file cannot be downloaded.
    """
    name = next((name for name in FILES if str(weights) in (name, Path(name).stem)), None)
    existing = next((path for path in (weights, Path(name or weights)) if path.is_file()), None)
    if existing or name is None:
        return existing or weights, FILES.get((existing or weights).name)
    public, flag = FILES[name], f"--weights {weights}"
    if public.url.startswith(DRIVE):
        raise ValueError(f"{flag}: open {public.url}/view in a browser, and give the file as --weights {name}")
    if public.url.startswith("hf://"):
        return from_hub(public.url.removeprefix("hf://"), name, flag), public
    return download(public.url, name, flag), public


def from_hub(repo: str, name: str, flag: str) -> Path:
    """Download a file of a repository of the hub. Raises ValueError naming the flag where that fails."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, name))
    except (LocalEntryNotFoundError, HTTPError, OSError) as error:
        why = describe_error(error)
        raise ValueError(f"{flag}: the hub does not serve {name} of {repo} ({why}); give the file itself") from error
