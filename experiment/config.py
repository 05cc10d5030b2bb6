"""The one configuration: frozen dataclasses, read from YAML and flags. Values that follow from others are never written
down. Nothing heavy is imported here, so that `--help` answers at once."""

from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from diffusion.options import SamplingOptions
from diffusion.presets import DIFFUSIONS
from experiment.mappings import flatten
from experiment.open_section import open_section
from machine.whole_files import inside
from metrics.scores import DEFAULT, HELP
from settings import SEEDS, unset, within


@dataclass(frozen=True)
class DataConfig:
    """Images and how they are read.

    Args:
        path: folder or zip with a class a folder (a train/ and test/ or val/ level is used where it exists), or with
            a labels.csv (file,label), or with neither; tar shards; or 'shapes' for the embedded procedural dataset
        image_size: side in pixels; images are cropped to the centre square and resized where needed
        test_fraction: share of each class held out, where the source has no train/ and test/ of its own
        split_seed: seed of that split
        group_near_duplicates: keep images that look alike (by a perceptual hash) on one side of that split
        classes: class folders to keep; none named: all of them
        exclude_classes: class folders to leave out
        use_labels: false trains an unconditional model on labelled folders
        min_size: leave out images with a side below so many pixels, and say how many
        on_error: what a damaged image does: 'stop' names it, 'skip' counts and reports
        flip: train on mirrored images too
        num_images: size of the training split of 'shapes'
        difficulty: of 'shapes': 'easy', 'medium' or 'hard'
        cache: folder for encoded datasets; each gets a folder of its own, built on first use
    """

    path: str = "shapes"
    image_size: int = within("[1, 16384]", 64)
    test_fraction: float = within("(0, 1)", 0.2)
    split_seed: int = within(SEEDS, 0)
    group_near_duplicates: bool = False
    classes: list[str] = field(default_factory=list)
    exclude_classes: list[str] = field(default_factory=list)
    use_labels: bool = True
    min_size: int = within("[0, inf)", 0)
    on_error: Literal["stop", "skip"] = "stop"
    flip: bool = True
    num_images: int = within("[10, inf)", 5000)
    difficulty: Literal["easy", "medium", "hard"] = "easy"
    cache: str = "cache"


@unset
class DataFlags(DataConfig):
    """What a command says of images in place of a checkpoint's, or of the defaults."""


@dataclass(frozen=True)
class DiffusionConfig:
    """The diffusion and its objective: settings of all kinds. What is null is the kind's own default."""

    kind: str = "gaussian"

    if TYPE_CHECKING:

        def __init__(self, kind: str = "gaussian", **settings: Any) -> None: ...
        def __getattr__(self, name: str) -> Any: ...


import_module("studies.cascade")  # of this repository, but no part of the core: it registers itself
open_section(DiffusionConfig, DIFFUSIONS)


@dataclass(frozen=True)
class AuxiliaryConfig:
    """A further term of the loss, of the data that the backbone predicts, times alpha-bar.

    Args:
        kind: 'perceptual' (distance in a frozen network's features; in pixel space) or 'feature_matching' (in the
            backbone's own features: of a U-Net's encoder, of others a quarter and half of the way through)
        weight: of the term
        network: of 'perceptual': 'vgg19' (its fourth convolution), 'lpips' (Zhang et al. 2018, on VGG16), or a .pt2 or
            TorchScript file: images from 0 to 255 to features (a program: run only what you trust)
        heads: of 'lpips': file of its weights v0.1 for VGG16; null downloads it
    """

    kind: str
    weight: float = within("(0, inf)")
    network: str = "vgg19"
    heads: str | None = None


