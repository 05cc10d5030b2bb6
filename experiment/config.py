"""The configuration of a training run: frozen dataclasses, filled from YAML and flags. It holds no derived values and
imports nothing heavy, so that `--help` is instant."""

from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffusion.options import SamplingOptions
from diffusion.presets import DIFFUSIONS
from experiment.open_section import open_section
from experiment.run_config import BaseLogConfig, BaseTrainConfig, RunConfig
from metrics.scores import DEFAULT, HELP
from settings import SEEDS, reads, unset, within

DEFAULT_EPOCHS = 100  # if neither a number of epochs nor of steps is given


@dataclass(frozen=True)
class DataConfig:
    """Images and how they are read.

    Args:
        path: folder or zip of images: one subfolder per class (below train/ and test/ or val/, if they exist), or a
            labels.csv (file,label), or no labels; or tar or parquet shards; or 'hf://owner/name', parquet shards on the
            hub; or 'shapes', the built-in procedural dataset
        label_column: for parquet shards: the column with the classes; by default 'label', or the only one with named
            classes
        image_size: side in pixels; images are cropped to their central square and resized if necessary
        test_fraction: fraction of each class to hold out, if the source has no test split of its own
        split_seed: seed of that split
        train_fraction: fraction of each class's training images to train on; smaller fractions are subsets of larger
            ones, and the held-out images stay the same
        group_near_duplicates: keep near-duplicates (by perceptual hash) on the same side of that split
        classes: classes to use; all by default
        exclude_classes: classes to leave out
        use_labels: set to false to ignore labels and train unconditionally
        min_size: leave out images with a side shorter than this, in pixels, and report how many
        on_error: at a damaged image, 'stop' with its name, or 'skip' it and report how many
        flip: also train on horizontally flipped images
        num_images: for 'shapes': size of the training split
        difficulty: for 'shapes': 'easy', 'medium' or 'hard'
        cache: folder for encoded datasets, each in a subfolder that is built on first use
    """

    path: str = reads("images", "shapes")
    label_column: str | None = None
    image_size: int = within("[1, 16384]", 64)
    test_fraction: float = within("(0, 1)", 0.2)
    split_seed: int = within(SEEDS, 0)
    train_fraction: float = within("(0, 1]", 1.0)
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
    """Data settings given to a command, which override the checkpoint's or the defaults."""


@dataclass(frozen=True)
class DiffusionConfig:
    """The diffusion and its objective: the settings of all kinds; null means the kind's default."""

    kind: str = "gaussian"

    if TYPE_CHECKING:

        def __init__(self, kind: str = "gaussian", **settings: Any) -> None: ...
        def __getattr__(self, name: str) -> Any: ...


import_module("studies")  # which register themselves
open_section(DiffusionConfig, DIFFUSIONS)


@dataclass(frozen=True)
class AuxiliaryConfig:
    """An additional loss term, computed on the predicted x_0 and weighted by alpha-bar.

    Args:
        kind: 'perceptual' (distance between a frozen network's features; for pixel space) or 'feature_matching'
            (between the backbone's own: a U-Net's encoder, otherwise after a quarter and a half of the blocks)
        weight: weight of the term
        network: for 'perceptual': 'vgg19' (its fourth convolution), 'lpips' (Zhang et al. 2018, on VGG16), or a .pt2 or
            TorchScript file that maps images in 0..255 to features (it is a program: run only what you trust)
        heads: for 'lpips': file with its v0.1 weights for VGG16; null downloads it
    """

    kind: str
    weight: float = within("(0, inf)")
    network: str = reads("name or file", "vgg19")
    heads: str | None = reads("file", None)


