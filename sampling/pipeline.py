"""From Python: what has been trained, as one object that draws."""

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
from sampling.generation import Generator, generate, generator_of
from sampling.labels import resolve_classes
from settings import SEEDS, check_interval

Classes = Sequence[str | int] | str | int  # names or labels


@dataclass(frozen=True)
class Pipeline:
    """A checkpoint with all that drawing from it takes; backbone and autoencoder are loaded on first use."""

    checkpoint: Checkpoint
    accelerator: Accelerator
    autoencoder: str | None = None  # in place of the checkpoint's

    @property
    def classes(self) -> list[str]:
        """Their names, by label; none of an unconditional model."""
        return self.checkpoint.classes

    @cached_property
    def model(self) -> nn.Module:
        return self.checkpoint.load_model(self.accelerator.device)

    @cached_property
    def diffusion(self) -> Diffusion:
        return self.checkpoint.build_diffusion()

    @cached_property
    def codec(self) -> Codec:
        """Between images and what the backbone denoises."""
        return self.checkpoint.open_codec(self.autoencoder, self.accelerator.print).to(self.accelerator.device)

    def sample(
        self, classes: Classes = (), num_per_class: int = 4, *, seed: int = 0, batch_size: int = 64, **sampling: Any
    ) -> UInt8[Tensor, "n 3 h w"]:
        """Images of these classes (names or labels; of all by default), one class after the other: those of sample.py.

        `sampling` stands in place of the checkpoint's settings: `guidance_scale=2.0, num_steps=16, sampler="heun"`.
        Raises ValueError for a class that there is not, or settings that do not fit.
        """
        check_interval("batch_size", batch_size, "[1, inf)")
        return generate(self.generator(classes, num_per_class, seed=seed, **sampling), batch_size=batch_size)

    def generator(self, classes: Classes = (), num_per_class: int = 4, *, seed: int = 0, **sampling: Any) -> Generator:
        """What draws them, image by image, for more than memory holds, several processes, or a look at each step."""
        asked = [classes] if isinstance(classes, str | int) else classes  # a text is a name, not its letters
        check_interval("num_per_class", num_per_class, "[1, inf)")
        check_interval("seed", seed, SEEDS)
        labels = torch.tensor(resolve_classes(asked, self.classes))
        labels, checkpoint = labels.repeat_interleave(num_per_class), self.checkpoint
        sampling["say"] = self.accelerator.print
        settings = resolve_sampling(checkpoint.config.sampling, self.diffusion, checkpoint.num_guided, **sampling)
        return generator_of(checkpoint, settings, self.codec, labels, seed, self.accelerator, model=self.model)


def load(path: str | Path, *, precision: str = "auto", autoencoder: str | None = None) -> Pipeline:
    """A run's folder, a checkpoint, its ema.safetensors, `hf://owner/name`, or `embedded`, ready to draw.

    Raises ValueError where there is none.
    """
    accelerator = open_accelerator(precision)
    return Pipeline(open_checkpoint(path, accelerator), accelerator, autoencoder)
