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

import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiment.cli import one_line_errors, parse
from experiment.config import SamplingConfig
from experiment.settings import within

PARTS = Path(__file__).parent.parent / "assets" / "diffusers"


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
    from autoencoders.codec import LatentCodec
    from checkpoints.checkpoint import open_checkpoint
    from machine.whole_files import whole
    from sampling.options import check_sampling, sampling_of

    if config.output.exists() and any(config.output.iterdir()):
        raise FileExistsError(f"--output {config.output} is not empty; give another folder or delete it")
    checkpoint = open_checkpoint(config.checkpoint)
    diffusion, num_guided = checkpoint.build_diffusion(), checkpoint.num_guided
    given = {name: getattr(config, name) for name in ("sampler", "num_steps", "spacing", "guidance_scale", "clip")}
    sampling = check_sampling(sampling_of(checkpoint.config.sampling, num_guided, **given), diffusion, num_guided)
    codec = checkpoint.open_codec(config.autoencoder)
    if sampling.clip is None:
        sampling = replace(sampling, clip=codec.limit)
    scheduler, spacing = scheduler_of(checkpoint.config.diffusion.kind, diffusion, sampling)
    vae = codec.autoencoder if isinstance(codec, LatentCodec) else None
    if vae is not None:
        vae.register_to_config(_name_or_path=None)  # a folder of this machine
    write = write_native if config.native else write_pipeline
    with whole(config.output) as folder:
        folder.mkdir()
        how = write(folder, checkpoint, diffusion, sampling, scheduler, spacing, vae)
        (folder / "README.md").write_text(readme(checkpoint, sampling, native=config.native))
    print(f"{config.output}: {how}")


def write_pipeline(folder: Path, checkpoint, diffusion, sampling: SamplingConfig, scheduler, spacing: str, vae) -> str:
    """The backbone as a program, beside code that loads and samples from it."""
    from metrics.exported import save_program

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


def write_native(folder: Path, checkpoint, diffusion, sampling: SamplingConfig, scheduler, spacing: str, vae) -> str:
    """diffusers' own DiT in diffusers' own pipeline, which asks schedulers for their own times and no variance."""
    from published.diffusers_dit import to_diffusers, without_shift

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
    if diffusion.model_times is not None:
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
    import torch

    def example(num: int) -> tuple:
        generator = torch.Generator().manual_seed(num)
        x_t = torch.randn(num, spec.in_channels, *spec.input_size, generator=generator)
        t = 999 * torch.rand(num, generator=generator)
        return x_t, t, torch.randint(spec.num_classes + 1, (num,), generator=generator)

    with torch.no_grad():
        expected = model(*example(batch_size + 2))  # first, as what a model keeps must not be kept from tracing
        batch = torch.export.Dim("batch")
        program = torch.export.export(model, example(batch_size), dynamic_shapes=({0: batch},) * 3)
        found = program.module()(*example(batch_size + 2))
    error = ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()
    if not error < 1e-4:
        raise ValueError(f"the exported program differs from the model by {error:.1e} of its largest output")
    return program, error


def scheduler_of(kind: str, diffusion, sampling: SamplingConfig) -> tuple[Any, str]:
    """diffusers' scheduler that walks the same chain, and the pipeline's word for its spacing.

    Raises:
        ValueError: naming the setting that none of them follows.
    """
    defaults = asdict(SamplingConfig())
    followed = {"sampler", "num_steps", "spacing", "guidance_scale", "legacy_cfg_channels", "clip"}
    for name, value in asdict(sampling).items():
        if name not in followed and value != defaults[name]:
            raise ValueError(
                f"--sampling.{name} {value}: diffusers' schedulers do not have it; train or sample without"
            )
    key = kind, sampling.sampler, sampling.spacing
    if key not in SCHEDULERS:
        known = "; ".join(", ".join(map(str, each)) for each in SCHEDULERS if each[0] == kind)
        raise ValueError(
            f"--sampler {sampling.sampler} with --spacing {sampling.spacing}: no scheduler of diffusers walks that "
            f"chain under {kind}; there are {known}"
        )
    build, spacing = SCHEDULERS[key]
    limit = sampling.clip or math.inf
    if build is ancestral:
        return ancestral(diffusion, limit), spacing
    if math.isfinite(limit):
        raise ValueError(
            f"--clip {limit:g}: in diffusers only the scheduler of ddpm cuts predictions to what pixels can be; "
            "--sampler ddpm, or --clip .inf where samples come out well without"
        )
    return build(diffusion), spacing


PREDICTIONS: dict[str, Any] = {"epsilon": "epsilon", "x_0": "sample", "v": "v_prediction"}