@dataclass(frozen=True)
class AlignmentConfig:
    """Alignment of the backbone's hidden states with a frozen network's features of the clean image: REPA (Yu et al.
    2025) or iREPA (Singh et al. 2025). The features are computed once and cached next to the latents; sampling, scores
    and EMA do not use them.

    Args:
        extractor: the frozen network: timm:NAME, or a .pt2 or TorchScript file that maps images in 0..255 to
            [n d h w] (it is a program: run only what you trust); null turns alignment off
        weights_path: for timm:NAME: a file of weights; null uses timm's own
        depth: fraction of the backbone's blocks after which its hidden states are aligned
        weight: weight of the term, which is 1 minus the mean cosine similarity
        kind: 'irepa' (convolutional projector, spatially normalised features) or 'repa' (three-layer MLP projector)
    """

    extractor: str | None = reads("name or file", None)
    weights_path: str | None = reads("file", None)
    depth: float = within("(0, 1]", 0.4)
    weight: float = within("(0, inf)", 0.5)
    kind: Literal["irepa", "repa"] = "irepa"


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, or Muon with AdamW.

    Args:
        lr: learning rate after the warm-up
        muon_lr: learning rate of Muon (Jordan et al. 2024) on the matrices of the backbone's blocks; null: AdamW only
        warmup_steps: optimizer steps of linear warm-up
        decay: schedule after the warm-up: 'constant'; 'cosine' to zero; 'linear' to zero over the last decay_share of
            the steps (WSD, Hu et al. 2024; a constant run may be resumed with it at any time: Hägele et al. 2024); or
            'step', by decay_factor every decay_epochs. Each training phase has its own schedule
        decay_share: for 'linear': fraction of the steps
        decay_epochs: for 'step'
        decay_factor: for 'step'
        betas: decay rates of Adam's moments
        weight_decay: decoupled weight decay; norms, biases and embeddings are exempt
        grad_clip: maximum gradient norm; 0 disables clipping
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
class TrainConfig(BaseTrainConfig):
    """Length, batch size and precision of training.

    Args:
        num_epochs: passes over the training split; 100 if num_steps is not given either
        num_steps: optimizer steps, instead of num_epochs
        grad_accumulation: micro-batches per optimizer step
        label_dropout: probability that a label is replaced by the null label, for classifier-free guidance
        class_balanced: sample all classes equally often, whatever their sizes; the length of an epoch stays the same
        augment: probability of each of EDM's augmentations in pixel space (flips, translation, scaling, rotation,
            stretching), on which the backbone is conditioned so that samples show none (Karras et al. 2022: 0.12)
        ema_profiles: lengths of power-function EMAs to keep, such as [0.05, 0.1]; see scripts/reconstruct_ema.py
        recompute: activation checkpointing of the backbone's blocks: less memory, a third more arithmetic, the same
            gradients
        compile: torch.compile the backbone's blocks; for gain and cost see docs/performance.md
        adapter: fine-tune init_from with most of its weights frozen: 'biases' trains label embeddings, biases, norms
            and scales; 'lora' (Hu et al. 2021) trains these and low-rank matrices for the linear layers of the blocks
        adapter_rank: rank of 'lora'
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
            both = f"{prefix}num_epochs {self.num_epochs} and {prefix}num_steps {self.num_steps}"
            raise ValueError(f"{both}: give only one of them, and null for the other if it is set in a file")


@dataclass(frozen=True)
class SamplingConfig(SamplingOptions):
    """How samples are generated, by sample.py, evaluate.py and for the grids during training.

    Args:
        guidance_checkpoint: a smaller or less trained run to guide away from (autoguidance, Karras et al. 2024)
        guidance_unlabelled: call that run with the null label, to guide away from the model that fine-tuning started
            from, whatever its classes (Domain Guidance, Zhong et al. 2025)
    """

    guidance_checkpoint: str | None = reads("checkpoint", None)
    guidance_unlabelled: bool = False


@unset
class SamplingFlags(SamplingConfig):
    """Sampling settings given to a command, which override the checkpoint's."""


@dataclass(frozen=True)
class EvaluationConfig:
    """How samples are scored, by evaluate.py and during training.

    Args:
        extractor: 'inception', 'dinov2-*', 'clip-*', 'vgg16', 'timm:NAME' (any timm model), or a .pt2 (torch.export) or
            TorchScript file that maps uint8 images to features and class probabilities. A file is a program: run only
            what you trust
        weights_path: weights of a named extractor, if they cannot be downloaded
        metrics: {metrics}
        num_samples: images to generate; by default as many as there are held-out images
        labels: labels of the samples: 'balanced' (classes in turn), 'reference' (those of the held-out images) or
            'random'
        seed: seed of the samples
        batch_size: images per batch and process
    """

    extractor: str = reads("name or file", "inception")
    weights_path: str | None = reads("file", None)
    metrics: list[str] = field(default_factory=lambda: list(DEFAULT))
    num_samples: int | None = within("[1, inf)", None)
    labels: Literal["balanced", "reference", "random"] = "balanced"
    seed: int = within(SEEDS, 0)
    batch_size: int = within("[1, inf)", 64)


