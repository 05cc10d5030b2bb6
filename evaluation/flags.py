"""The flags of `evaluate.py`, and which of them have no effect together."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from checkpoints.hub import is_checkpoint_name
from experiment.config import DataFlags, EvaluationConfig, SamplingConfig
from settings import reads, set_values, unset, within, writes


@partial(unset, several=True)
class SweptSampling(SamplingConfig):
    """Overrides of the checkpoint's sampling settings, some of which take several values."""


@unset
class EvaluationFlags(EvaluationConfig):
    """Overrides of the checkpoint's scoring settings."""


@dataclass(frozen=True)
class EvaluateConfig(EvaluationFlags):
    """Score samples against real images. The defaults are the sections `evaluation` and `sampling` of the run.

    Args:
        samples: a run or checkpoint to sample from (or its name), a folder or zip of images, or an npz
        checkpoint: for a fixed set of samples, the checkpoint whose held-out images and autoencoder to use
        reference: an npz with mu and sigma, arr_0 or both (ADM's format), instead of the held-out images; ADM's files
            for ImageNet are downloaded by name
        write_reference: write the held-out images and their moments to such an npz
        num_samples: images to generate, or to use of a fixed set; by default as many as there are held-out images
        trials: number of seeds, starting with `seed`; reports mean and standard deviation
        sampling: overrides of the checkpoint's settings; --guidance_scale is short for --sampling.guidance_scale, etc.
            With several values, such as 1,1.5,2, each combination is a row
        baselines: also score real training images (the floor) and their reconstructions by the autoencoder (the
            ceiling); for metrics by class, held-out images and their reconstructions
        per_class: also compute the Fréchet distance within each class that has 50 images or more
        memorisation: also find each sample's nearest training image
        likelihood: also compute the bits per dimension of this many held-out images (Song et al. 2021), with about 800
            model calls each; 0: none
        self_check: only check metrics and extractor on inputs with known answers
        output: JSON file, with pictures next to it; by default scores.json in the run's folder (scores-WHICH.json if
            the weights are not the newest), NAME-scores.json next to a fixed set, autoencoder.json in an autoencoder's
            folder, or NAMES-autoencoder.json here for several, embedded ones, or those of the hub
        latex: also write the table for LaTeX (booktabs), as .tex next to the JSON, with the runs' names as rows
        seed: seed of samples and of subsets
        precision: of sampling: 'auto' (bf16 if the device has instructions for it, else fp32), 'fp32' or 'bf16'
        compile: for sampling, torch.compile the backbone's blocks ('blocks'), and launch each as a CUDA graph
            ('graphs')
        autoencoder: replaces the checkpoint's; without samples, the one to measure, or several separated by commas
        perceptual: for measuring autoencoders, the network that compares images: 'lpips', 'vgg19', or a .pt2 or
            TorchScript file (maps images in 0..255 to features; a program: run only what you trust)
        heads: for 'lpips': file with its v0.1 weights for VGG16; null downloads it
        imports: modules or .py files with custom samplers, metrics etc. (docs/extending.md), if they have moved
        data: reference images, if there is no checkpoint or they have moved (--data.path)
    """

    samples: str | None = reads("samples", None)
    checkpoint: str | None = reads("checkpoint", None)
    reference: str | None = reads("reference", None)
    write_reference: str | None = writes(".npz", None)
    trials: int = within("[1, inf)", 1)
    sampling: SweptSampling = field(default_factory=SweptSampling, metadata={"short": True})
    baselines: bool = False
    per_class: bool = False
    memorisation: bool = False
    likelihood: int = within("[0, inf)", 0)
    self_check: bool = False
    output: str | None = writes(".json", None)
    latex: bool = False
    precision: str = "auto"
    compile: Literal["blocks", "graphs"] | None = None
    autoencoder: str | None = reads("autoencoder", None)
    perceptual: str = reads("name or file", "lpips")
    heads: str | None = reads("file", None)
    imports: list[str] = field(default_factory=list)
    data: DataFlags = field(default_factory=DataFlags)


def is_run(path: str) -> bool:
    """Whether a path or name is a model to sample from: a run's folder, a checkpoint, or its weights."""
    folder = Path(path)
    has_weights = any((folder / name).exists() for name in ("checkpoints", "ema.safetensors"))
    return is_checkpoint_name(path) or has_weights or folder.suffix == ".safetensors"


FOR_AUTOENCODERS = {"autoencoder", "perceptual", "heads", "extractor", "weights_path", "metrics", "num_samples", "seed"}
FOR_AUTOENCODERS |= {"batch_size", "output", "imports", "data"}


def check(config: EvaluateConfig) -> None:
    """Raise ValueError for flags that are missing or have no effect together."""
    defaults, samples = EvaluateConfig(), config.samples
    given = [flag for flag in asdict(defaults) if getattr(config, flag) != getattr(defaults, flag)]

    def refuse(flags: Iterable[str], reason: str) -> None:
        for flag in (flag for flag in given if flag in flags):
            value = getattr(config, flag)
            raise ValueError(f"--{flag}{f' {value}' if isinstance(value, str | int | float) else ''}: {reason}")

    if config.self_check:
        return
    if samples is None and config.autoencoder is None:
        raise ValueError("--samples: give a run, a folder, a zip or an npz; or --autoencoder, or --self_check true")
    if samples is None:
        for_samples = {*given}.difference(FOR_AUTOENCODERS)
        refuse(for_samples, "it is about samples; give --samples, or leave it out to measure --autoencoder")
        return
    refuse(("perceptual", "heads"), "it measures an autoencoder; leave it out, or leave --samples out")
    if not is_run(samples):
        fixed = f"{samples} is a fixed set of images, there is nothing to sample"
        for name in set_values(config.sampling):
            raise ValueError(f"--sampling.{name}: {fixed}")
        refuse(("trials", "likelihood", "compile"), fixed)
    elif config.checkpoint is not None:
        reason = f"it is for a fixed set of images, and {samples} is a run, held against its own held-out images"
        refuse(["checkpoint"], f"{reason}; leave --checkpoint out")
    if config.reference:
        need_held_out = ("baselines", "write_reference", "likelihood", "per_class")
        refuse(need_held_out, "it needs the held-out images; leave --reference out")
