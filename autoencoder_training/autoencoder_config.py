"""Configuration of an autoencoder's training: frozen dataclasses, read from YAML and flags like those of train.py."""

from dataclasses import dataclass, field
from typing import Literal

from experiment.config import DataConfig, OptimConfig
from experiment.run_config import BaseLogConfig, BaseTrainConfig, RunConfig
from settings import reads, within


@dataclass(frozen=True)
class ArchitectureConfig:
    """Architecture of the AutoencoderKL. Each side is reduced by 2 ** (len(channels) - 1): four levels make an f8.

    Args:
        channels: width of each level, finest first
        latent_channels: channels of the latents
        layers_per_block: residual blocks per level
        norm_groups: groups of the group norms; must divide each width
        attention: self-attention between the two middle blocks of encoder and decoder
    """

    channels: list[int] = within("[1, inf)", [128, 256, 512, 512])
    latent_channels: int = within("[1, inf)", 4)
    layers_per_block: int = within("[1, inf)", 2)
    norm_groups: int = within("[1, inf)", 32)
    attention: bool = True


@dataclass(frozen=True)
class LossConfig:
    """Loss of the autoencoder without the adversarial term: (error + perceptual) / exp(s) + s + KL.

    Args:
        error: pixel error, averaged over an image in [-1, 1]: 'l1' or 'l2' (squared)
        learned_variance: learn s, the log-scale of the pixel error; false: s is 0
        kl_weight: weight of the KL divergence from a standard normal, averaged over an image's latent values
        perceptual: network of the perceptual distance: 'lpips' (Zhang et al. 2018), 'vgg19', or a .pt2 or TorchScript
            file that maps images in 0..255 to features (it is a program: run only what you trust); null: no such term
        perceptual_weight: weight of the squared distance of the features
        heads: for 'lpips': file with its v0.1 weights for VGG16; null downloads it
    """

    error: Literal["l1", "l2"] = "l1"
    learned_variance: bool = True
    kl_weight: float = within("[0, inf)", 1e-6)
    perceptual: str | None = reads("name or file", "lpips")
    perceptual_weight: float = within("[0, inf)", 1.0)
    heads: str | None = reads("file", None)


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Patch discriminator, which learns to tell reconstructions from images (Isola et al. 2017, Esser et al. 2021).

    Args:
        weight: weight of the adversarial term, which the adaptive weight multiplies; 0: no discriminator
        start: optimizer step from which the discriminator is trained and the adversarial term counts
        loss: 'hinge' or 'bce' (the non-saturating loss of Goodfellow et al. 2014)
        max_adaptive: upper limit of the adaptive weight, a ratio of gradient norms (Esser et al. 2021, eq. 7)
        norm: normalisation of its convolutions: 'group' or 'spectral'
        channels: width of its first convolution
        num_layers: number of convolutions of stride two
        lr: learning rate; warm-up and decay are the autoencoder's
        grad_clip: largest norm of its gradient; 0 turns clipping off
    """

    weight: float = within("[0, inf)", 0.5)
    start: int = within("[0, inf)", 5000)
    loss: Literal["hinge", "bce"] = "hinge"
    max_adaptive: float = within("(0, inf]", 1e4)
    norm: Literal["group", "spectral"] = "group"
    channels: int = within("[1, inf)", 64)
    num_layers: int = within("[1, inf)", 3)
    lr: float = within("(0, inf)", 1e-4)
    grad_clip: float = within("[0, inf)", 1.0)


@dataclass(frozen=True)
class AutoencoderOptimConfig(OptimConfig):
    """Optimizer of the autoencoder.

    Args:
        decay_epochs: for 'step': optimizer steps between two drops
        muon_lr: peak learning rate of Muon (Jordan et al. 2024) for matrices and convolutions; null: AdamW for all
    """

    grad_clip: float = within("[0, inf)", 1.0)
    muon_lr: float | None = within("(0, inf)", None)


@dataclass(frozen=True)
class AutoencoderTrainConfig(BaseTrainConfig):
    """Length, batch size and numerics of the training.

    Args:
        num_workers: processes that load images, per training process
    """

    num_steps: int = within("[1, inf)", 50_000)
    batch_size: int = within("[1, inf)", 16)
    ema_decay: float = within("[0, 1)", 0.999)
    num_workers: int = within("[0, inf)", 0)


@dataclass(frozen=True)
class AutoencoderLogConfig(BaseLogConfig):
    """Outputs during the training, and how often they are written (in optimizer steps; 0: never).

    Args:
        sample_every: reconstruct held-out images with the EMA weights, and compute their PSNR
    """

    sample_every: int = within("[0, inf)", 1000)
    num_validation: int = within("[1, inf)", 512)


@dataclass(frozen=True)
class AutoencodingConfig(RunConfig):
    """Train an AutoencoderKL, and write it in diffusers' folder format to runs/<name>/autoencoder.

    Args:
        name: name of the run's folder, runs/<name>
        resume: folder of a run to resume from its newest complete checkpoint, with its configuration; architecture and
            data cannot be changed. 'auto': resume from the folder of this name if it exists, otherwise start
        init_from: autoencoder to start from, in place of `architecture`: an embedded one, a folder, or a hub id
        decoder_only: freeze the encoder of init_from, so that caches and backbones on its latents stay valid
        half: write the weights in float16, at half the size
        shapes_share: fraction of each batch that is procedural shapes, of all difficulties
        data: images and how they are read; labels are not used
        architecture: architecture of the autoencoder
        loss: loss of the autoencoder
        discriminator: network that learns to tell reconstructions from images
        optim: optimizer and learning rate
        train: length, batch size and numerics of the training
        log: outputs during the training, and how often they are written
    """

    name: str = "autoencoder"
    resume: str | None = None
    init_from: str | None = reads("autoencoder", None)
    decoder_only: bool = False
    half: bool = False
    shapes_share: float = within("[0, 1]", 0.0)
    data: DataConfig = field(default_factory=DataConfig)
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    optim: AutoencoderOptimConfig = field(default_factory=AutoencoderOptimConfig)
    train: AutoencoderTrainConfig = field(default_factory=AutoencoderTrainConfig)
    log: AutoencoderLogConfig = field(default_factory=AutoencoderLogConfig)
    fixed = ("architecture", "decoder_only", "loss.learned_variance", "shapes_share", "data")