EvaluationConfig.__doc__ = str(EvaluationConfig.__doc__).format(metrics=HELP)


@dataclass(frozen=True)
class LogConfig(BaseLogConfig):
    """What is logged and saved during training, and how often (in optimizer steps; 0: never).

    Args:
        validate_every: loss of the EMA weights on the held-out split
        evaluate_every: scores of samples from the EMA weights, with the settings of `evaluation`
        best: metric whose best checkpoint is kept as checkpoints/best: 'validation_loss', or a score such as 'fid'
    """

    validate_every: int = within("[0, inf)", 1000)
    evaluate_every: int = within("[0, inf)", 0)
    best: str | None = None


@dataclass(frozen=True)
class ExperimentConfig(RunConfig):
    """Train a diffusion backbone on the latents of a frozen autoencoder.

    Args:
        model: the backbone: XSwin, USwin, DiT-S/2, UViT-S/2 (DiT with long skips), U-ViT-S/2 (as published), ... (an
            unknown name lists all)
        model_args: constructor arguments of the backbone, overriding those of the named model
        autoencoder: 'embedded', 'embedded-f8c16', 'embedded-taef2', 'pixel', a folder in diffusers' format, or a hub id
        imports: Python modules, by name or as .py files, that add backbones, samplers, ... (docs/extending.md)
        name: the run's folder is runs/<name>; by default the model's name
        resume: a run's folder, to continue from its newest intact checkpoint and configuration (model, autoencoder,
            diffusion and data cannot change); or 'auto', to continue this run if it exists and start it otherwise
        init_from: a run or checkpoint (or hf://owner/name) whose EMA weights initialise a new run
        data: images and how they are read
        diffusion: the diffusion and its objective
        auxiliary: additional loss terms, as a list such as '[{kind: perceptual, weight: 0.1}]'
        alignment: representation alignment (REPA), a loss term that speeds up training
        optim: optimizer and learning rate
        train: length, batch size and precision
        sampling: how samples are generated
        evaluation: how samples are scored
        log: what is logged and saved, and how often
    """

    model: str = "XSwin"
    model_args: dict[str, Any] = field(default_factory=dict)
    autoencoder: str = reads("autoencoder", "embedded")
    imports: list[str] = field(default_factory=list)
    name: str | None = None
    resume: str | None = None
    init_from: str | None = reads("checkpoint", None)
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
    def unread(self) -> set[str]:
        return super().unread | (set() if self.log.evaluate_every else {"evaluation"})

    @property
    def folder(self) -> Path:
        return super().folder if self.resume or self.name else Path("runs") / self.model.replace("/", "-")

    def to_dict(self) -> dict[str, Any]:
        """As nested dictionaries, without the settings of other kinds of diffusion."""
        diffusion = {name: value for name, value in asdict(self.diffusion).items() if value is not None}
        return super().to_dict() | {"diffusion": diffusion}

    def identity(self) -> dict[str, Any]:
        """With all settings of the diffusion, defaults filled in."""
        from experiment.build import diffusion_settings

        diffusion = {"kind": self.diffusion.kind, **diffusion_settings(self.diffusion)}
        values = {f"diffusion.{name}": value for name, value in diffusion.items()}
        values |= {f"train.{name}": "set" if getattr(self.train, name) else 0 for name in ("label_dropout", "augment")}
        values["alignment.extractor"] = "null" if self.alignment.extractor is None else "set"  # its content is compared
        return super().identity() | values

    def guided_classes(self, num_classes: int) -> int:
        """Number of classes for classifier-free guidance: 0 if the null label is never trained."""
        return num_classes if self.train.label_dropout > 0 else 0
