"""Report what works on this machine, and what to install for the rest: `python scripts/doctor.py`."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiment.cli import run_program
from metrics.downloads import hub_answers

PAPER_AUTOENCODER = "stabilityai/sd-vae-ft-ema"
EXTRAS = {  # by module: its purpose, and how to install it
    "tensorboard": ("--log.trackers '[tensorboard]'", "pip install tensorboard"),
    "wandb": ("--log.trackers '[wandb]'", "pip install -e '.[wandb]'"),
    "peft": ("--train.adapter lora", "pip install -e '.[finetune]'"),
    "gradio": ("scripts/app.py", "pip install -e '.[demo]'"),
    "submitit": ("scripts/launch_slurm.py and ablations on SLURM", "pip install -e '.[slurm]'"),
    "pyarrow": ("--data.path hf://owner/name, or parquet files", "pip install -e '.[parquet]'"),
    "datasets": ("scripts/prepare_data.py from any image dataset of the hub", "pip install -e '.[hub]'"),
}


class Finding(NamedTuple):
    """A line of the report, with a remedy if something does not work."""

    what: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"--  {self.what}: {self.remedy}" if self.remedy else f"ok  {self.what}"


def machine() -> Iterator[Finding]:
    """Devices, cores, precision and disk."""
    import torch

    from machine.accelerator import default_device
    from machine.precision import choose_precision, has_bf16, slowdown_of_bf16
    from machine.threads import allowed_cores

    release = version("latent-diffusion-backbones")
    packages = f"Python {platform.python_version()}, torch {torch.__version__}"
    yield Finding(f"version {release}, {packages}, {platform.system()} {platform.machine()}")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield Finding(f"GPU {index}: {device.name}, {device.total_memory / 2**30:.0f} GiB")
    device = default_device()
    if device.type not in ("cpu", "cuda"):
        yield Finding(f"GPU: {device.type}")
    elif not torch.cuda.is_available():
        yield Finding(
            "no CUDA GPU",
            "everything runs on the CPU; configs/quickstart.yaml and configs/own_images.yaml are made for it",
        )
    cores = f"{len(allowed_cores())} of {os.cpu_count()} CPU cores ({torch.backends.cpu.get_cpu_capability()})"
    yield Finding(f"{cores}; load of the machine in the last minute: {os.getloadavg()[0]:.1f}")
    auto = choose_precision("auto", device)
    reason = f"{has_bf16(device)[1]}; a matrix product in bf16 takes {slowdown_of_bf16(device):.2g} times as long"
    yield Finding(f"--precision auto is {auto} here: {reason}")
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    yield Finding(f"{free:.0f} GB free in this folder", "" if free > 5 else "caches and runs need a few")


def packages() -> Iterator[Finding]:
    from models.compilation import has_compiler

    for module, (purpose, remedy) in EXTRAS.items():
        try:
            yield Finding(f"{module} {version(module)}: {purpose}")
        except PackageNotFoundError:
            yield Finding(f"no {module}, for {purpose}", remedy)
    yield Finding("a C++ compiler, for --train.compile and --compile", "" if has_compiler() else "install g++")


def weights() -> Iterator[Finding]:
    """Autoencoders and feature extractors, and whether the hub can be reached for missing ones."""
    import torch
    from huggingface_hub import try_to_load_from_cache
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    from torchvision.models import VGG19_Weights

    from autoencoders.codec import EMBEDDED

    hub = hub_answers()
    yield Finding(f"the Hugging Face hub{'' if hub else ' does not answer'}", "" if hub else "use local files")
    remedy = "" if all(map(Path.is_dir, EMBEDDED.values())) else "assets/ is not whole: clone the repository again"
    yield Finding(f"the embedded autoencoders (--autoencoder {', '.join(EMBEDDED)})", remedy)
    paper = f"{PAPER_AUTOENCODER}, of the paper's configurations"
    cached = isinstance(try_to_load_from_cache(PAPER_AUTOENCODER, "config.json"), str)
    if hub and not cached:
        yield Finding(f"{paper}: downloaded on first use")
    else:
        yield Finding(paper, "" if cached else "give --autoencoder a folder in diffusers' format, or embedded")
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    for name, url, alternative in (
        ("Inception, for FID", URL_INCEPTION_V3, "--weights_path FILE, or --extractor FILE.pt2 or timm:NAME"),
        ("VGG19, for --auxiliary perceptual", VGG19_Weights.IMAGENET1K_V1.url, "network: FILE.pt2"),
    ):
        file = cache / Path(url).name
        remedy = f"put {file.name} into {cache}, or {'it is downloaded on first use' if hub else alternative}"
        yield Finding(name, "" if file.is_file() else remedy)


def main() -> None:
    """Check machine, packages and weights, and print the findings."""
    for title, findings in {"Machine": machine(), "Packages": packages(), "Weights": weights()}.items():
        print(title)
        for finding in findings:
            print(f"  {finding}")


if __name__ == "__main__":
    run_program(main)
