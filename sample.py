"""Generate samples from a checkpoint: a grid, a folder per class, or an npz in ADM's format.

python sample.py --checkpoint runs/XSwin
python sample.py --checkpoint runs/XSwin --classes '[butterfly, sunflower]' --num_per_class 8 --output out.png
python sample.py --checkpoint runs/mnist --class 7 --guidance_scale 2 --panel 10
python sample.py --checkpoint runs/anime --reconstruct 300
python sample.py --checkpoint runs/XSwin --classes '[butterfly, sunflower]' --interpolate 8
python sample.py --checkpoint runs/XSwin --num_per_class 50 --output samples.npz
"""

import sys
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiment.cli import run_main
from experiment.config import DataFlags, SamplingFlags
from machine.stopping import without_garbage_collection
from settings import SEEDS, reads, set_values, within, writes

if TYPE_CHECKING:
    from checkpoints.checkpoint import Checkpoint
    from sampling.generation import Generator
    from sampling.pipeline import Pipeline


@dataclass(frozen=True)
class SampleConfig:
    """Generate samples from a checkpoint, with the model, diffusion, autoencoder and settings of its training.

    Args:
        checkpoint: a run's folder, a checkpoint, its ema.safetensors, hf://owner/name, or 'embedded'
        output: FILE.png or FILE.pdf for a grid, FILE.npz for arrays, anything else for a folder with one subfolder per
            class; by default samples.png in the run's folder (samples-WHICH.png if the weights are not the newest)
        classes: names or numbers, such as 7 or '[cat, dog]'; all by default; --class is an alias
        num_per_class: images per class
        seed: image i depends only on the seed, i and its label
        sampling: overrides of the checkpoint's settings; --guidance_scale is short for --sampling.guidance_scale, etc.
        batch_size: images per batch and process; by default 64, for small models on a GPU 512
        panel: also write a picture of this many steps of the sampling trajectory: x_t above, predicted x_0 below
        stages: for a diffusion with several stages: also write a picture of their outputs, side by side
        reconstruct: instead of samples: noise held-out images to this time, and denoise them in one and in all steps
        interpolate: instead of samples: this many images from the first class to the last
        to_seed: with --interpolate: the seed at the other end
        precision: 'auto' (bf16 if the device has instructions for it, else fp32), 'fp32' or 'bf16'
        compile: torch.compile the backbone's blocks ('blocks'), and launch each as a CUDA graph ('graphs'); it takes
            seconds to minutes (docs/performance.md), and the images are the same up to rounding
        autoencoder: replaces the checkpoint's, for example with a local folder if the hub is unreachable
        imports: modules or .py files with custom samplers etc. (docs/extending.md), if they have moved
        data: with --reconstruct: where the held-out images are now (--data.path)
    """

    checkpoint: str = reads("checkpoint")
    output: str | None = writes("", None)
    classes: list[str] = field(default_factory=list)
    num_per_class: int = within("[1, inf)", 4)
    seed: int = within(SEEDS, 0)
    sampling: SamplingFlags = field(default_factory=SamplingFlags, metadata={"short": True})
    batch_size: int | None = within("[1, inf)", None)
    panel: int = within("[0, inf)", 0)
    stages: bool = False
    reconstruct: float | None = within("[0, inf)", None)
    interpolate: int | None = within("[2, inf)", None)
    to_seed: int | None = within(SEEDS, None)
    precision: str = "auto"
    compile: Literal["blocks", "graphs"] | None = None
    autoencoder: str | None = reads("autoencoder", None)
    imports: list[str] = field(default_factory=list)
    data: DataFlags = field(default_factory=DataFlags)


def main(config: SampleConfig) -> None:
    """Load the checkpoint; generate samples, an interpolation or reconstructions."""
    with without_garbage_collection():
        from experiment import inputs
        from machine.accelerator import from_main
        from sampling.pipeline import load

    check_flags(config)
    pipeline = load(
        config.checkpoint, precision=config.precision, autoencoder=config.autoencoder, compile=config.compile
    )
    mode, checkpoint = mode_of(config), pipeline.checkpoint
    default = checkpoint.run / f"{'interpolation' if mode == 'interpolate' else mode}{checkpoint.output_suffix}.png"
    output = Path(config.output) if config.output else default
    from_main(pipeline.accelerator, lambda: inputs.check_output("--output", output))
    overrides = set_values(config.sampling)
    generator = pipeline.generator(config.classes, config.num_per_class, seed=config.seed, **overrides)
    if mode == "reconstruct":
        reconstruct_held_out(config, pipeline, generator, output)
    elif mode == "interpolate":
        interpolate_classes(config, pipeline, generator, output)
    else:
        generate_samples(config, pipeline, generator, output)


def generate_samples(config: SampleConfig, pipeline: "Pipeline", generator: "Generator", output: Path) -> None:
    """Write the samples and, if requested, pictures of their denoising and of their stages."""
    from sampling.generation import stream
    from sampling.grids import check_size, save_grid
    from sampling.panels import DenoisingPanel, StagesPanel

    panel = DenoisingPanel(config.panel, generator.num_steps) if config.panel else None
    stages = StagesPanel(pipeline.diffusion) if config.stages else None
    pictures = {name: drawn for name, drawn in {"panel": panel, "stages": stages}.items() if drawn is not None}
    generator = replace(generator, callback=panel, on_stage=stages)
    layout = grid_layout(generator.labels, pipeline.classes, config.num_per_class)
    check_size(output, len(generator.labels), generator.image_size, **layout)
    for name, drawn in pictures.items():  # they have few rows
        columns = len(drawn.column_names)
        check_size(second_output(output, name), columns, generator.image_size, columns)
    batches = stream(generator, batch_size=config.batch_size)
    if not pipeline.accelerator.is_main_process:
        deque(batches, maxlen=0)  # the main process gathers the images
        return

    keep = config.output is not None
    save_samples(batches, generator, pipeline.checkpoint, layout, output, keep=keep)
    print(f"{len(generator.labels)} images: {output}")
    for name, drawn in pictures.items():
        path, names = second_output(output, name), drawn.column_names
        save_grid(drawn.images(pipeline.codec), path, columns=len(names), column_names=names, keep=keep)
        print(f"{name}: {path}")


