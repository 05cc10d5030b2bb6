"""A checkpoint as a folder that diffusers loads, without this repository.

    python scripts/export_diffusers.py --checkpoint runs/XSwin --output exported
    python scripts/export_diffusers.py --checkpoint runs/DiT-S-2 --output exported --native true

    from diffusers import DiffusionPipeline
    pipeline = DiffusionPipeline.from_pretrained(
        "exported", custom_pipeline="exported/pipeline.py", trust_remote_code=True)
    pipeline(["cat", "dog"], seed=0).images[0].save("cat.png")

The backbone leaves as a program of torch.export, `denoiser/denoiser.pt2`, which is held against the model before
anything else is written; a DiT may leave as diffusers' own DiTPipeline instead.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiment.cli import one_line_errors, parse
from experiment.settings import within


@dataclass(frozen=True)
class ExportConfig:
    """Write a checkpoint as a diffusers pipeline.

    Args:
        checkpoint: a run's folder, a checkpoint, its ema.safetensors, or hf://owner/name
        output: the folder to write
        sampler: 'ddpm', 'ddim', 'dpmpp_2m' (gaussian) or 'euler' (flow, edm); by default as in the checkpoint, like the
            flags below
        num_steps: steps a sample, by default; a pipeline's caller may take others
        spacing: of the steps: 'uniform' or 'trailing' (gaussian), 'uniform' (flow), 'karras' (edm)
        guidance_scale: of the pipeline, by default
        clip: largest absolute value of predicted data; by default 1 for pixels, as sample.py has it; .inf: no limit
        native: a DiT as DiTPipeline, whose weights any diffusers tool can read; see the README in the folder
        autoencoder: in place of the one in the checkpoint's configuration
        imports: the modules or .py files that the checkpoint was trained with, where they have moved
    """

    checkpoint: str
    output: Path
    sampler: str | None = None
    num_steps: int | None = within("[1, inf)", None)
    spacing: str | None = None
    guidance_scale: float | None = within("[0, inf)", None)
    clip: float | None = within("(0, inf]", None)
    native: bool = False
    autoencoder: str | None = None
    imports: list[str] = field(default_factory=list)


def main(config: ExportConfig) -> None:
    """Refuse what diffusers cannot follow, then write."""
    from checkpoints.checkpoint import open_checkpoint
    from machine.whole_files import whole
    from published.diffusers_pipeline import write_folder
    from sampling.options import check_sampling, sampling_of

    if config.output.exists() and any(config.output.iterdir()):
        raise FileExistsError(f"--output {config.output} is not empty; give another folder or delete it")
    checkpoint = open_checkpoint(config.checkpoint)
    num_guided = checkpoint.num_guided
    asked = {name: getattr(config, name) for name in ("sampler", "num_steps", "spacing", "guidance_scale", "clip")}
    sampling = sampling_of(checkpoint.config.sampling, num_guided, **asked)
    sampling = check_sampling(sampling, checkpoint.build_diffusion(), num_guided)
    codec = checkpoint.open_codec(config.autoencoder)
    if sampling.clip is None:
        sampling = replace(sampling, clip=codec.limit)
    with whole(config.output) as folder:
        how = write_folder(folder, checkpoint, codec, sampling, native=config.native)
    print(f"{config.output}: {how}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse(ExportConfig))
