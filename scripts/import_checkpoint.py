"""Import published weights as a checkpoint for sample.py and evaluate.py, or as an autoencoder.

    python scripts/import_checkpoint.py --weights DiT-XL-2-256x256 --output runs/DiT-XL-2-256     # downloads it
    python scripts/import_checkpoint.py --source uvit --weights imagenet512_uvit_huge.pth --output runs/UViT-H-4-512
    python scripts/import_checkpoint.py --source xswin --weights 0100000.pt --classes names.txt --output runs/published
    python scripts/import_checkpoint.py --source tiny --weights taef2_encoder.pth taef2_decoder.pth --data.path photos \
        --output taef2                                                        # then train.py --autoencoder taef2
    python scripts/import_checkpoint.py --weights vavae-imagenet256-f16d32-dinov2 --output vavae
    python scripts/import_checkpoint.py --weights lightningdit-xl-imagenet256-800ep --autoencoder vavae --output runs/XL

Sizes, number of classes and learned variance are inferred from the weights; no code in the file is executed. Public
files (docs/zoo.md) are downloaded by name.
"""

import json
import sys
from collections.abc import Container
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiment.cli import run_main
from experiment.config import DataConfig, DiffusionConfig, ExperimentConfig, SamplingConfig
from settings import reads, within

if TYPE_CHECKING:
    from models import ModelSpec

LATENT_FACTOR, OTHER_FACTORS = 8, {"lightningdit": 16}  # side of image over side of latent in published autoencoders

# The diffusions of the published trainings, and the authors' sampling settings. A published U-ViT receives the time
# n = 1..1000 if its times are discrete (huge), or 999 t if they are continuous (the others), whose schedule corresponds
# to `linear` in a thousand steps. LightningDiT's times are only shifted in sampling, and guidance acts where its time,
# 1 - t, is at least 1/8.
DIFFUSION = {
    "sit": DiffusionConfig(kind="flow", model_times=[1.0, 0.0]),
    "repa": DiffusionConfig(kind="flow", model_times=[0.0, 1.0]),
    "lightningdit": DiffusionConfig(kind="flow", model_times=[1.0, 0.0], times="logit_normal", shift=1 / 0.3),
    "uvit": DiffusionConfig(variance="fixed_large", model_times=[0.999, 999.0]),
    "uvit-huge": DiffusionConfig(schedule="scaled_linear", variance="fixed_large", model_times=[1.0, 1000.0]),
}
SAMPLING = {
    "dit": SamplingConfig(num_steps=250, guidance_scale=1.5, legacy_cfg_channels=3),
    "sit": SamplingConfig(num_steps=250, guidance_scale=1.5, legacy_cfg_channels=3),
    "repa": SamplingConfig(  # guidance acts at times up to 0.7
        sampler="euler_maruyama", num_steps=250, guidance_scale=1.8, guidance_interval=[0.0, 0.7 / 0.3]
    ),
    "lightningdit": SamplingConfig(
        num_steps=250, guidance_scale=6.7, guidance_interval=[0.0, 7.0], legacy_cfg_channels=3
    ),
    "uvit": SamplingConfig(sampler="dpmpp_2m", num_steps=50, guidance_scale=1.4),  # 1.7 at 512 pixels
}


@dataclass(frozen=True)
class ImportConfig:
    """Import published weights as a checkpoint or an autoencoder.

    Args:
        weights: file with a state dict or a training checkpoint; for 'tiny' two files, encoder and decoder; for 'ldm'
            optionally a second file with mean and std of the latents. If there is no such file, a name of docs/zoo.md,
            such as DiT-XL-2-256x256, is downloaded
        output: folder of the new checkpoint or autoencoder
        source: 'dit' and 'sit' (.pt by Meta), 'repa' (.pt by Yu et al.), 'lightningdit' (.pt by Yao et al.), 'uvit'
            (.pth by Bao et al.), 'uvit-adaln', 'uswin' or 'xswin' (.pt of the XSwin authors' repository); 'tiny' (the
            autoencoders TAESD, TAESDXL, TAESD3, TAEF1, TAEF2), 'ldm' (autoencoders in the format of latent-diffusion's
            code, such as VA-VAE); by default inferred from the name of a public file
        autoencoder: autoencoder of the model's latents: a hub id, a folder in diffusers' format, or 'pixel'
        classes: text file with one class name per line; by default ImageNet's for 1000 classes, else numbers
        data: training images (--data.path); an autoencoder without given statistics normalises its latents with
            theirs, at --data.image_size
        image_size: side in pixels; by default 8 times that of the latents, for 'lightningdit' 16 times
        num_heads: number of attention heads, if the width is not a published one
    """

    weights: Path | list[Path] = field(metadata={"reads": "weights"})
    output: Path
    source: str | None = None
    autoencoder: str = reads("autoencoder", "stabilityai/sd-vae-ft-ema")
    classes: Path | None = reads("file", None)
    data: DataConfig = field(default_factory=DataConfig)
    image_size: int | None = within("[1, 16384]", None)
    num_heads: int | None = within("[1, inf)", None)


