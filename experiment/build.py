"""Configuration to objects, once: the only place where one floor's objects meet another's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from data import open_dataset
from data.latents import LatentCache, build_cache, cache_name
from diffusion import PROCESSES, Guidance, Process
from diffusion.samplers import samplers_of
from experiment.config import DataConfig, DiffusionConfig, ExperimentConfig, OptimConfig, SamplingConfig, TrainConfig
from experiment.machine import from_main
from experiment.muon import Muon, split_for_muon
from experiment.settings import check_settings
from models import BACKBONES, create_model
from models.autoencoder import Codec


@dataclass(frozen=True)
class ModelSpec:
    """What it takes to build a backbone again: the configuration's part, and what followed from the data."""

    name: str
    args: dict
    input_size: tuple[int, int]
    in_channels: int
    out_channels: int
    num_classes: int

    def build(self) -> nn.Module:
        """The backbone with fresh weights.

        Raises:
            ValueError: when name or arguments do not fit; nothing is allocated before that is known.
        """
        self.build_on_meta()
        return self._create()

    def build_on_meta(self) -> nn.Module:
        """The backbone without memory for its weights: validates the arguments, counts parameters."""
        with torch.device("meta"):
            return self._create()

    def _create(self) -> nn.Module:
        return create_model(
            self.name,
            input_size=self.input_size,
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            num_classes=self.num_classes,
            **self.args,
        )


