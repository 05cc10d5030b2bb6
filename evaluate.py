"""Score a checkpoint, a folder or an npz against held-out images; or measure autoencoders on them.

python evaluate.py --samples runs/XSwin
python evaluate.py --samples runs/XSwin --guidance_scale 1,1.5,2,4 --num_steps 20,50 --trials 3 --baselines true
python evaluate.py --samples samples.npz --data.path caltech101.zip --extractor mobilenet_v2.pt
python evaluate.py --samples runs/DiT-XL-2-256 --reference VIRTUAL_imagenet256_labeled.npz --num_samples 50000
python evaluate.py --autoencoder embedded,stabilityai/sd-vae-ft-ema --data.path caltech101.zip
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from checkpoints.hub import is_checkpoint_name
from experiment.cli import run_main
from experiment.config import DataConfig, DataFlags, EvaluationConfig, SamplingConfig
from machine.stopping import without_garbage_collection
from metrics.scores import PER_IMAGE, check_metrics, required_features
from settings import reads, set_values, unset, within, writes

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from autoencoders.codec import Codec
    from checkpoints.checkpoint import Checkpoint
    from data.image_set import ImageSet
    from evaluation.baselines import Controls
    from evaluation.scoring import Memorisation, Row, Scorer
    from evaluation.sources import Source
    from metrics.features import Features


@partial(unset, several=True)
class SweptSampling(SamplingConfig):
    """Overrides of the checkpoint's sampling settings, some of which take several values."""


@unset
class EvaluationFlags(EvaluationConfig):
    """Overrides of the checkpoint's settings for scoring."""