@dataclass(frozen=True)
class AlignmentConfig:
    """Hidden states of the backbone that learn to resemble a frozen network's features of the clean image: REPA (Yu et
    al. 2025), or iREPA (Singh et al. 2025). Those are computed once, into a cache beside the latents'; samplers, scores
    and the averaged weights know nothing of it.

    Args:
        extractor: the network: timm:NAME, or a .pt2 or TorchScript file (images from 0 to 255 to [n d h w]; a program:
            run only what you trust); null: no alignment
        weights_path: of timm:NAME: a file of weights; null: timm's own
        depth: share of the backbone's blocks after which it looks at the hidden states
        weight: of the term, 1 minus the mean cosine similarity
        kind: 'irepa' (a convolution; features normalised over their places) or 'repa' (a perceptron of three layers)
    """

    extractor: str | None = None
    weights_path: str | None = None
    depth: float = within("(0, 1]", 0.4)
    weight: float = within("(0, inf)", 0.5)
    kind: Literal["irepa", "repa"] = "irepa"


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, or Muon with AdamW.

    Args:
        lr: learning rate, reached linearly over warmup_steps
        muon_lr: learning rate of Muon (Jordan et al. 2024) on the matrices of the backbone's blocks; null: AdamW alone
        warmup_steps: optimizer steps until then
        decay: after the warm-up 'constant', 'cosine' to zero, 'linear' to zero over the last decay_share of the steps
            (WSD, Hu et al. 2024; a constant run that is resumed with it needs no length in advance: Hägele et al.
            2024), or 'step', by decay_factor every decay_epochs; each phase of a training has its own
        decay_share: of 'linear'
        decay_epochs: of 'step'
        decay_factor: of 'step'
        betas: decay rates of the moments
        weight_decay: decoupled weight decay, of weights that multiply features: not of norms, biases, embeddings
        grad_clip: largest norm of the gradient; 0 turns clipping off
    """

    lr: float = within("(0, inf)", 1e-4)
    muon_lr: float | None = within("(0, inf)", None)
    warmup_steps: int = within("[0, inf)", 0)
    decay: Literal["constant", "cosine", "linear", "step"] = "constant"
    decay_share: float = within("(0, 1]", 0.2)
    decay_epochs: float = within("(0, inf)", 15.0)
    decay_factor: float = within("(0, 1]", 0.5)
    betas: tuple[float, float] = within("[0, 1)", (0.9, 0.999))
    weight_decay: float = within("[0, inf)", 0.0)
    grad_clip: float = within("[0, inf)", 0.0)


@dataclass(frozen=True)
class AnyTrainConfig:
    """Length, batch and numbers of a training.

    Args:
        num_steps: optimizer steps
        max_hours: save and stop after this time, with exit status 75, as after SIGTERM, SIGUSR1 or Ctrl-C
        batch_size: images an optimizer step, over all processes and micro-batches
        ema_decay: decay of the averaged weights, which is min(ema_decay, (1 + step) / (10 + step))
        precision: 'fp32', 'bf16' (autocast), or 'auto': bf16 where the device has instructions for it, else fp32
        seed: of weights and all that is random
    """

    num_steps: int | None = within("[1, inf)", None)
    max_hours: float | None = within("(0, inf)", None)
    batch_size: int = within("[1, inf)", 128)
    ema_decay: float = within("[0, 1)", 0.9999)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = within(SEEDS, 0)


@dataclass(frozen=True)
class TrainConfig(AnyTrainConfig):
    """Length, batch and numbers of the training.

    Args:
        num_epochs: passes over the training split; 100 where num_steps does not say how long either
        num_steps: optimizer steps, in place of num_epochs
        grad_accumulation: micro-batches a step
        label_dropout: share of labels replaced by the null label, for classifier-free guidance
        class_balanced: show every class equally often, whatever its number of images; an epoch is as many images still
        augment: probability that an image in pixel space is turned over, moved, resized, turned, stretched, each of
            which the backbone is told, so that samples are not (Karras et al. 2022: 0.12); 0: never
        ema_profiles: lengths of power-function averages to keep, such as [0.05, 0.1]; see scripts/reconstruct_ema.py
        recompute: compute what lies within the backbone's blocks again in the backward pass, in place of keeping it:
            less memory, a third more arithmetic, the same gradients
        compile: compile the backbone's blocks (torch.compile); see docs/performance.md for what it gives and costs
        adapter: leave the weights of init_from as they are but for labels and 'biases', norms and scales; or train with
            'lora' (Hu et al. 2021) these and two thin matrices for each linear of the blocks
        adapter_rank: of 'lora': the width of these matrices
    """

    num_epochs: int | None = within("[1, inf)", None)
    grad_accumulation: int = within("[1, inf)", 1)
    label_dropout: float = within("[0, 1]", 0.1)
    class_balanced: bool = False
    augment: float = within("[0, 1]", 0.0)
    ema_profiles: list[float] = within("(0, 0.28)", [])
    recompute: bool = False
    compile: bool = False
    adapter: Literal["lora", "biases"] | None = None
    adapter_rank: int = within("[1, inf)", 4)

    def check(self, prefix: str) -> None:
        if None not in (self.num_epochs, self.num_steps):
            both = f"{prefix}num_epochs {self.num_epochs} beside {prefix}num_steps {self.num_steps}"
            raise ValueError(f"{both}: one of them says how long; leave the other out, or null where a file has it")


@dataclass(frozen=True)
class SamplingConfig(SamplingOptions):
    """How samples are drawn, by sample.py, evaluate.py and the grids during training.

    Args:
        guidance_checkpoint: a smaller or less trained run to be guided away from (autoguidance, Karras et al. 2024)
        guidance_unlabelled: ask it without a label: away from the run that a fine-tuning came from, of whatever classes
            (Domain Guidance, Zhong et al. 2025)
    """

    guidance_checkpoint: str | None = None
    guidance_unlabelled: bool = False


@unset
class SamplingFlags(SamplingConfig):
    """What a command says of sampling in place of the checkpoint."""


@dataclass(frozen=True)
class EvaluationConfig:
    """How samples are scored, by evaluate.py and during training alike.

    Args:
        extractor: 'inception', 'dinov2-*', 'clip-*', 'vgg16', 'timm:NAME' (any of timm's models), or a file, .pt2
            (torch.export) rather than TorchScript: uint8 images to features and class probabilities. A file is a
            program: run only what you trust
        weights_path: weights of a named extractor, where they cannot be downloaded
        metrics: {metrics}
        num_samples: images to draw; by default as many as there are held-out images
        labels: of the drawn samples: 'balanced' (classes in turn), 'reference' (the held-out images' own) or 'random'
        seed: of the drawn samples
        batch_size: images at a time, on each process
    """

    extractor: str = "inception"
    weights_path: str | None = None
    metrics: list[str] = field(default_factory=lambda: list(DEFAULT))
    num_samples: int | None = within("[1, inf)", None)
    labels: Literal["balanced", "reference", "random"] = "balanced"
    seed: int = within(SEEDS, 0)
    batch_size: int = within("[1, inf)", 64)


EvaluationConfig.__doc__ = str(EvaluationConfig.__doc__).format(metrics=HELP)


@dataclass(frozen=True)
class AnyLogConfig:
    """What is written on the way, and how often (in optimizer steps, or as named; 0: never).

    Args:
        every: losses and speed, to log.jsonl and the trackers
        sample_every: a grid of samples
        num_validation: at most so many held-out images are used for validation
        checkpoint_minutes: a checkpoint, so long after the last one; the last step always writes one
        checkpoint_every: a checkpoint at these steps too
        keep_checkpoints: the newest so many whole ones stay; each is read back at a save
        trackers: 'tensorboard', 'wandb' (offline with WANDB_MODE=offline)
    """

    every: int = within("[0, inf)", 20)
    sample_every: int = within("[0, inf)", 2000)
    num_validation: int = within("[1, inf)", 1024)
    checkpoint_minutes: float = within("[0, inf)", 15.0)
    checkpoint_every: int = within("[0, inf)", 0)
    keep_checkpoints: int = within("[1, inf)", 2)
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])


@dataclass(frozen=True)
class LogConfig(AnyLogConfig):
    """What is written on the way, and how often (in optimizer steps; 0: never).

    Args:
        validate_every: loss of the averaged weights on the held-out split
        evaluate_every: scores of the averaged weights' samples, as `evaluation` says
        keep_every: a checkpoint that stays
        best: whose best checkpoint stays too, as checkpoints/best: 'validation_loss', or a score such as 'fid'
    """

    validate_every: int = within("[0, inf)", 1000)
    evaluate_every: int = within("[0, inf)", 0)
    keep_every: int = within("[0, inf)", 0)
    best: str | None = None


class RunConfig:
    """A training that is written to a folder of its own, from which it may be resumed: a frozen dataclass."""

    name: str | None
    resume: str | None
    init_from: str | None
    if TYPE_CHECKING:  # of each training its own
        train: Any
        log: Any
    fixed = tuple[str, ...]()  # settings and groups of them that say what the weights mean

    @property
    def folder(self) -> Path:
        """Where the run is written, below `runs`."""
        return Path(self.resume) if self.resume else inside(Path("runs"), str(self.name), "--name")

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)  # pyright: ignore[reportArgumentType]
        values["optim"]["betas"] = list(values["optim"]["betas"])
        return values

    def identity(self) -> dict[str, Any]:
        """By flag, what a run keeps when it is resumed; where images lie, and the like, is checked by their content."""
        flags = flatten(self.to_dict())
        passing = {"data.path", "data.cache", "data.on_error"}
        kept = [flag for flag in flags if {flag, flag.partition(".")[0]} & {*self.fixed} and flag not in passing]
        fixed = {flag: flags[flag] for flag in kept}
        return fixed | {"optim.muon_lr": "null" if flags["optim.muon_lr"] is None else "set"}


R = TypeVar("R", bound=RunConfig)


def resuming(config: R, run: Path | None) -> R:
    """The same, to go on from this run, or afresh."""
    return replace(config, resume=run and str(run))  # pyright: ignore[reportArgumentType, reportReturnType]


@dataclass(frozen=True)
class ExperimentConfig(RunConfig):
    """Train a diffusion backbone on the latents of a frozen autoencoder.

    Args:
        model: backbone: XSwin, USwin, DiT-S/2, UViT-S/2, ... (an unknown name lists them all)
        model_args: constructor arguments of the backbone that differ from its row in the table
        autoencoder: 'embedded', 'embedded-f8c16', 'embedded-taef2', 'pixel', a folder in diffusers' format, or a hub id
        imports: Python modules, by name or as .py files, that add backbones, samplers, ... (docs/extending.md)
        name: of the run's folder, runs/<name>; by default the model's name
        resume: a run's folder: go on from its newest whole checkpoint with its configuration, of which model,
            autoencoder, diffusion and data stay; 'auto': so with the folder of this name, or else start
        init_from: a run or checkpoint (or hf://owner/name) whose averaged weights a fresh run starts from
        data: images and how they are read
        diffusion: the diffusion and its objective
        auxiliary: further terms of the loss, a list such as '[{kind: perceptual, weight: 0.1}]'
        alignment: representation alignment, a term of the loss that makes training shorter
        optim: optimizer and learning rate
        train: length, batch and numbers of the training
        sampling: how samples are drawn
        evaluation: how samples are scored
        log: what is written on the way, and how often
    """

    model: str = "XSwin"
    model_args: dict[str, Any] = field(default_factory=dict)
    autoencoder: str = "embedded"
    imports: list[str] = field(default_factory=list)
    name: str | None = None
    resume: str | None = None
    init_from: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    auxiliary: list[AuxiliaryConfig] = field(default_factory=list)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(guidance_scale=1.5))
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    log: LogConfig = field(default_factory=LogConfig)
    fixed = ("model", "model_args", "data", "alignment.depth", "alignment.kind")
    fixed += ("train.adapter", "train.adapter_rank", "train.ema_profiles")

    def check(self, prefix: str) -> None:
        if self.train.adapter and self.init_from is None:
            asked = f"{prefix}train.adapter {self.train.adapter}"
            raise ValueError(f"{asked}: the weights that it leaves as they are would be random; give {prefix}init_from")
        if self.train.label_dropout == 1 and self.data.use_labels:
            remedy = f"give less, or {prefix}data.use_labels false"
            raise ValueError(f"{prefix}train.label_dropout 1: no class would ever be trained; {remedy}")

    @property
    def folder(self) -> Path:
        return super().folder if self.resume or self.name else Path("runs") / self.model.replace("/", "-")

    def to_dict(self) -> dict[str, Any]:
        """Of the diffusion what it was told, without the settings of other kinds."""
        diffusion = {name: value for name, value in asdict(self.diffusion).items() if value is not None}
        return super().to_dict() | {"diffusion": diffusion}

    def identity(self) -> dict[str, Any]:
        """With the diffusion's settings in full: what is null is their default."""
        from experiment.build import diffusion_settings

        diffusion = {"kind": self.diffusion.kind, **diffusion_settings(self.diffusion)}
        values = {f"diffusion.{name}": value for name, value in diffusion.items()}
        values |= {f"train.{name}": "set" if getattr(self.train, name) else 0 for name in ("label_dropout", "augment")}
        values["alignment.extractor"] = "null" if self.alignment.extractor is None else "set"  # its content is compared
        return super().identity() | values

    def guided_classes(self, num_classes: int) -> int:
        """Of so many classes those that can be guided away from the null label: none where it was never trained."""
        return num_classes if self.train.label_dropout > 0 else 0
