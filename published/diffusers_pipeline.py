"""What diffusers' `from_pretrained` reads: a checkpoint as a folder of its format."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from autoencoders.codec import Codec, LatentCodec
from metrics.programs import save_exported
from published.diffusers_dit import native_names, write_native
from published.diffusers_schedulers import scheduler_of, told_times

PARTS = Path(__file__).parent.parent / "assets" / "diffusers"


def write_folder(folder: Path, checkpoint: Any, codec: Codec, sampling: Any, *, native: bool) -> str:
    """Write all of it; returns how the backbone left. A ValueError names the setting that diffusers cannot follow."""
    scheduler, spacing = scheduler_of(checkpoint.config.diffusion.kind, checkpoint.build_diffusion(), sampling)
    vae = None
    if isinstance(codec, LatentCodec):
        vae = codec.autoencoder
        if not type(vae).__module__.startswith("diffusers."):
            raise ValueError(f"--checkpoint: its autoencoder is a {type(vae).__name__}, which diffusers does not have")
        if codec.kind.representation:
            raise ValueError(f"--checkpoint: its autoencoder is a {type(vae).__name__}, which the pipeline cannot use")
        vae.register_to_config(_name_or_path=None)  # a folder of this machine
    folder.mkdir()
    if native:
        index, how = write_native(folder, checkpoint, sampling, scheduler, vae), "DiTPipeline"
    else:
        index, how = _write_program(folder, checkpoint, sampling, spacing, vae)
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    scheduler.save_pretrained(folder / "scheduler")
    _write_json(folder / "model_index.json", index)
    (folder / "README.md").write_text(readme(checkpoint, sampling, native=native))
    return f"{checkpoint.spec.name} as {how}"


def _write_program(folder: Path, checkpoint: Any, sampling: Any, spacing: str, vae: Any) -> tuple[dict[str, Any], str]:
    """The backbone as a program, beside code that samples from it; the pipeline's index."""
    spec, denoiser = checkpoint.spec, folder / "denoiser"
    program, error = export_denoiser(checkpoint.load_model(), spec)
    denoiser.mkdir()
    save_exported(program, denoiser / "denoiser.pt2")
    offset, rate = told_times(checkpoint.config.diffusion.kind, checkpoint.build_diffusion())
    settings = {"_class_name": "ExportedDenoiser", "num_classes": spec.num_classes, "channels": spec.in_channels}
    settings |= {"out_channels": spec.out_channels, "height": spec.input_size[0], "width": spec.input_size[1]}
    _write_json(denoiser / "config.json", {**settings, "time_offset": offset, "time_rate": rate})
    shutil.copy(PARTS / "denoiser.py", denoiser)
    shutil.copy(PARTS / "pipeline.py", folder)
    if vae is not None:
        vae.save_pretrained(folder / "vae")
    index = {
        "_class_name": ["pipeline", "ClassConditionalPipeline"],
        "denoiser": ["denoiser", "ExportedDenoiser"],
        "vae": [None, None] if vae is None else ["diffusers", type(vae).__name__],
        "classes": checkpoint.classes,
        "num_steps": sampling.num_steps,
        "spacing": spacing,
        "guidance_scale": sampling.guidance_scale,
        "guided_channels": sampling.legacy_cfg_channels if checkpoint.num_guided else 0,
        "predicts_data": spacing == "flow" and checkpoint.build_diffusion().prediction == "x_0",
    }
    return index, f"a program that differs from the model by {error:.1e} of its largest output"


def export_denoiser(model, spec, batch_size: int = 3) -> tuple[Any, float]:
    """The model as a program for any batch, and how far it is from the model on another; a ValueError if too far."""

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
    classes = native_names(checkpoint.classes) if native else checkpoint.classes
    text = (PARTS / ("native.md" if native else "pipeline.md")).read_text()
    return f"# {checkpoint.spec.name}, step {checkpoint.step}\n\n" + text.format(
        first=json.dumps(classes[0], ensure_ascii=False) if classes else 0,
        sampler=sampling.sampler,
        spacing=sampling.spacing,
        num_steps=sampling.num_steps,
        scale=sampling.guidance_scale,
    )


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
