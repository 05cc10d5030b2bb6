"""A checkpoint as a folder that diffusers loads, without this repository.

    python scripts/export_diffusers.py --checkpoint runs/XSwin --output exported
    python scripts/export_diffusers.py --checkpoint runs/DiT-S-2 --output exported --native true

The backbone leaves as a program of torch.export, `denoiser/denoiser.pt2`, which is held against the model first; a DiT
may leave as diffusers' own DiTPipeline instead.
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiment.cli import one_line_errors, parse
from experiment.config import SamplingFlags
from settings import set_values


@dataclass(frozen=True)
class ExportConfig:
    """Write a checkpoint as a diffusers pipeline.

    Args:
        checkpoint: a run's folder, a checkpoint, its ema.safetensors, or hf://owner/name
        output: the folder to write
        sampling: in place of the checkpoint's own settings, also in short (--sampler)
        native: a DiT as DiTPipeline, whose weights any diffusers tool can read; see the README in the folder
        autoencoder: in place of the one in the checkpoint's configuration
        imports: the modules or .py files that the checkpoint was trained with, where they have moved
    """

    checkpoint: str
    output: Path
    sampling: SamplingFlags = field(default_factory=SamplingFlags, metadata={"short": True})
    native: bool = False
    autoencoder: str | None = None
    imports: list[str] = field(default_factory=list)


def main(config: ExportConfig) -> None:
    """Refuse what diffusers cannot follow, then write."""
    from checkpoints.checkpoint import open_checkpoint
    from machine.whole_files import check_empty, whole
    from published.diffusers_pipeline import write_folder
    from sampling.checks import resolve_sampling

    check_empty(config.output, "--output")
    checkpoint = open_checkpoint(config.checkpoint)
    diffusion, num_guided = checkpoint.build_diffusion(), checkpoint.num_guided
    overrides = set_values(config.sampling)
    sampling = resolve_sampling(checkpoint.config.sampling, diffusion, num_guided, say=print, **overrides)
    codec = checkpoint.open_codec(config.autoencoder)
    if sampling.clip is None:
        sampling = replace(sampling, clip=codec.limit)
    with whole(config.output) as folder:
        how = write_folder(folder, checkpoint, codec, sampling, native=config.native)
    print(f"{config.output}: {how}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse(ExportConfig))
