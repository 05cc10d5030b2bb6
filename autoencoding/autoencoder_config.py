"""The configuration of an autoencoder's training: frozen dataclasses, read from YAML and flags as train.py's are."""

from dataclasses import dataclass, field
from typing import Literal

from experiment.config import DataConfig, OptimConfig
from experiment.run_config import AnyLogConfig, AnyTrainConfig, RunConfig
from settings import within


@dataclass(frozen=True)
class ArchitectureConfig:
    """Shape of the AutoencoderKL, which reduces each side by 2 ** (len(channels) - 1): four levels are f8.

    Args:
        channels: width of each level, finest first
        latent_channels: channels of the latent
        layers_per_block: residual blocks a level
        norm_groups: groups of the group norms, which must divide each width
        attention: self-attention between the two middle blocks of encoder and decoder
    """

    channels: list[int] = within("[1, inf)", [128, 256, 512, 512])
    latent_channels: int = within("[1, inf)", 4)
    layers_per_block: int = within("[1, inf)", 2)
    norm_groups: int = within("[1, inf)", 32)
    attention: bool = True


@dataclass(frozen=True)
class LossConfig:
    """What the autoencoder minimises, beside what the discriminator asks of it: (error + perceptual) / exp(s) + s + KL.

    Args:
        error: of pixels in [-1, 1]: 'l1' or 'l2' (squared); the mean over an image
        learned_variance: learn s, the logarithm of the pixels' scale; false: s is 0
        kl_weight: of the KL divergence from a standard normal, the mean over an image's latent values
        perceptual: 'lpips' (Zhang et al. 2018), 'vgg19', a .pt2 or TorchScript file (images from 0 to 255 to features;
            a program: run only what you trust), or null: none
        perceptual_weight: of the squared distance of their features
        heads: of 'lpips': file of its weights v0.1 for VGG16; null downloads it
    """

    error: Literal["l1", "l2"] = "l1"
    learned_variance: bool = True
    kl_weight: float = within("[0, inf)", 1e-6)
    perceptual: str | None = "lpips"
    perceptual_weight: float = within("[0, inf)", 1.0)
    heads: str | None = None


@dataclass(frozen=True)
class DiscriminatorConfig:
    """A patch discriminator, which learns to tell reconstructions from images (Isola et al. 2017, Esser et al. 2021).

    Args:
        weight: of its opinion in the autoencoder's loss, times the adaptive one; 0: no discriminator
        start: optimizer step at which it starts to learn and to count
        loss: 'hinge' or 'bce' (Goodfellow et al. 2014, not saturating)
        max_adaptive: most that the adaptive weight, a ratio of gradients, may be (Esser et al. 2021, eq. 7)
        norm: between its convolutions: 'group' or 'spectral'
        channels: width of its first convolution
        num_layers: convolutions of stride two
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
        decay_epochs: of 'step': steps between two drops
        muon_lr: peak learning rate of Muon (Jordan et al. 2024) on matrices and convolutions; null: AdamW on all
    """

    grad_clip: float = within("[0, inf)", 1.0)
    muon_lr: float | None = within("(0, inf)", None)


@dataclass(frozen=True)
class AutoencoderTrainConfig(AnyTrainConfig):
    """Length, batch and numbers of the training.

    Args:
        num_workers: processes that read images, for each process that trains
    """

    num_steps: int = within("[1, inf)", 50_000)
    batch_size: int = within("[1, inf)", 16)
    ema_decay: float = within("[0, 1)", 0.999)
    num_workers: int = within("[0, inf)", 0)


@dataclass(frozen=True)
class AutoencoderLogConfig(AnyLogConfig):
    """What is written on the way, and how often (in optimizer steps; 0: never).

    Args:
        sample_every: reconstructions of held-out images by the averaged weights, and their PSNR
    """

    sample_every: int = within("[0, inf)", 1000)
    num_validation: int = within("[1, inf)", 512)


@dataclass(frozen=True)
class AutoencodingConfig(RunConfig):
    """Train an AutoencoderKL; write it in diffusers' folder format to runs/<name>/autoencoder.

    Args:
        name: of the run's folder, runs/<name>
        resume: a run's folder: go on from its newest whole checkpoint with its configuration, of which architecture
            and data stay; 'auto': so with the folder of this name, or else start
        init_from: an autoencoder to start from, in place of `architecture`: an embedded one, a folder, or a hub id
        decoder_only: leave the encoder of init_from as it was, so that caches and backbones on its latents stay valid
        half: write weights in float16, half the size
        shapes_share: share of procedural shapes, of all difficulties, in each batch of images
        data: images and how they are read; labels are not used
        architecture: shape of the autoencoder
        loss: what the autoencoder minimises
        discriminator: the network that tells reconstructions from images
        optim: optimizer and learning rate
        train: length, batch and numbers of the training
        log: what is written on the way, and how often
    """

    name: str = "autoencoder"
    resume: str | None = None
    init_from: str | None = None
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
