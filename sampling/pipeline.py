"""The Python interface: load a checkpoint and sample from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import UInt8
from torch import Tensor, nn

from autoencoders.codec import Codec
from checkpoints.checkpoint import Checkpoint, open_checkpoint
from diffusion import Diffusion
from machine.accelerator import open_accelerator
from sampling.checks import resolve_sampling
from sampling.generation import Generator, create_generator, generate
from sampling.labels import resolve_classes
from settings import SEEDS, check_interval

Classes = Sequence[str | int] | str | int  # names or labels


@dataclass(frozen=True)
class Pipeline:
    """A checkpoint ready for sampling; backbone and autoencoder are loaded on first use."""

    checkpoint: Checkpoint
    accelerator: Accelerator
    autoencoder: str | None = None  # replaces the checkpoint's
    compiled: str | None = None  # see `models.compilation.compile_blocks`

    @property
    def classes(self) -> list[str]:
        """Names of the classes, by label; empty for an unconditional model."""
        return self.checkpoint.classes

    @cached_property
    def model(self) -> nn.Module:
        return self.checkpoint.load_model(self.accelerator.device)

    @cached_property
    def diffusion(self) -> Diffusion:
        return self.checkpoint.build_diffusion()

    @cached_property
    def codec(self) -> Codec:
        """Converts images to latents and back."""
        return self.checkpoint.open_codec(self.autoencoder, self.accelerator.print).to(self.accelerator.device)

    def sample(
        self,
        classes: Classes = (),
        num_per_class: int = 4,
        *,
        seed: int = 0,
        batch_size: int | None = None,
        **sampling: Any,
    ) -> UInt8[Tensor, "n 3 h w"]:
        """Generate images, class by class; sample.py generates the same.

        Args:
            classes: names or labels; all by default
            num_per_class: images per class
            seed: of the samples
            batch_size: images at a time; by default 64, for small models on a GPU 512
            sampling: replaces settings of the checkpoint: `guidance_scale=2.0, num_steps=16, sampler="heun"`

        Raises:
            ValueError: for an unknown class or an invalid setting
        """
        check_interval("batch_size", batch_size, "[1, inf)")
        return generate(self.generator(classes, num_per_class, seed=seed, **sampling), batch_size=batch_size)

    def generator(self, classes: Classes = (), num_per_class: int = 4, *, seed: int = 0, **sampling: Any) -> Generator:
        """Create the generator that `sample` uses, for example to generate more images than fit in memory, with several
        processes, or with a callback at each step."""
        names = [classes] if isinstance(classes, str | int) else classes  # a string is one name
        check_interval("num_per_class", num_per_class, "[1, inf)")
        check_interval("seed", seed, SEEDS)
        labels = torch.tensor(resolve_classes(names, self.classes))
        labels, checkpoint = labels.repeat_interleave(num_per_class), self.checkpoint
        sampling["say"] = self.accelerator.print
        settings = resolve_sampling(checkpoint.config.sampling, self.diffusion, checkpoint.num_guided, **sampling)
        ours: dict[str, Any] = {"model": self.model, "compiled": self.compiled}
        return create_generator(checkpoint, settings, self.codec, labels, seed, self.accelerator, **ours)


def load(
    path: str | Path, *, precision: str = "auto", autoencoder: str | None = None, compile: str | None = None
) -> Pipeline:
    """Open a checkpoint for sampling.

    Args:
        path: a run's folder, a checkpoint's folder, its ema.safetensors, `hf://owner/name`, or `embedded`
        precision: 'auto', 'fp32' or 'bf16'
        autoencoder: replaces the checkpoint's
        compile: None, or 'blocks' or 'graphs' to torch.compile the backbone's blocks

    Raises:
        ValueError: if there is no checkpoint
    """
    accelerator = open_accelerator(precision)
    return Pipeline(open_checkpoint(path, accelerator), accelerator, autoencoder, compile)
