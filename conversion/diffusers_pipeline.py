"""Export of a checkpoint as a folder that diffusers' `from_pretrained` loads."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from autoencoders import pooled
from autoencoders.codec import Codec, LatentCodec
from autoencoders.pooled import PooledTinyAutoencoder
from conversion.diffusers_dit import native_names, write_native
from conversion.diffusers_schedulers import time_mapping, to_scheduler
from metrics.programs import save_exported

PARTS = Path(__file__).parent.parent / "assets" / "diffusers"


def write_folder(folder: Path, checkpoint: Any, codec: Codec, sampling: Any, *, native: bool) -> str:
    """Write scheduler, autoencoder, backbone and index, and say in what form the backbone is.

    With `native` that is a `DiTPipeline`, otherwise an exported program with a pipeline of our own. Raises ValueError
    naming the setting that diffusers cannot reproduce.
    """
    vae = None
    if isinstance(codec, LatentCodec):
        vae = codec.autoencoder
        if codec.kind.representation:
            raise ValueError(f"--checkpoint: its autoencoder is a {type(vae).__name__}, which the pipeline cannot use")
        vae.register_to_config(_name_or_path=None)  # it may be a path on this machine
    scheduler, spacing = to_scheduler(checkpoint.config.diffusion.kind, checkpoint.build_diffusion(), sampling)
    folder.mkdir()
    if native:
        index, form = write_native(folder, checkpoint, sampling, scheduler, vae), "DiTPipeline"
    else:
        index, form = _write_program(folder, checkpoint, sampling, spacing, vae)
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    scheduler.save_pretrained(folder / "scheduler")
    _write_json(folder / "model_index.json", index)
    (folder / "README.md").write_text(readme(checkpoint, sampling, native=native))
    return f"{checkpoint.spec.name} as {form}"


def _write_program(folder: Path, checkpoint: Any, sampling: Any, spacing: str, vae: Any) -> tuple[dict[str, Any], str]:
    """Export the backbone as a program, and copy the pipeline's code beside it; returns the index and a description."""
    spec, denoiser = checkpoint.spec, folder / "denoiser"
    program, error = export_denoiser(checkpoint.load_model(), spec)
    denoiser.mkdir()
    save_exported(program, denoiser / "denoiser.pt2")
    offset, rate = time_mapping(checkpoint.config.diffusion.kind, checkpoint.build_diffusion())
    settings = {"_class_name": "ExportedDenoiser", "num_classes": spec.num_classes, "channels": spec.in_channels}
    settings |= {"out_channels": spec.out_channels, "height": spec.input_size[0], "width": spec.input_size[1]}
    _write_json(denoiser / "config.json", {**settings, "time_offset": offset, "time_rate": rate})
    shutil.copy(PARTS / "denoiser.py", denoiser)
    shutil.copy(PARTS / "pipeline.py", folder)
    library = "diffusers"
    if vae is not None:
        vae.save_pretrained(folder / "vae")
        if isinstance(vae, PooledTinyAutoencoder):
            shutil.copy(pooled.__file__, folder / "vae")
            library = Path(pooled.__file__).stem
    index = {
        "_class_name": ["pipeline", "ClassConditionalPipeline"],
        "denoiser": ["denoiser", "ExportedDenoiser"],
        "vae": [None, None] if vae is None else [library, type(vae).__name__],
        "classes": checkpoint.classes,
        "num_steps": sampling.num_steps,
        "spacing": spacing,
        "guidance_scale": sampling.guidance_scale,
        "guided_channels": sampling.legacy_cfg_channels if checkpoint.num_guided else 0,
        "predicts_data": spacing == "flow" and checkpoint.build_diffusion().prediction == "x_0",
    }
    return index, f"a program that differs from the model by {error:.1e} of its largest output"


def export_denoiser(model: Any, spec: Any) -> tuple[Any, float]:
    """Export a model as a program for any batch size, traced with three images. Returns the program and its largest
    relative error on a batch of five. Raises ValueError where the error exceeds 1e-4."""

    def random_inputs(num: int) -> tuple:
        generator = torch.Generator().manual_seed(num)
        x_t = torch.randn(num, spec.in_channels, *spec.input_size, generator=generator)
        t = 999 * torch.rand(num, generator=generator)
        return x_t, t, torch.randint(spec.num_classes + 1, (num,), generator=generator)

    with torch.no_grad():
        # Called before tracing, so that tensors which a model caches at its first call are not traced ones.
        expected = model(*random_inputs(5))
        batch = torch.export.Dim("batch")
        program = torch.export.export(model, random_inputs(3), dynamic_shapes=({0: batch},) * 3)
        output = program.module()(*random_inputs(5))
    error = ((output - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()
    if not error < 1e-4:
        raise ValueError(f"the exported program differs from the model by {error:.1e} of its largest output")
    return program, error


def readme(checkpoint: Any, sampling: Any, *, native: bool) -> str:
    """README of the folder, with code that samples from it."""
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