@dataclass(frozen=True)
class EvaluateConfig(EvaluationFlags):
    """Score samples against real images. The sections `evaluation` and `sampling` of a run give the defaults.

    Args:
        samples: a run or checkpoint to sample from (or its name), a folder or zip of images, or an npz
        checkpoint: for a fixed set of samples, the checkpoint whose held-out images and autoencoder to use
        reference: an npz with mu and sigma, arr_0 or both (ADM's format), instead of the held-out images; ADM's files
            for ImageNet are downloaded by name
        write_reference: write the held-out images and their moments to such an npz
        num_samples: images to generate, or to take; by default as many as there are held-out images
        trials: number of seeds, starting with `seed`; reports mean and standard deviation
        sampling: overrides of the checkpoint's settings; --guidance_scale is short for --sampling.guidance_scale, etc.
            With several values, such as 1,1.5,2, each combination is a row
        baselines: also score real training images (the floor) and their reconstructions by the autoencoder (the
            ceiling); for metrics by class, held-out images and their reconstructions
        per_class: also the Fréchet distance within each class that has 50 images or more
        memorisation: also find each sample's nearest training image
        likelihood: also the log-likelihood of this many held-out images in bits per dimension (Song et al. 2021), with
            about 800 calls of the model for each; 0: none
        self_check: only check metrics and extractor on inputs with known answers
        output: JSON file, with pictures beside it; by default scores.json in the run's folder (scores-WHICH.json if the
            weights are not the newest), NAME-scores.json beside a fixed set, autoencoder.json in an autoencoder's own
            folder, or NAMES-autoencoder.json here for several, embedded ones, or the hub's
        latex: also write the table for LaTeX (booktabs), as .tex beside the JSON, with the runs' names as rows
        seed: seed of samples and of subsets
        precision: of sampling: 'auto' (bf16 if the device has instructions for it, else fp32), 'fp32' or 'bf16'
        compile: of sampling: torch.compile the backbone's blocks ('blocks'), and launch each as a CUDA graph ('graphs')
        autoencoder: replaces the checkpoint's; without samples, the one to measure, or several separated by commas
        perceptual: for measuring autoencoders, the network that compares images: 'lpips', 'vgg19', or a .pt2 or
            TorchScript file (maps images from 0 to 255 to features; a program: run only what you trust)
        heads: for 'lpips', file of its weights v0.1 for VGG16; null downloads it
        imports: modules or .py files with samplers, metrics etc. of your own (docs/extending.md), if they have moved
        data: images of the reference, without a checkpoint or if they have moved (--data.path)
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


def main(config: EvaluateConfig) -> None:
    """Combine flags with the configuration of the checkpoint, and score samples or measure autoencoders."""
    with without_garbage_collection():
        from checkpoints.checkpoint import open_checkpoint
        from evaluation.autoencoder_scores import measure_autoencoders
        from evaluation.scoring import Scorer
        from evaluation.sources import rename_flag
        from experiment.build import merge_data_flags
        from machine.accelerator import open_accelerator
        from metrics.self_check import self_check

    check(config)
    accelerator = open_accelerator(config.precision)
    owner = config.checkpoint or (config.samples if config.samples and is_run(config.samples) else None)
    with rename_flag("--checkpoint" if config.checkpoint else "--samples", "--checkpoint"):
        checkpoint = open_checkpoint(owner, accelerator) if owner else None
    flags = {name: value for name, value in set_values(config).items() if name in EvaluationConfig.__dataclass_fields__}
    if "extractor" in flags:
        flags = {"weights_path": None} | flags  # the configured weights belong to the other extractor
    evaluation = replace(checkpoint.config.evaluation if checkpoint else EvaluationConfig(), **flags)
    check_metrics(evaluation.metrics)
    data = merge_data_flags(checkpoint.config.data if checkpoint else None, config.data)
    if config.self_check:
        accelerator.print(self_check(Scorer(evaluation, accelerator).extractor))
    elif config.samples is None:
        names = [name.strip() for name in str(config.autoencoder).split(",")]
        network = (config.perceptual, config.heads)
        accelerator.print(measure_autoencoders(names, data, evaluation, network, accelerator, config.output))
    else:
        score_samples(config, config.samples, checkpoint, data, Scorer(evaluation, accelerator))


def score_samples(
    config: EvaluateConfig, samples: str, checkpoint: "Checkpoint | None", data: DataConfig, scorer: "Scorer"
) -> None:
    """Score samples: open everything first, so that errors come early; then compute, report and write the scores."""
    import torch

    from evaluation import record
    from evaluation.likelihood import held_out_likelihood
    from evaluation.sources import from_images
    from evaluation.table import latex
    from experiment.inputs import check_output
    from machine.accelerator import from_main
    from machine.atomic_files import keeping, write_atomic
    from machine.lock import taking_turns
    from metrics.fidelity import class_distances
    from metrics.reference import write_adm

    accelerator = scorer.accelerator
    from_main(accelerator, lambda: check_output("--output", output_of(config, samples, checkpoint)))
    inputs = open_inputs(config, samples, checkpoint, data, scorer)
    held_out, controls = inputs.held_out, inputs.controls
    extra: dict[str, Any] = {}
    if config.likelihood and checkpoint and held_out:
        number, seed = config.likelihood, scorer.evaluation.seed
        bits = held_out_likelihood(checkpoint, inputs.codec, held_out, number, accelerator, seed=seed)
        extra["bits_per_dimension"] = {**asdict(bits), "num_images": number}
    reference = (
        scorer.npz_reference(config.reference, *inputs.reference_file) if config.reference else scorer.reference(data)
    )
    if controls:
        scorer.reference(data, "train", inputs.codec)  # for `memorisation`, so that errors come before hours of scoring
    output = output_of(config, samples, checkpoint)
    unfinished = record.unfinished_path(output, repr(config))

    def keep(done: list["Row"]) -> None:  # or hours of scoring are lost with the process
        if accelerator.is_main_process:
            record.write_unfinished({**record.provenance(done, reference, scorer), **extra}, unfinished)

    rows, features = scorer.score_rows(inputs.rows, reference, keep)
    nearest = scorer.memorisation(features, controls, data, inputs.codec) if controls else None
    if not accelerator.is_main_process:
        return
    if nearest is not None:
        extra["memorisation"] = nearest.to_dict()
    if held_out is not None and inputs.labels is not None:
        distances = class_distances(replace(features, labels=inputs.labels), reference.features)
        extra["per_class"] = {held_out.classes[label]: asdict(score) for label, score in distances.items()}

    # Report the results, before writing any file: if that fails, hours of scoring are not lost.
    swept = [name for name, value in set_values(config.sampling).items() if isinstance(value, str) and "," in value]
    columns = [*dict.fromkeys([*record.SWEPT, *swept])] if inputs.num_settings > 1 else []
    print(record.format_report(rows, columns, reference, scorer.extractor, extra))

    # Write the record, with everything needed to reproduce it, and pictures. Those of an earlier record are kept.
    output = output_of(config, samples, checkpoint)  # again, as there may be newer weights
    finished = {**record.provenance(rows, reference, scorer), **extra}
    beside = [output.with_name(f"{output.stem}{ending}") for ending in BESIDE]
    with taking_turns(output.parent), keeping(beside):  # or pictures of one could lie beside the record of another
        record.write_json(finished, output)
        record.remove_unfinished(finished, output)
        written = [output, *write_pictures(output, rows, columns, inputs, nearest)]
        if config.latex:
            written.append(output.with_suffix(".tex"))
            write_atomic(written[-1], record.table(rows, columns, form=latex))
    if config.write_reference and held_out:
        pixels = from_images(held_out, "held-out images").images(torch.arange(len(held_out)))
        written.append(Path(config.write_reference))
        write_adm(written[-1], reference.features, pixels, scorer.extractor)
    print("written: " + ", ".join(map(str, written)))


BESIDE = (".png", "-sweep.png", "-nearest.png", ".tex")  # endings of what is written beside a record


@dataclass(frozen=True)
class Inputs:
    """All that is opened before samples are scored."""

    codec: "Codec"
    held_out: "ImageSet | None"  # the reference, unless it is a file
    reference_file: "tuple[Features | None, Tensor | None]"  # moments and images of the reference's file
    rows: "list[tuple[Sequence[Source], Sequence[str]]]"  # trials of each row, and its metrics; baselines come last
    num_settings: int  # number of rows before the baselines
    controls: "Controls | None"  # of --memorisation
    labels: "Tensor | None"  # of the first samples, for --per_class


def open_inputs(
    config: EvaluateConfig, samples: str, checkpoint: "Checkpoint | None", data: DataConfig, scorer: "Scorer"
) -> Inputs:
    """Open the reference, which is a file or the held-out images, and the sources to score."""
    from autoencoders.codec import create_codec
    from evaluation import sources
    from evaluation.baselines import baselines, open_controls
    from metrics.reference import read_adm

    evaluation, accelerator = scorer.evaluation, scorer.accelerator
    if (config.memorisation or config.per_class) and not required_features(evaluation.metrics) & PER_IMAGE:
        flag = "--memorisation" if config.memorisation else "--per_class"
        raise ValueError(f"{flag}: it looks at images one by one; give --metrics one that does, such as kid")
    test_images = open_test_images(config, checkpoint, data, accelerator)
    held_out = None if config.reference else test_images
    reference_file = None, None
    if config.reference:
        reference_file = read_adm(Path(config.reference), scorer.extractor, (data.image_size, data.image_size))
    name = config.autoencoder
    codec = checkpoint.open_codec(name, accelerator.print) if checkpoint else create_codec(name or "pixel")
    codec = codec.to(accelerator.device)
    if checkpoint and is_run(samples):
        settings, real = sources.sweep(config.sampling), reference_file[1] if held_out is None else held_out
        how = (accelerator, config.trials, real, config.compile)
        groups = sources.from_checkpoint(checkpoint, settings, evaluation, codec, *how)
    else:
        groups = [[sources.read_samples(samples, data.image_size, evaluation.num_samples, evaluation.seed)]]
        for message in groups[0][0].provenance.get("left_out", ()):
            accelerator.print(f"--samples {samples}: {message}")
    first = groups[0][0]
    rows: list[tuple[Sequence[Source], Sequence[str]]] = [(trials, evaluation.metrics) for trials in groups]
    if config.baselines and held_out is not None:
        rows_of_images = baselines(first, data, held_out, codec, evaluation, accelerator)
        rows += [([source], metrics) for source, metrics in rows_of_images]
    controls = None
    if config.memorisation and test_images is not None:
        controls = open_controls(first, test_images, data, evaluation, accelerator)
    labels = labels_among(first, held_out) if config.per_class else None
    return Inputs(codec, held_out, reference_file, rows, len(groups), controls, labels)


def write_pictures(
    output: Path, rows: "Sequence[Row]", columns: Sequence[str], inputs: Inputs, nearest: "Memorisation | None"
) -> list[Path]:
    """Save a grid of the first samples, the plot of a sweep, and samples above their nearest training images."""
    import torch

    from evaluation import record
    from sampling.grids import save_grid

    first, written = inputs.rows[0][0][0], [output.with_suffix(".png")]
    save_grid(first.images(torch.arange(min(24, first.num_images))), written[-1], columns=12)
    if inputs.num_settings > 1:
        written.append(output.with_name(f"{output.stem}-sweep.png"))
        record.draw_sweep(rows[: inputs.num_settings], written[-1], columns)
    if nearest and inputs.controls:
        written.append(output.with_name(f"{output.stem}-nearest.png"))
        record.draw_pairs(first, inputs.controls.train, nearest, written[-1])
    return written


def open_test_images(
    config: EvaluateConfig, checkpoint: "Checkpoint | None", data: DataConfig, accelerator: "Accelerator"
) -> "ImageSet | None":
    """Open the held-out images, unless a reference replaces them, and check that they are the checkpoint's."""
    from experiment.build import open_split

    if config.reference and not config.memorisation:
        return None
    test_images = open_split(data, "test", accelerator)
    if checkpoint and "test" in checkpoint.identity:
        checkpoint.check_identity(test=test_images.describe())
    return test_images