def ancestral(diffusion, limit: float = math.inf) -> Any:
    """DDPM, of the model's own variance, predictions of the data cut to a limit."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        diffusion.num_timesteps,
        trained_betas=diffusion.betas.tolist(),
        prediction_type=PREDICTIONS[diffusion.prediction],
        variance_type=diffusion.variance,
        clip_sample=math.isfinite(limit),
        clip_sample_range=limit if math.isfinite(limit) else 1.0,
    )


def solver(order: int) -> Callable[[Any], Any]:
    """DPM-Solver++, of which order 1 is DDIM."""

    def build(diffusion) -> Any:
        from diffusers import DPMSolverMultistepScheduler

        if diffusion.alphas_cumprod[-1] == 0:
            raise ValueError(
                "--diffusion.zero_terminal_snr true: diffusers' DPM-Solver starts at 1 / 0; --sampler ddpm"
            )
        return DPMSolverMultistepScheduler(
            diffusion.num_timesteps,
            trained_betas=diffusion.betas.tolist(),
            prediction_type=PREDICTIONS[diffusion.prediction],
            solver_order=order,
            solver_type="midpoint",
            final_sigmas_type="zero",
            lower_order_final=False,
        )

    return build


def straight(diffusion) -> Any:
    """Euler's method for a linear flow."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    if diffusion.path_name != "linear":
        raise ValueError(f"--diffusion.path {diffusion.path_name}: diffusers' flows are linear")
    return FlowMatchEulerDiscreteScheduler(1000, shift=float(diffusion.shift))


def karras(diffusion) -> Any:
    """Euler's method for EDM."""
    from diffusers import EDMEulerScheduler

    low, high = diffusion.noise_range
    return EDMEulerScheduler(low, high, diffusion.sigma_data)


SCHEDULERS: dict[tuple[str, str | None, str | None], tuple[Callable[[Any], Any], str]] = {
    ("gaussian", "ddpm", "uniform"): (ancestral, "uniform"),
    ("gaussian", "ddpm", "trailing"): (ancestral, "trailing"),
    ("gaussian", "ddim", "uniform"): (solver(1), "uniform"),
    ("gaussian", "ddim", "trailing"): (solver(1), "trailing"),
    ("gaussian", "dpmpp_2m", "uniform"): (solver(2), "uniform"),
    ("gaussian", "dpmpp_2m", "trailing"): (solver(2), "trailing"),
    ("flow", "euler", "uniform"): (straight, "flow"),
    ("edm", "euler", "karras"): (karras, "karras"),
}


def told_times(kind: str, diffusion) -> tuple[float, float]:
    """The scheduler's timestep to what the backbone is given: offset and rate."""
    import math

    if kind == "flow":  # 1000 t
        first, last = diffusion.model_times
        return first, (last - first) / 1000
    if kind == "edm":  # log(sigma) / 4
        low, high = (math.log(sigma) for sigma in diffusion.noise_range)
        return -999 * low / (high - low), 4 * 999 / (high - low)
    first, last = diffusion.model_times or (0.0, float(diffusion.max_time))
    return first, (last - first) / diffusion.max_time


def readme(checkpoint, sampling: SamplingConfig, *, native: bool) -> str:
    """How to load it, and what to expect."""
    classes = native_names(checkpoint.classes) if native else checkpoint.classes
    first = json.dumps(classes[0], ensure_ascii=False) if classes else 0
    head = f"# {checkpoint.spec.name}, step {checkpoint.step}\n\n"
    return head + (NATIVE if native else CUSTOM).format(
        first=first,
        sampler=sampling.sampler,
        spacing=sampling.spacing,
        num_steps=sampling.num_steps,
        scale=sampling.guidance_scale,
    )


CUSTOM = """```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(
    "FOLDER", custom_pipeline="FOLDER/pipeline.py", trust_remote_code=True
)
pipeline([{first}], seed=0).images[0].save("picture.png")
```

`trust_remote_code` runs `pipeline.py` and `denoiser/denoiser.py`, which are short: read them. The backbone is a program
of torch.export for batches of any size, in float32. Defaults: {sampler}, spacing {spacing}, {num_steps} steps, guidance
{scale}; picture `i` of a call is the one that `sample.py` draws as its image `i` with the same seed.
"""
NATIVE = """```python
from diffusers import DiTPipeline

pipeline = DiTPipeline.from_pretrained("FOLDER")
for block in pipeline.transformer.transformer_blocks:
    block.norm1.emb.time_proj.downscale_freq_shift = 0
labels = pipeline.get_label_ids([{first}])
pipeline(labels, num_inference_steps={num_steps}, guidance_scale={scale}).images[0].save("picture.png")
```

The loop is there because diffusers spaces the frequencies of its time embedding a little wider than DiT does (127 in
place of 128 steps from 1 to 10000); without it, pictures differ from those of the training code. Defaults of the run:
{sampler}, spacing {spacing}. The null label is 1000. Commas in names of classes are semicolons here.
"""


if __name__ == "__main__":
    with one_line_errors():
        main(parse(ExportConfig))