def share_batch_norms(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """With several processes, batch norms see the whole batch where torch can do that (GPUs); on CPUs it says once that
    each sees its own share."""
    has_batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    if accelerator.num_processes == 1 or not has_batch_norm:
        return model
    if accelerator.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    accelerator.print(
        "Batch norms see each process's own share of a batch on CPUs: results depend on the number of processes. "
        "XSwin with --model_args.conv_norm group does not."
    )
    return model


def compile_blocks(model: nn.Module) -> None:
    """Compile the backbone's repeated blocks in place, one by one: those of one width, grid and shift share their code.

    It takes seconds where compiling the whole takes minutes. A backbone that names no such blocks stays as it is.
    """
    torch._dynamo.config.recompile_limit = 64
    for module in model.modules():
        if type(module).__name__ in getattr(model, "_no_split_modules", ()):
            module.compile(dynamic=False)  # symbolic widths and grids take minutes to reason about


def build_process(config: DiffusionConfig) -> Process:
    """The diffusion process of a configuration.

    Raises:
        ValueError: for an unknown kind, a setting of another kind, or one that does not fit.
    """
    settings = process_settings(config)
    return PROCESSES[config.kind](**settings)


def process_settings(config: DiffusionConfig) -> dict[str, Any]:
    """All that a process of this kind can be told: what was given, and its defaults.

    Raises:
        ValueError: for an unknown kind, or a setting of another kind.
    """
    if config.kind not in PROCESSES:
        raise ValueError(f"--diffusion.kind {config.kind}: unknown, choose from {', '.join(PROCESSES)}")
    settings = {kind: signature(process).parameters for kind, process in PROCESSES.items()}
    own = {name: parameter.default for name, parameter in settings[config.kind].items()}
    given = {name: value for name, value in asdict(config).items() if name != "kind" and value is not None}
    for name in given.keys() - own.keys():
        owners = " and ".join(kind for kind, names in settings.items() if name in names)
        raise ValueError(f"--diffusion.{name} belongs to kind {owners}, not to {config.kind}; leave it out or null")
    return own | given


def model_spec(config: ExperimentConfig, codec: Codec, process: Process, num_classes: int) -> ModelSpec:
    """The backbone that fits codec, process and data.

    Raises:
        ValueError: for one that does not have the parts which the process trains.
    """
    fitting = [name for name, (backbone, _) in BACKBONES.items() if process.model_args.keys() <= parameters(backbone)]
    if config.model in BACKBONES and config.model not in fitting:
        raise ValueError(f"--model {config.model}: kind {config.diffusion.kind} takes --model {', '.join(fitting)}")
    channels, height, width = codec.latent_shape(config.data.image_size, config.data.image_size)
    return ModelSpec(
        name=config.model,
        args={**process.model_args, **config.model_args},
        input_size=(height, width),
        in_channels=channels,
        out_channels=process.output_channels(channels),
        num_classes=num_classes,
    )


def parameters(backbone: type[nn.Module]) -> set[str]:
    """Names of its constructor's arguments."""
    return set(signature(backbone).parameters)


def data_of(trained_on: DataConfig, asked: DataConfig) -> DataConfig:
    """A checkpoint's images, where they lie now: `path`, `cache` and `on_error` may be given anew.

    Raises:
        ValueError: for a setting that would make them others.
    """
    given = {name: value for name, value in asdict(asked).items() if value != getattr(DataConfig(), name)}
    for name, value in given.items():
        if name not in ("path", "cache", "on_error") and value != getattr(trained_on, name):
            raise ValueError(
                f"--data.{name} {value}: the checkpoint's images have {getattr(trained_on, name)}; leave it out"
            )
    return replace(trained_on, **given)


def open_split(config: DataConfig, split: str):
    """The training or test split of the configured images."""
    return open_dataset(
        config.path,
        split=split,
        image_size=config.image_size,
        test_fraction=config.test_fraction,
        split_seed=config.split_seed,
        exclude_classes=config.exclude_classes,
        on_error=config.on_error,
        num_images=config.num_images,
        difficulty=config.difficulty,
        min_size=config.min_size,
        use_labels=config.use_labels,
        group_near_duplicates=config.group_near_duplicates,
    )


def open_cache(config: DataConfig, codec: Codec, dataset, accelerator: Accelerator, *, flips: bool) -> LatentCache:
    """The encoded images, from the cache folder or, on first use, encoded into it by all processes."""
    expected = {**codec.identity, **dataset.describe(), "flips": flips}
    folder = Path(config.cache) / cache_name(expected)
    if from_main(accelerator, lambda: not (folder / "manifest.json").exists()):
        build_cache(
            folder,
            dataset,
            lambda images: codec.prepare(images.to(accelerator.device)).cpu(),
            codec.provenance,
            flips=flips,
            batch_size=128,
            rank=accelerator.process_index,
            num_ranks=accelerator.num_processes,
            progress=accelerator.is_main_process,
        )
        accelerator.wait_for_everyone()
    return LatentCache(folder, expected)


def sampling_of(config: SamplingConfig, num_classes: int, **given: object) -> SamplingConfig:
    """The configuration, unguided where no classes can be (`guided_classes`), with what was given in its place.

    Raises:
        ValueError: for a name that it does not have.
    """
    own = config if num_classes or config.guidance_checkpoint else replace(config, guidance_scale=1.0)
    known = [each.name for each in fields(config)]
    for name in given.keys() - set(known):
        raise ValueError(f"--sampling.{name}: unknown, choose from {', '.join(known)}")
    return replace(own, **{name: value for name, value in given.items() if value is not None})


def check_sampling(
    config: SamplingConfig, process: Process, num_classes: int, num_channels: int | None = None
) -> SamplingConfig:
    """The configuration, with the process's own sampler and spacing where it names none, if the model can follow it.

    Raises:
        ValueError: for an unknown name, a number out of its range or of another sampler, more steps than the process
            has, or guidance without classes.
    """
    check_settings(config, "--sampling.")
    config = replace(
        config,
        sampler=config.sampler or process.default_sampler,
        spacing=config.spacing or process.default_spacing,
    )
    if config.sampler not in samplers_of(process):
        known = ", ".join(samplers_of(process))
        raise ValueError(f"--sampling.sampler {config.sampler}: unknown, choose from {known}")
    if num_classes == 0 and config.guidance_scale != 1.0 and config.guidance_checkpoint is None:
        raise ValueError(
            f"--guidance_scale {config.guidance_scale}: the model is unconditional, or was trained with "
            "--train.label_dropout 0, and has no null label to be guided away from; leave it at 1"
        )
    if num_channels is not None and (config.legacy_cfg_channels or 1) > num_channels:
        raise ValueError(f"--sampling.legacy_cfg_channels {config.legacy_cfg_channels}: there are {num_channels}")
    for name, sampler in {"eta": "ddim", "churn": "heun"}.items():
        if getattr(config, name) and config.sampler != sampler:
            raise ValueError(f"--{name} {getattr(config, name)}: {sampler} alone uses it, not {config.sampler}; give 0")
    build_guidance(config)
    process.reverse_steps(config.num_steps, config.spacing)
    return config


def build_guidance(config: SamplingConfig) -> Guidance:
    """How guidance is applied.

    Raises:
        ValueError: for a number out of its range.
    """
    if config.guidance_interval is not None and len(config.guidance_interval) != 2:
        raise ValueError(f"--guidance_interval {config.guidance_interval}: give two noise levels, such as [0.2, 5]")
    low, high = config.guidance_interval or (0.0, math.inf)
    return Guidance(
        interval=(float(low), float(high)),
        schedule=config.guidance_schedule,
        rescale=config.guidance_rescale,
        parallel=config.guidance_parallel,
        radius=config.guidance_radius,
        momentum=config.guidance_momentum,
    )


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Fused AdamW, with Muon for the blocks' matrices where asked for; rates are set each step by `set_learning_rate`.

    Raises:
        ValueError: for Muon on a backbone without such matrices.
    """
    of_adamw: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.muon_lr is None:
        return torch.optim.AdamW(model.parameters(), fused=True, **of_adamw)
    return Muon(*split_for_muon(model), lr_scale=config.muon_lr / config.lr, **of_adamw)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of the next step, of each group by its share."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def learning_rate(config: OptimConfig, step: int, num_steps: int, epoch_steps: float = 1.0) -> float:
    """A function of the step alone: linear warm-up, then the configured decay until the last step.

    A training in phases has a warm-up and a decay in each: `step` and `num_steps` are the phase's. An epoch has
    `epoch_steps` of them, not always a whole number.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    return config.lr * DECAYS[config.decay](progress, step / epoch_steps, config)


DECAYS: dict[str, Callable[[float, float, OptimConfig], float]] = {  # of the phase's progress and epochs
    "constant": lambda progress, epochs, config: 1.0,
    "cosine": lambda progress, epochs, config: 0.5 * (1 + math.cos(math.pi * progress)),
    "step": lambda progress, epochs, config: config.decay_factor ** (epochs // config.decay_epochs),
}


def num_training_steps(config: TrainConfig, num_images: int) -> int:
    """Optimizer steps of the run: as asked, or enough for the epochs, the last one whole."""
    return config.num_steps or -(-(config.num_epochs or 100) * num_images // config.batch_size)
