"""Distributed generation: labels in, images out; each image a function of (seed, its index, its label) alone."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from einops import rearrange
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from tqdm import tqdm

from autoencoders.codec import Codec
from checkpoints.checkpoint import Checkpoint
from diffusion import Diffusion, sample
from diffusion.samplers import Callback, num_steps_of, randn_like
from experiment.config import SamplingConfig
from machine.precision import autocasting, precision_of
from machine.randomness import generator_for
from metrics.image_batches import ImageBatch, in_batches
from sampling.checks import load_guide_model


@dataclass(frozen=True)
class Generator:
    """Images by index: image `i` is a function of (seed, i, its label) alone, whatever batches and devices."""

    model: nn.Module
    diffusion: Diffusion
    codec: Codec
    labels: Int64[Tensor, " n"]
    sampling: SamplingConfig
    image_size: tuple[int, int]
    seed: int
    accelerator: Accelerator
    callback: Callback | None = None
    guide_model: nn.Module | None = None  # of autoguidance
    on_stage: Callable[[str, Tensor], None] | None = None

    @property
    def num_steps(self) -> int:
        return num_steps_of(self.sampling, self.diffusion)

    def batches(self, indices: Int64[Tensor, " m"], batch_size: int) -> Iterator[ImageBatch]:
        for part in in_batches(indices, batch_size):
            yield ImageBatch(part, self.draw(part).cpu(), self.labels[part])

    def draw(self, indices: Int64[Tensor, " b"]) -> UInt8[Tensor, "b 3 h w"]:
        device = self.accelerator.device
        generators = [generator_for(self.seed, "sample", index) for index in indices.tolist()]
        shape = self.codec.latent_shape(*self.image_size)
        noise = randn_like(torch.empty(len(indices), *shape, device=device), generators)
        return self.denoise(noise, self.labels[indices].to(device), generators)

    def denoise(
        self,
        noise: Float[Tensor, "b c h w"],
        y: Int64[Tensor, " b"],
        generators: list[torch.Generator],
        start: int | float | None = None,
    ) -> UInt8[Tensor, "b 3 H W"]:
        """From noise, or from `x_t` at the time `start`, to images; a generator each for the random steps."""
        with autocasting(self.accelerator.device, precision_of(self.accelerator), self.model, self.guide_model):
            x_0 = sample(
                self.diffusion,
                self.model,
                noise,
                y,
                self.sampling,
                guide_model=self.guide_model,
                generator=generators,
                start=start,
                clip=self.codec.limit if self.sampling.clip is None else self.sampling.clip,
                callback=self.callback,
                on_stage=self.on_stage,
            )
        return self.codec.decode(x_0)


def generator_of(
    checkpoint: Checkpoint,
    sampling: SamplingConfig,
    codec: Codec,
    labels: Int64[Tensor, " n"],
    seed: int,
    accelerator: Accelerator,
    *,
    model: nn.Module | None = None,
    **callbacks: Any,
) -> Generator:
    """Of a checkpoint's averaged weights, which `model` holds where they are loaded, with its guide."""
    diffusion, size = checkpoint.build_diffusion(), checkpoint.image_size
    theirs, ours = codec.latent_shape(*size), (checkpoint.spec.in_channels, *checkpoint.spec.input_size)
    if theirs != ours:
        raise ValueError(
            f"--autoencoder: of images of {size[0]}x{size[1]} its latents are {'x'.join(map(str, theirs))}, and "
            f"{checkpoint.path} denoises {'x'.join(map(str, ours))}; give the one that it was trained with"
        )
    guide_model = load_guide_model(
        sampling,
        checkpoint.config.diffusion,
        checkpoint.spec,
        accelerator,
        checkpoint.classes,
        checkpoint.identity,
    )
    model = model or checkpoint.load_model(accelerator.device)
    return Generator(
        model, diffusion, codec, labels, sampling, size, seed, accelerator, guide_model=guide_model, **callbacks
    )


def generate(generator: Generator, *, batch_size: int) -> UInt8[Tensor, "n 3 h w"]:
    """All images of a generator, in order, on the main process; the others do their share of the work and get none."""
    batches = list(stream(generator, batch_size=batch_size))
    return torch.cat(batches) if batches else torch.empty(0, 3, *generator.image_size, dtype=torch.uint8)


def stream(generator: Generator, *, batch_size: int) -> Iterator[UInt8[Tensor, "b 3 h w"]]:
    """The same, a batch of each process at a time: for more images than memory holds. All processes go through it."""
    accelerator, num_images = generator.accelerator, len(generator.labels)
    hidden = not accelerator.is_main_process
    with tqdm(total=num_images, desc="sampling", unit="img", disable=hidden, leave=False) as bar:
        for part in torch.arange(num_images).split(batch_size * accelerator.num_processes):
            dealt = torch.arange(-(-len(part) // accelerator.num_processes) * accelerator.num_processes) % len(part)
            mine = part[dealt[accelerator.process_index :: accelerator.num_processes]]  # as many for each: a few twice
            drawn = part.new_empty(0)
            failed: list[ValueError | None] = [None]
            try:
                drawn = generator.draw(mine)
            except ValueError as error:
                failed = [error]
            for error in filter(None, gather_object(failed)):  # first, so that no process waits for one that is gone
                raise error
            images: Any = accelerator.gather(drawn)
            if accelerator.is_main_process:
                yield rearrange(images, "(p b) ... -> (b p) ...", p=accelerator.num_processes)[: len(part)].cpu()
            bar.update(len(part))