def main(config: ImportConfig) -> None:
    """Convert the weights in a temporary folder, which is renamed once it can be opened."""
    from conversion.public_files import public_autoencoder
    from machine.atomic_files import atomic_path, check_empty

    check_empty(config.output, "--output")
    files = config.weights if isinstance(config.weights, list) else public_autoencoder(config.weights, config.source)
    is_autoencoder = config.source in ("tiny", "ldm") or (config.source is None and files != [config.weights])
    if is_autoencoder:
        check_autoencoder(config, files)
    with atomic_path(config.output) as folder:
        description = import_autoencoder(config, files, folder) if is_autoencoder else import_backbone(config, folder)
    print(f"{description}{config.output}")


def import_backbone(config: ImportConfig, folder: Path) -> str:
    """Write weights as a checkpoint, and return a description of it."""
    from checkpoints.checkpoint import WEIGHTS, make_metadata, open_checkpoint, save_tensors
    from conversion.public_files import FILES, public_file
    from conversion.training_files import read_weights
    from conversion.weights import find_named_backbone, infer_arguments, load_reference
    from machine.atomic_files import sha256_of
    from models import ModelSpec

    if isinstance(config.weights, list):
        raise ValueError(f"--weights {' '.join(map(str, config.weights))}: source {config.source} is one file")
    path, public = public_file(config.weights)
    source = config.source or (public.source if public else None)
    if public and source != public.source:
        raise ValueError(f"--source {source}: {path.name} is of {public.source}; leave it out, or rename your own file")
    if source is None:
        raise ValueError(f"--source: whose format {path.name} is in; only {', '.join(FILES)} say it by their names")
    weights, step = read_weights(path)
    arguments = infer_arguments(source, weights, config.num_heads)
    model = load_reference(source, weights, arguments)

    side = arguments.pop("input_size")
    sizes = {name: arguments.pop(name) for name in ("in_channels", "out_channels", "num_classes")}
    name, args = find_named_backbone(arguments.pop("name"), arguments)
    spec = ModelSpec(name=name, args=args, input_size=(side, side), **sizes)
    trained_on = side * (1 if config.autoencoder == "pixel" else OTHER_FACTORS.get(source, LATENT_FACTOR))
    diffusion, sampling = published_settings(source, weights, spec, trained_on)
    if public:
        public.check(config.weights.name, name, trained_on)
    image_size = config.image_size or trained_on
    if config.data.image_size not in (DataConfig().image_size, image_size):
        raise ValueError(f"--data.image_size {config.data.image_size}: give it as --image_size, which is {image_size}")
    data = replace(config.data, image_size=image_size)
    experiment = ExperimentConfig(spec.name, spec.args, config.autoencoder, name=config.output.name, data=data)
    experiment = replace(experiment, diffusion=diffusion, sampling=sampling)
    metadata = make_metadata(experiment, step, spec=spec, classes=read_classes(config.classes, spec.num_classes))
    origin = {"source": source, "file": path.name, "sha256": sha256_of(path)}
    folder.mkdir()
    save_tensors({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, folder / WEIGHTS, metadata)
    (folder / "imported.json").write_text(json.dumps(origin, indent=2) + "\n")
    open_checkpoint(folder)
    return (
        f"{name}{f' {args}' if args else ''}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, "
        f"{side}x{side}x{spec.in_channels} latents, {spec.num_classes} classes: "
    )


def check_autoencoder(config: ImportConfig, files: list[Path]) -> None:
    """Raise ValueError for flags that the import of an autoencoder would ignore."""
    defaults = ImportConfig(config.weights, config.output)
    for name in ("autoencoder", "classes", "image_size", "num_heads"):
        if (value := getattr(config, name)) != getattr(defaults, name):
            remedy = f"give --data.image_size {value}" if name == "image_size" else "leave it out"
            raise ValueError(f"--{name} {value}: it is of a backbone, and this is an autoencoder; {remedy}")
    if config.source != "tiny" and len(files) == 2 and config.data != defaults.data:
        raise ValueError(f"--data: latents are normalised by {files[1].name}, not by images; leave one of both out")


def published_settings(
    source: str, weights: Container[str], spec: "ModelSpec", image_size: int
) -> tuple[DiffusionConfig, SamplingConfig]:
    """The diffusion of the published training, and the authors' sampling settings."""
    is_huge = source == "uvit" and "final_layer.weight" not in weights
    diffusion = DIFFUSION.get("uvit-huge" if is_huge else source, DiffusionConfig())
    if diffusion.variance is None and diffusion.kind == "gaussian" and spec.out_channels == spec.in_channels:
        diffusion = replace(diffusion, variance="fixed_large")
    sampling = SAMPLING.get(source, SamplingConfig())
    if source == "uvit" and image_size == 512:
        sampling = replace(sampling, guidance_scale=1.7)
    return diffusion, sampling


def import_autoencoder(config: ImportConfig, files: list[Path], folder: Path) -> str:
    """Write an autoencoder in diffusers' format, with statistics of its latents, and return a description of it."""
    import torch

    from autoencoders.ldm import from_ldm, read_statistics
    from autoencoders.pretrained import with_statistics
    from autoencoders.tiny import from_published
    from conversion.training_files import read_weights
    from data.subsets import stratified
    from experiment.build import open_split

    if config.source == "tiny" and len(files) != 2:
        raise ValueError("--weights: source tiny is two files, --weights ENCODER DECODER")
    if len(files) > 2:
        raise ValueError("--weights: source ldm is one file, or two: --weights AUTOENCODER STATISTICS")
    first, *second = (read_weights(path)[0] for path in files)
    autoencoder = from_published(first, second[0]) if config.source == "tiny" else from_ldm(first)
    channels = autoencoder.config["latent_channels"]
    if second and config.source != "tiny":
        autoencoder.register_to_config(scaling_factor=1.0, **read_statistics(second[0], channels))
        by = files[1].name
    else:
        images = open_split(config.data, "train")
        subset = stratified(images.labels, min(1024, len(images)), seed=0).tolist()
        with_statistics(autoencoder, torch.stack([images[index][0] for index in subset]).float() / 127.5 - 1)
        by = f"{len(subset)} images of {config.data.path} of {config.data.image_size} pixels"
    if all(weight.half().float().equal(weight) for weight in autoencoder.parameters()):
        autoencoder.half()  # lossless, as for TAEF2; it is still computed in float32
    autoencoder.save_pretrained(folder)
    size = sum(parameter.numel() for parameter in autoencoder.parameters()) / 1e6
    summary = f"{type(autoencoder).__name__}: {size:.1f}M parameters, {channels} channels"
    return f"{summary}, normalised by {by}: --autoencoder "


def as_list(arguments: list[str]) -> list[str]:
    """Join several values that follow --weights into one list in JSON."""
    if "--weights" not in arguments:
        return arguments
    start = arguments.index("--weights") + 1
    values = list(takewhile(lambda word: not word.startswith("--"), arguments[start:]))
    joined = [json.dumps(values)] if len(values) > 1 else values
    return [*arguments[:start], *joined, *arguments[start + len(values) :]]


def read_classes(path: Path | None, num_classes: int) -> list[str]:
    """Read the names of the classes, and number those that occur twice."""
    names = [str(label) for label in range(num_classes)]
    if path is not None:
        try:
            names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeError) as error:
            raise ValueError(f"--classes {path}: not a text file with a class a line ({error})") from error
    elif num_classes == 1000:
        from torchvision.models import ResNet18_Weights

        names = list(ResNet18_Weights.DEFAULT.meta["categories"])
    if len(names) != num_classes:
        raise ValueError(f"--classes {path}: {len(names)} names, and the model has {num_classes} classes")
    return [f"{name} {label}" if names.count(name) > 1 else name for label, name in enumerate(names)]


if __name__ == "__main__":
    run_main(main, ImportConfig, arguments=as_list(sys.argv[1:]))
