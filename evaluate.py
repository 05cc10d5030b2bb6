"""Score a checkpoint, a folder or an npz against held-out images; or measure autoencoders on them.

python evaluate.py --samples runs/XSwin
python evaluate.py --samples runs/XSwin --guidance_scale 1,1.5,2,4 --num_steps 20,50 --trials 3 --baselines true
python evaluate.py --samples samples.npz --data.path caltech101.zip --extractor mobilenet_v2.pt
python evaluate.py --samples runs/DiT-XL-2-256 --reference VIRTUAL_imagenet256_labeled.npz --num_samples 50000
python evaluate.py --autoencoder embedded,stabilityai/sd-vae-ft-ema --data.path caltech101.zip
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints.hub import is_name
from experiment.cli import one_line_errors, parse
from experiment.config import DataConfig, DataFlags, EvaluationConfig, SamplingConfig
from machine.stopping import importing
from metrics.scores import PER_IMAGE, check_metrics, needs_of
from settings import set_values, unset, within

if TYPE_CHECKING:
    from checkpoints.checkpoint import Checkpoint
    from evaluation.scoring import Scorer


@partial(unset, several=True)
class SweptSampling(SamplingConfig):
    """What is said of sampling in place of the checkpoint, of some settings several values."""


@unset
class EvaluationFlags(EvaluationConfig):
    """What is said of scoring in place of the checkpoint."""


@dataclass(frozen=True)
class EvaluateConfig(EvaluationFlags):
    """Score samples against real images. What a run's configuration says (`evaluation`, `sampling`) is the default.

    Args:
        samples: a run or checkpoint (or its name) to draw from, a folder or zip of images, or an npz
        checkpoint: whose held-out images and autoencoder the samples are held against; by default samples itself
        reference: an npz with mu and sigma, arr_0 or both (ADM's format), in place of the held-out images; ADM's own of
            ImageNet are downloaded by their names
        write_reference: write the held-out images and their moments to such an npz
        num_samples: images to draw, or to take; by default as many as there are held-out images
        trials: repeat with the seeds after `seed` too, and report mean and standard deviation
        sampling: in place of the checkpoint's own settings; --guidance_scale is short for --sampling.guidance_scale,
            and so are all others. Numbers and names may be several, such as 1,1.5,2: each combination is a row
        baselines: also score real training images (the floor) and what the autoencoder makes of them (the ceiling of
            anything generated through it); by class, held-out images and what it makes of those
        per_class: also the Fréchet distance within each class that has 50 images or more
        memorisation: also find each sample's nearest training image
        likelihood: also the log-likelihood of so many held-out images in bits per dimension (Song et al. 2021), each
            about 800 calls of the model; 0: none
        self_check: check metrics and extractor on inputs with known answers, and do nothing else
        output: JSON file, pictures beside it; by default scores.json in the run's folder (of older weights
            scores-WHICH.json), NAME-scores.json beside a fixed set, autoencoder.json in an autoencoder's own folder,
            NAMES-autoencoder.json here for several, embedded ones, or the hub's
        latex: also write the table for LaTeX (booktabs), as .tex beside the JSON; its rows bear the runs' names
        seed: of the drawn samples, and of subsets
        precision: of sampling: 'auto' (bf16 where the device has instructions for it), 'fp32' or 'bf16'
        autoencoder: in place of the checkpoint's; without samples, the one to measure, or several with commas between
        perceptual: of an autoencoder alone: network to compare images by: 'lpips', 'vgg19', or a .pt2 or TorchScript
            file (images from 0 to 255 to features; a program: run only what you trust)
        heads: of 'lpips': file of its weights v0.1 for VGG16; null downloads it
        imports: modules or .py files of samplers, metrics, ... (docs/extending.md), where a checkpoint's have moved too
        data: of the reference, where no checkpoint says or the file has moved (--data.path)
    """

    samples: str | None = None
    checkpoint: str | None = None
    reference: str | None = None
    write_reference: str | None = None
    trials: int = within("[1, inf)", 1)
    sampling: SweptSampling = field(default_factory=SweptSampling, metadata={"short": True})
    baselines: bool = False
    per_class: bool = False
    memorisation: bool = False
    likelihood: int = within("[0, inf)", 0)
    self_check: bool = False
    output: str | None = None
    latex: bool = False
    precision: str = "auto"
    autoencoder: str | None = None
    perceptual: str = "lpips"
    heads: str | None = None
    imports: list[str] = field(default_factory=list)
    data: DataFlags = field(default_factory=DataFlags)


def main(config: EvaluateConfig) -> None:
    """Open what is asked for, of which a run's own configuration says the rest, and do it."""
    with importing():
        from autoencoding.measure import measure_autoencoders
        from checkpoints.checkpoint import open_checkpoint
        from evaluation.scoring import Scorer
        from evaluation.sources import blaming
        from experiment.build import data_of
        from machine.accelerator import open_accelerator
        from metrics.self_check import self_check

    check(config)
    accelerator = open_accelerator(config.precision)
    owner = config.checkpoint or (config.samples if config.samples and is_run(config.samples) else None)
    with blaming("--checkpoint" if config.checkpoint else "--samples", "--checkpoint"):
        checkpoint = open_checkpoint(owner, accelerator) if owner else None
    flags = {name: value for name, value in set_values(config).items() if name in EvaluationConfig.__dataclass_fields__}
    flags = ({"weights_path": None} if "extractor" in flags else {}) | flags  # another's are not its
    evaluation = replace(checkpoint.config.evaluation if checkpoint else EvaluationConfig(), **flags)
    check_metrics(evaluation.metrics)
    data = data_of(checkpoint.config.data if checkpoint else None, config.data)
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
    """The whole of scoring, top to bottom."""
    import torch

    from autoencoders.codec import create_codec
    from data.subsets import by_name
    from evaluation import record, sources
    from evaluation.baselines import baselines
    from evaluation.likelihood import held_out_likelihood
    from evaluation.scoring import summarise
    from evaluation.table import latex
    from experiment.build import open_split
    from machine.whole_files import write_whole
    from metrics.fidelity import class_distances
    from metrics.reference import read_adm, write_adm
    from sampling.image_files import save_grid

    # What samples are held against: held-out images or a file. All is opened before anything is computed.
    evaluation, accelerator = scorer.evaluation, scorer.accelerator
    drawn_from = checkpoint if is_run(samples) else None
    if (config.memorisation or config.per_class) and not needs_of(evaluation.metrics) & PER_IMAGE:
        flag = "--memorisation" if config.memorisation else "--per_class"
        raise ValueError(f"{flag}: it looks at images one by one; give --metrics one that does, such as kid")
    held_out = None if config.reference else open_split(data, "test", accelerator)
    looked_at = held_out or (open_split(data, "test", accelerator) if config.memorisation else None)
    if checkpoint and looked_at is not None and "test" in checkpoint.identity:
        checkpoint.check_identity(test=looked_at.describe())
    size = (data.image_size, data.image_size)
    moments, images = read_adm(Path(config.reference), scorer.extractor, size) if config.reference else (None, None)
    name = config.autoencoder
    codec = checkpoint.open_codec(name, accelerator.print) if checkpoint else create_codec(name or "pixel")
    codec = codec.to(accelerator.device)

    # What is scored: a row a setting of the sampler, each of several trials, or a fixed set; then the baselines.
    if drawn_from:
        real = images if held_out is None else held_out
        groups = sources.from_checkpoint(
            drawn_from,
            sources.sweep(config.sampling),
            evaluation,
            codec,
            accelerator,
            num_trials=config.trials,
            num_reference=0 if real is None else len(real),
            held_out=held_out,
        )
    else:
        fixed = sources.read_samples(samples, data.image_size, evaluation.num_samples, evaluation.seed)
        groups = [[fixed]]
        for words in fixed.provenance.get("left_out", ()):
            accelerator.print(f"--samples {samples}: {words}")
    first, num_drawn = groups[0][0], len(groups)
    scored = [(trials, evaluation.metrics) for trials in groups]  # and what is asked of them
    if config.baselines:
        assert held_out is not None  # check saw to it
        of_images = baselines(first, data, held_out, codec, evaluation, accelerator)
        scored += [([source], names) for source, names in of_images]
    train = copies = unseen = labels = None
    if config.memorisation:
        train = open_split(data, "train", accelerator)
        copies = sources.like(first, train, "training images", "--memorisation", evaluation.seed)
        unseen, _ = sources.like(first, looked_at, "held-out images", "--memorisation", evaluation.seed)
    if config.per_class:
        assert held_out is not None  # check saw to it
        if first.labels is None or not held_out.classes:
            raise ValueError("--per_class: it needs samples and held-out images of classes that have names")
        labels = by_name(first.labels, first.classes, held_out.classes, "--per_class")

    # The scores.
    extra: dict[str, Any] = {}
    if config.likelihood:
        assert checkpoint is not None  # check saw to it
        assert held_out is not None
        bits = held_out_likelihood(checkpoint, codec, held_out, config.likelihood, accelerator, seed=evaluation.seed)
        extra["bits_per_dimension"] = {**asdict(bits), "num_images": config.likelihood}
    in_file = scorer.npz_reference(config.reference, moments, images) if config.reference else None
    reference = in_file or scorer.reference(data)
    rows, features = [], None  # features of the first row's first trial
    for trials, names in scored:
        scores = []
        for source in trials:
            score, of_source = scorer.score(source, reference, names)
            scores, features = [*scores, score], features or of_source
        rows.append(summarise(trials[0], scores))
    assert features is not None
    nearest = None
    if copies and unseen:
        nearest = scorer.memorisation(features, *copies, unseen, data, codec)
        planted = {"planted_copies_closer": nearest.copies, "planted_copies_found": nearest.found}
        extra["memorisation"] = {"closer_to_training_than_held_out": nearest.closer, **planted}
    if not accelerator.is_main_process:
        return
    if held_out is not None and labels is not None:
        distances = class_distances(replace(features, labels=labels), reference.features)
        extra["per_class"] = {held_out.classes[label]: asdict(score) for label, score in distances.items()}

    # What came out: in words first, as a file that cannot be written would else take hours of scoring along.
    swept = [name for name, value in set_values(config.sampling).items() if isinstance(value, str) and "," in value]
    columns = [*dict.fromkeys([*record.SWEPT, *swept])] if num_drawn > 1 else []
    print(record.in_words(rows, columns, reference, scorer.extractor, extra))

    # The files: a record with all that it takes to derive it again, pictures of what was scored.
    output = Path(config.output or output_of(samples, drawn_from))
    written = [output, output.with_suffix(".png")]
    record.write_json({**record.provenance(rows, reference, scorer), **extra}, output)
    save_grid(first.images(torch.arange(min(24, first.num_images))), written[-1], columns=12)
    if num_drawn > 1:
        written.append(output.with_name(f"{output.stem}-sweep.png"))
        record.draw_sweep(rows[:num_drawn], written[-1], columns)
    if nearest is not None:
        written.append(output.with_name(f"{output.stem}-nearest.png"))
        record.draw_pairs(first, sources.from_dataset(train, "training images"), nearest, written[-1])
    if config.write_reference and held_out:
        photographs = sources.from_images(held_out, "held-out images").images(torch.arange(len(held_out)))
        written.append(Path(config.write_reference))
        write_adm(written[-1], reference.features, photographs, scorer.extractor)
    if config.latex:
        written.append(output.with_suffix(".tex"))
        write_whole(written[-1], record.table(rows, columns, form=lambda cells: latex(cells[:1], cells[1:])))
    print("written: " + ", ".join(map(str, written)))


