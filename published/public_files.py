"""Public files of published models, by name: where their authors' repositories say they are, and what they hold."""

import re
from dataclasses import dataclass
from pathlib import Path

from metrics.downloads import download


@dataclass(frozen=True)
class PublicFile:
    """Weights that anybody can have: `url` is a file's, a repository's of the hub (`hf://owner/name`), or a page for
    people where no program gets it; `backbone` and `image_size` are what it must hold."""

    source: str
    url: str
    backbone: str
    image_size: int

    def check(self, name: str, backbone: str, image_size: int) -> None:
        """That the weights are of this model, and not of another by its name."""
        if (backbone, image_size) != (self.backbone, self.image_size):
            raise ValueError(
                f"--weights {name}: a {backbone} of {image_size} pixels, not the published {self.backbone} of "
                f"{self.image_size}; download it again, or give the file another name"
            )


META, DRIVE = "https://dl.fbaipublicfiles.com/DiT/models", "https://drive.google.com/file/d"
DROPBOX = "https://www.dl.dropboxusercontent.com/scl/fi"
SIT = f"{DROPBOX}/as9oeomcbub47de5g4be0/SiT-XL-2-256.pt?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=0"
REPA = f"{DROPBOX}/cxedbs4da5ugjq5wg3zrg/last.pt?rlkey=8otgrdkno0nd89po3dpwngwcc&st=apcc645o&dl=0"
LIGHTNING, UVIT = "lightningdit-xl-imagenet256", "UViT-tokens"
FILES = {
    # facebookresearch/DiT and willisma/SiT, download.py; sihyun-yu/REPA, utils.py, which calls its own last.pt
    "DiT-XL-2-256x256.pt": PublicFile("dit", f"{META}/DiT-XL-2-256x256.pt", "DiT-XL/2", 256),
    "DiT-XL-2-512x512.pt": PublicFile("dit", f"{META}/DiT-XL-2-512x512.pt", "DiT-XL/2", 512),
    "SiT-XL-2-256x256.pt": PublicFile("sit", SIT, "DiT-XL/2", 256),
    "REPA-SiT-XL-2-256x256.pt": PublicFile("repa", REPA, "DiT-XL/2", 256),
    # hustvl/LightningDiT and baofff/U-ViT, README.md
    f"{LIGHTNING}-800ep.pt": PublicFile("lightningdit", f"hf://hustvl/{LIGHTNING}-800ep", "LightningDiT-XL/1", 256),
    f"{LIGHTNING}-64ep.pt": PublicFile("lightningdit", f"hf://hustvl/{LIGHTNING}-64ep", "LightningDiT-XL/1", 256),
    "imagenet256_uvit_large.pth": PublicFile("uvit", f"{DRIVE}/1w7T1hiwKODgkYyMH9Nc9JNUThbxFZgs3", UVIT, 256),
    "imagenet256_uvit_huge.pth": PublicFile("uvit", f"{DRIVE}/13StUdrjaaSXjfqqF7M47BzPyhMAArQ4u", f"{UVIT}-XL/2", 256),
    "imagenet512_uvit_large.pth": PublicFile("uvit", f"{DRIVE}/1mkj4aN2utHMBTWQX9l1nYue9vleL7ZSB", UVIT, 512),
    "imagenet512_uvit_huge.pth": PublicFile("uvit", f"{DRIVE}/1uegr2o7cuKXtf2akWGAN2Vnlrtw5YKQq", f"{UVIT}-XL/4", 512),
}
VA_VAE = (
    "vavae-imagenet256-f16d32-dinov2"  # hustvl/LightningDiT, README.md: the autoencoder, and its latents' statistics
)


def public_autoencoder(weights: Path, source: str | None) -> list[Path]:
    """VA-VAE and the statistics of its latents by its name, downloaded where it is not here; or what was given."""
    if source not in (None, "ldm") or str(weights) not in (VA_VAE, f"{VA_VAE}.pt") or weights.is_file():
        return [weights]
    return [from_hub(f"hustvl/{VA_VAE}", name, f"--weights {weights}") for name in (f"{VA_VAE}.pt", "latents_stats.pt")]


def public_file(weights: Path) -> tuple[Path, PublicFile | None]:
    """Where the weights lie, and what they are if their name, with or without its suffix, is a public file's, which is
    downloaded where it is not here. A ValueError says in one line why it cannot be had."""
    name = next((name for name in FILES if str(weights) in (name, Path(name).stem)), None)
    here = next((path for path in (weights, Path(name or weights)) if path.is_file()), None)
    if here or name is None:
        return here or weights, FILES.get((here or weights).name)
    public, flag = FILES[name], f"--weights {weights}"
    if public.url.startswith(DRIVE):
        raise ValueError(f"{flag}: open {public.url}/view in a browser, and give the file as --weights {name}")
    if public.url.startswith("hf://"):
        return from_hub(public.url.removeprefix("hf://"), name, flag), public
    return download(public.url, name, flag), public


def from_hub(repo: str, name: str, flag: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, name))
    except (LocalEntryNotFoundError, HTTPError, OSError) as error:
        why = re.sub(r"\s*\(Request ID[^)]*\)", "", str(error).strip().split("\n")[0])
        raise ValueError(f"{flag}: the hub does not serve {name} of {repo} ({why}); give the file itself") from error