def labels_among(samples: "Source", held_out: "ImageSet | None") -> "Tensor":
    """Labels of samples among the classes of held-out images."""
    from data.subsets import map_labels

    if held_out is None or samples.labels is None or not held_out.classes:
        raise ValueError("--per_class: it needs samples and held-out images of classes that have names")
    return map_labels(samples.labels, samples.classes, held_out.classes, "--per_class")


def output_of(config: EvaluateConfig, samples: str, checkpoint: "Checkpoint | None") -> Path:
    """Path of the record; by default in the run's folder, or beside a fixed set of samples."""
    if config.output:
        return Path(config.output)
    if checkpoint and is_run(samples):
        return checkpoint.run / f"scores{checkpoint.output_suffix}.json"
    path = Path(samples).resolve()
    return path.with_name(f"{path.name if path.is_dir() else path.stem}-scores.json")


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
        fixed = f"{samples} is a fixed set of images, there is nothing to draw"
        for name in set_values(config.sampling):
            raise ValueError(f"--sampling.{name}: {fixed}")
        refuse(("trials", "likelihood", "compile"), fixed)
    elif config.checkpoint is not None:
        reason = f"it is for a fixed set of images, and {samples} is a run, held against its own held-out images"
        refuse(["checkpoint"], f"{reason}; leave --checkpoint out")
    if config.reference:
        need_held_out = ("baselines", "write_reference", "likelihood", "per_class")
        refuse(need_held_out, "it needs the held-out images; leave --reference out")


if __name__ == "__main__":
    run_main(main, EvaluateConfig)
