"""What diffusers' `from_pretrained` reads: a checkpoint as a folder of its format."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from autoencoders.codec import Codec, LatentCodec
from metrics.exported import save_program
from published.diffusers_dit import to_diffusers, without_shift
from published.diffusers_schedulers import scheduler_of, told_times

PARTS = Path(__file__).parent.parent / "assets" / "diffusers"


def write_folder(folder: Path, checkpoint: Any, codec: Codec, sampling: Any, *, native: bool) -> str:
    """Write all of it, README included; returns how the backbone left.

    Raises:
        ValueError: naming the setting that diffusers cannot follow.
    """
    diffusion = checkpoint.build_diffusion()
    scheduler, spacing = scheduler_of(checkpoint.config.diffusion.kind, diffusion, sampling)
    vae = codec.autoencoder if isinstance(codec, LatentCodec) else None
    if vae is not None and not type(vae).__module__.startswith("diffusers."):
        raise ValueError(f"--checkpoint: its autoencoder is a {type(vae).__name__}, which diffusers does not have")
    if vae is not None:
        vae.register_to_config(_name_or_path=None)  # a folder of this machine
    write = write_native if native else write_pipeline
    folder.mkdir()
    how = write(folder, checkpoint, diffusion, sampling, scheduler, spacing, vae)
    (folder / "README.md").write_text(readme(checkpoint, sampling, native=native))
    return how


def write_pipeline(
    folder: Path, checkpoint: Any, diffusion: Any, sampling: Any, scheduler: Any, spacing: str, vae: Any
) -> str:
    """The backbone as a program, beside code that loads and samples from it."""
    spec = checkpoint.spec
    program, error = export_denoiser(checkpoint.load_model(), spec)
    denoiser = folder / "denoiser"
    denoiser.mkdir(parents=True)
    save_program(program, denoiser / "denoiser.pt2")
    offset, rate = told_times(checkpoint.config.diffusion.kind, diffusion)
    settings = {
        "_class_name": "ExportedDenoiser",
        "num_classes": spec.num_classes,
        "channels": spec.in_channels,
        "out_channels": spec.out_channels,
        "height": spec.input_size[0],
        "width": spec.input_size[1],
        "time_offset": offset,
        "time_rate": rate,
    }
    (denoiser / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    shutil.copy(PARTS / "denoiser.py", denoiser)
    shutil.copy(PARTS / "pipeline.py", folder)
    scheduler.save_pretrained(folder / "scheduler")
    if vae is not None:
        vae.save_pretrained(folder / "vae")
    index = {
        "_class_name": ["pipeline", "ClassConditionalPipeline"],
        "denoiser": ["denoiser", "ExportedDenoiser"],
        "scheduler": ["diffusers", type(scheduler).__name__],
        "vae": [None, None] if vae is None else ["diffusers", type(vae).__name__],
        "classes": checkpoint.classes,
        "num_steps": sampling.num_steps,
        "spacing": spacing,
        "guidance_scale": sampling.guidance_scale,
        "guided_channels": sampling.legacy_cfg_channels if checkpoint.num_guided else 0,
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return f"{spec.name} as a program that differs from the model by {error:.1e} of its largest output"


def write_native(
    folder: Path, checkpoint: Any, diffusion: Any, sampling: Any, scheduler: Any, spacing: str, vae: Any
) -> str:
    """diffusers' own DiT in diffusers' own pipeline, which asks schedulers for their own times and no variance."""
    if checkpoint.config.diffusion.kind != "gaussian" or sampling.sampler == "ddpm" or spacing != "trailing":
        raise ValueError(
            f"--native: DiTPipeline cannot walk {checkpoint.config.diffusion.kind}, {sampling.sampler}, "
            f"{sampling.spacing}; add --sampler ddim --spacing trailing, or leave --native out"
        )
    if sampling.legacy_cfg_channels is not None:
        raise ValueError(
            f"--native: DiTPipeline guides all channels, not {sampling.legacy_cfg_channels} as "
            "--sampling.legacy_cfg_channels says; leave it out"
        )
    if vae is None:
        raise ValueError("--native: DiTPipeline needs an autoencoder, and this model denoises pixels; leave it out")
    if diffusion.path.model_times is not None:
        raise ValueError("--native: DiTPipeline tells a model its times from 0 to 999; leave it out")
    transformer, vae = to_diffusers(checkpoint.load_model()), without_shift(vae)
    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    scheduler.register_to_config(timestep_spacing="trailing")
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "DiTPipeline",
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", type(scheduler).__name__],
        "id2label": {str(label): name for label, name in enumerate(native_names(checkpoint.classes))},
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return f"{checkpoint.spec.name} as DiTPipeline"


def native_names(classes: list[str]) -> list[str]:
    """Names by which DiTPipeline tells all classes apart: semicolons in place of commas, which to it part several names
    of one class, and the label behind a name that others have too."""
    names = [" ".join(name.replace(",", ";").split()) for name in classes]
    return [name if names.count(name) == 1 else f"{name} ({label})" for label, name in enumerate(names)]


def export_denoiser(model, spec, batch_size: int = 3) -> tuple[Any, float]:
    """The model as a program for any batch, and how far it is from the model on another batch.

    Raises:
        ValueError: when they differ by more than rounding.
    """

    def example(num: int) -> tuple:
        generator = torch.Generator().manual_seed(num)
        x_t = torch.randn(num, spec.in_channels, *spec.input_size, generator=generator)
        t = 999 * torch.rand(num, generator=generator)
        return x_t, t, torch.randint(spec.num_classes + 1, (num,), generator=generator)

    with torch.no_grad():
        expected = model(*example(batch_size + 2))  # first, as what a model keeps must not be kept from tracing
        batch = torch.export.Dim("batch")
        program = torch.export.export(model, example(batch_size), dynamic_shapes=({0: batch},) * 3)
        output = program.module()(*example(batch_size + 2))
    error = ((output - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()
    if not error < 1e-4:
        raise ValueError(f"the exported program differs from the model by {error:.1e} of its largest output")
    return program, error


def readme(checkpoint: Any, sampling: Any, *, native: bool) -> str:
    """How to load it, and what to expect."""
    classes = native_names(checkpoint.classes) if native else checkpoint.classes
    text = (PARTS / ("native.md" if native else "pipeline.md")).read_text()
    return f"# {checkpoint.spec.name}, step {checkpoint.step}\n\n" + text.format(
        first=json.dumps(classes[0], ensure_ascii=False) if classes else 0,
        sampler=sampling.sampler,
        spacing=sampling.spacing,
        num_steps=sampling.num_steps,
        scale=sampling.guidance_scale,
    )
