"""Export a checkpoint as a folder that diffusers can load without this repository.

    python scripts/export_diffusers.py --checkpoint runs/XSwin --output exported
    python scripts/export_diffusers.py --checkpoint runs/DiT-S-2 --output exported --native true

The backbone becomes a program of torch.export, `denoiser/denoiser.pt2`, whose output is compared with the model's. A
DiT can become diffusers' own DiTPipeline instead.
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiment.cli import run_main
from experiment.config import SamplingFlags
from settings import reads, set_values


@dataclass(frozen=True)
class ExportConfig:
    """Export a checkpoint as a diffusers pipeline.

    Args:
        checkpoint: a run's folder, a checkpoint, its ema.safetensors, or hf://owner/name
        output: folder to write
        sampling: overrides of the checkpoint's settings; --sampler is short for --sampling.sampler, etc.
        native: export a DiT as DiTPipeline, whose weights any diffusers tool can read; see the README in the folder
        autoencoder: replaces the checkpoint's
        imports: modules or .py files that the checkpoint was trained with, if they have moved
    """

    checkpoint: str = field(metadata={"reads": "checkpoint"})
    output: Path
    sampling: SamplingFlags = field(default_factory=SamplingFlags, metadata={"short": True})
    native: bool = False
    autoencoder: str | None = reads("autoencoder", None)
    imports: list[str] = field(default_factory=list)


def main(config: ExportConfig) -> None:
    """Validate the settings, and write the folder."""
    from checkpoints.checkpoint import open_checkpoint
    from conversion.diffusers_pipeline import write_folder
    from machine.atomic_files import atomic_path, check_empty
    from sampling.checks import resolve_sampling

    check_empty(config.output, "--output")
    checkpoint = open_checkpoint(config.checkpoint)
    diffusion, num_guided = checkpoint.build_diffusion(), checkpoint.num_guided
    overrides = set_values(config.sampling)
    sampling = resolve_sampling(checkpoint.config.sampling, diffusion, num_guided, say=print, **overrides)
    codec = checkpoint.open_codec(config.autoencoder)
    if sampling.clip is None:
        sampling = replace(sampling, clip=codec.limit)
    with atomic_path(config.output) as folder:
        description = write_folder(folder, checkpoint, codec, sampling, native=config.native)
    print(f"{config.output}: {description}")


if __name__ == "__main__":
    run_main(main, ExportConfig)