def interpolate_classes(config: SampleConfig, pipeline: "Pipeline", generator: "Generator", output: Path) -> None:
    """Write a row of images between the first class and the last, and between the seeds."""
    from sampling.grids import check_size, save_grid
    from sampling.interpolation import interpolate

    num_images = config.interpolate or 0
    check_size(output, num_images, generator.image_size, num_images)
    ends = int(generator.labels[0]), int(generator.labels[-1])
    seeds = config.seed, config.seed if config.to_seed is None else config.to_seed
    images = interpolate(generator, ends, seeds, num_images)
    if pipeline.accelerator.is_main_process:
        save_grid(images, output, columns=num_images, keep=config.output is not None)
        print(f"{num_images} images on the way: {output}")


def reconstruct_held_out(config: SampleConfig, pipeline: "Pipeline", generator: "Generator", output: Path) -> None:
    """Write a grid of held-out images, noised to a time and denoised."""
    from experiment.build import merge_data_flags, open_split
    from sampling.reconstruction import draw_reconstructions

    data = merge_data_flags(pipeline.checkpoint.config.data, config.data)
    held_out = open_split(data, "test", pipeline.accelerator)
    classes, keep = generator.labels.unique_consecutive().tolist(), config.output is not None
    draw_reconstructions(
        generator,
        pipeline.checkpoint,
        held_out,
        classes,
        config.num_per_class,
        config.reconstruct or 0.0,
        output,
        keep=keep,
    )


def save_samples(
    batches: Iterable[Any],
    generator: "Generator",
    checkpoint: "Checkpoint",
    layout: dict[str, Any],
    output: Path,
    *,
    keep: bool,
) -> None:
    """Write samples as a grid of this layout, an npz, or a folder with a subfolder per class, depending on the suffix
    of `output`. With `keep`, another grid of that name is kept; other samples always are."""
    import torch

    from sampling.grids import save_grid
    from sampling.image_files import save_folder, save_npz
    from sharing.model_card import without_paths

    labels = generator.labels
    names = [checkpoint.classes[label] if checkpoint.classes else "" for label in labels.tolist()]
    settings = without_paths(generator.provenance)  # now, as the files named may change; the picture may be published
    if output.suffix.lower() in PICTURES:
        save_grid(
            torch.cat(list(batches)),
            output,
            **layout,
            weights=checkpoint.weights_sha256,
            settings=settings,
            keep=keep,
        )
    elif output.suffix.lower() == ".npz":
        save_npz(batches, labels, checkpoint.classes, output, checkpoint.weights_sha256)
    else:
        save_folder(batches, names, output)


def grid_layout(labels: Any, classes: list[str], num_per_class: int) -> dict[str, Any]:
    """Columns and captions of a grid of samples."""
    columns = 12 if len(labels.unique()) == 1 else num_per_class * max(1, 12 // num_per_class)
    return {"columns": columns, "captions": [classes[label] for label in labels.tolist()] if classes else None}


PICTURES = (".png", ".pdf")
WITHOUT_EFFECT = {  # flags that are ignored, by mode
    "reconstruct": ("interpolate", "to_seed", "panel", "stages"),
    "interpolate": ("num_per_class", "panel", "stages", "data"),
    "samples": ("to_seed", "data"),
}


def mode_of(config: SampleConfig) -> str:
    """What is drawn: 'reconstruct', 'interpolate' or 'samples'."""
    return "reconstruct" if config.reconstruct is not None else "interpolate" if config.interpolate else "samples"


def check_flags(config: SampleConfig) -> None:
    """Before anything is generated, refuse flags without an effect, and an --output whose suffix names no format."""
    defaults, mode = SampleConfig(config.checkpoint), mode_of(config)
    for flag in WITHOUT_EFFECT[mode]:
        if getattr(config, flag) != getattr(defaults, flag):
            needed = {"to_seed": "interpolate", "data": "reconstruct"}.get(flag)
            if mode == "samples":
                raise ValueError(f"--{flag} has no effect without --{needed}: leave it out, or add --{needed}")
            raise ValueError(f"--{flag} has no effect with --{mode}: leave one of them out")
    output = Path(config.output) if config.output else None
    ending = output.suffix.lower() if output and not output.is_dir() else ""
    if output and mode != "samples" and ending not in PICTURES:
        raise ValueError(f"--output {output}: --{mode} draws one picture; give FILE.png or FILE.pdf")
    if ending[1:2].isalpha() and ending not in (*PICTURES, ".npz"):
        raise ValueError(
            f"--output {output}: give FILE.png or FILE.pdf for a grid, FILE.npz for arrays, or a folder, whose name "
            "has no ending"
        )


def second_output(output: Path, name: str) -> Path:
    """Path of a second picture, next to the output, where it is not mistaken for a sample."""
    ending = output.suffix if output.suffix.lower() in (*PICTURES, ".npz") else ""
    return output.with_name(f"{output.name.removesuffix(ending)}-{name}{ending.replace('.npz', '') or '.png'}")


if __name__ == "__main__":
    # --class is an alias, because a field cannot be called `class`.
    arguments = [a.replace("--class", "--classes", 1) if a.split("=")[0] == "--class" else a for a in sys.argv[1:]]
    run_main(main, SampleConfig, arguments=arguments)