def output_of(samples: str, checkpoint: "Checkpoint | None") -> Path:
    """Where the record goes by default: into the run that was drawn from, or beside a fixed set."""
    if checkpoint:
        return checkpoint.run / f"scores{checkpoint.mark}.json"
    path = Path(samples).resolve()
    return path.with_name(f"{path.name if path.is_dir() else path.stem}-scores.json")


def is_run(path: str) -> bool:
    """Whether samples are to be drawn from it: a run's folder, a checkpoint, or its weights."""
    folder = Path(path)
    holds = any((folder / name).exists() for name in ("checkpoints", "ema.safetensors"))
    return is_name(path) or holds or folder.suffix == ".safetensors"


OF_AUTOENCODERS = {"autoencoder", "perceptual", "heads", "extractor", "weights_path", "metrics", "num_samples", "seed"}
OF_AUTOENCODERS |= {"batch_size", "output", "imports", "data"}


def check(config: EvaluateConfig) -> None:
    defaults, samples = EvaluateConfig(), config.samples
    asked = [flag for flag in asdict(defaults) if getattr(config, flag) != getattr(defaults, flag)]

    def refuse(flags: Iterable[str], why: str) -> None:
        for flag in (flag for flag in asked if flag in flags):
            value = getattr(config, flag)
            raise ValueError(f"--{flag}{f' {value}' if isinstance(value, str | int | float) else ''}: {why}")

    if config.self_check:
        return
    if config.output and (Path(config.output).suffix != ".json" or Path(config.output).is_dir()):
        raise ValueError(f"--output {config.output}: give FILE.json; pictures and tables are written beside it")
    if samples is None and config.autoencoder is None:
        raise ValueError("--samples: give a run, a folder, a zip or an npz; or --autoencoder, or --self_check true")
    if samples is None:
        about_samples = {*asked}.difference(OF_AUTOENCODERS)
        refuse(about_samples, "it is about samples; give --samples, or leave it out to measure --autoencoder")
        return
    refuse(("perceptual", "heads"), "it measures an autoencoder; leave it out, or leave --samples out")
    if not Path(samples).exists() and not is_name(samples):
        raise ValueError(
            f"--samples {samples} does not exist; give a run's folder, a checkpoint, hf://owner/name, embedded, a "
            "folder or zip of images, or an npz"
        )
    if not is_run(samples):
        fixed = f"{samples} is a fixed set of images, there is nothing to draw"
        for name in set_values(config.sampling):
            raise ValueError(f"--sampling.{name}: {fixed}")
        refuse(("trials", "likelihood"), fixed)
    elif config.checkpoint is not None:
        held_against = f"it is for a fixed set of images, and {samples} is a run, held against its own held-out images"
        refuse(["checkpoint"], f"{held_against}; leave --checkpoint out")
    if config.reference:
        needing = ("baselines", "write_reference", "likelihood", "per_class")
        refuse(needing, "it needs the held-out images; leave --reference out")


if __name__ == "__main__":
    with one_line_errors():
        main(parse(EvaluateConfig))
