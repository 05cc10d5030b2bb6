"""Distributed generation: labels in, images out; each image a function of (seed, its index, its label) alone."""

import difflib
import unicodedata
from collections.abc import Callable, Iterator, Sequence
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
from data.subsets import stratified
from diffusion import Diffusion, sample
from diffusion.samplers import Callback, Staged, num_steps_of, randn_like
from experiment.config import EvaluationConfig, SamplingConfig
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
        told: dict[str, Any] = {"guide_model": self.guide_model, "generator": generators, "start": start}
        told["clip"] = self.codec.limit if self.sampling.clip is None else self.sampling.clip
        told |= {"callback": self.callback, "on_stage": self.on_stage}
        with autocasting(self.accelerator.device, precision_of(self.accelerator), self.model, self.guide_model):
            x_0 = sample(self.diffusion, self.model, noise, y, self.sampling, **told)
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
    trained = (checkpoint.config.diffusion, checkpoint.spec, accelerator, checkpoint.classes, checkpoint.identity)
    callbacks["guide_model"] = load_guide_model(sampling, *trained)
    model = model or checkpoint.load_model(accelerator.device)
    return Generator(model, diffusion, codec, labels, sampling, size, seed, accelerator, **callbacks)


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


def share(num_images: int, accelerator: Accelerator) -> Int64[Tensor, " m"]:
    """The indices that fall to this process, dealt out in turn."""
    return torch.arange(num_images)[accelerator.process_index :: accelerator.num_processes]


class DenoisingPanel:
    """Keeps some moments of the first batch's denoising: as a `callback`, then as a picture."""

    def __init__(self, num_moments: int, num_steps: int, num_images: int = 6) -> None:
        if not 1 <= num_moments <= num_steps:
            raise ValueError(f"--panel {num_moments} must lie in 1..{num_steps}, the sampling steps")
        self.steps = torch.linspace(0, num_steps - 1, num_moments).round().long().tolist()
        self.names = [f"step {step + 1}" for step in self.steps]
        self.num_images, self.columns = num_images, num_moments
        self.moments: list[tuple[Tensor, Tensor]] = []

    def __call__(self, step: int, x_t: Tensor, x_0: Tensor) -> None:
        if len(self.moments) < self.columns and step == self.steps[len(self.moments)]:
            self.moments.append((x_t[: self.num_images], x_0[: self.num_images]))

    def images(self, codec: Codec) -> UInt8[Tensor, "n 3 h w"]:
        """For each image a row of `x_t` and below it one of predicted `x_0`, decoded."""
        moments = torch.stack([torch.stack(moment) for moment in self.moments])  # [moments 2 images c h w]
        return codec.decode(rearrange(moments, "m kind b c h w -> (b kind m) c h w")).cpu()


class StagesPanel:
    """Keeps what each stage of the first batch put out: as `on_stage`, then as a picture."""

    def __init__(self, diffusion: Diffusion, num_images: int = 36) -> None:
        if not isinstance(diffusion, Staged):
            raise ValueError("--stages true: this model draws in one stage; it is for cascades, see --panel")
        self.names, self.num_images = list(diffusion.stages), num_images
        self.outputs: dict[str, Tensor] = {}

    def __call__(self, name: str, x_0: Tensor) -> None:
        self.outputs.setdefault(name, x_0[: self.num_images])

    def images(self, codec: Codec) -> UInt8[Tensor, "n 3 h w"]:
        """For each sample its stages' outputs, decoded, in squares of the largest one's size."""
        decoded = [codec.decode(self.outputs[name]).cpu() for name in self.names]  # not all devices enlarge bytes
        size = max(tuple(images.shape[-2:]) for images in decoded)
        enlarged = [nn.functional.interpolate(images, size=size, mode="nearest") for images in decoded]
        return torch.stack(enlarged, dim=1).flatten(0, 1)


def resolve_classes(asked: Sequence[str | int], classes: list[str]) -> list[int]:
    """Labels of class names, or of numbers in words where no class is called so, and labels themselves; all of them
    when none are asked for, 0 for an unconditional model."""
    if not asked:
        return list(range(max(1, len(classes))))
    labels, composed = [], [unicodedata.normalize("NFC", name) for name in classes]
    for name in asked:
        if not classes:
            raise ValueError(f"--classes {name}: the model has no classes; leave it out")
        if isinstance(name, str) and (same := unicodedata.normalize("NFC", name)) in composed:  # macOS takes them apart
            labels.append(composed.index(same))
        elif str(name) in map(str, range(len(classes))):
            labels.append(int(name))
        else:
            close = difflib.get_close_matches(str(name), classes, n=3, cutoff=0.4)
            known = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(classes[:10])}, ..."
            raise ValueError(f"--classes {name}: no such class among the {len(classes)}; {known}")
    return labels


def sample_labels(
    evaluation: EvaluationConfig,
    num_reference: int,
    num_classes: int,
    reference: Int64[Tensor, " m"] | None,
    trial: int = 0,
) -> Int64[Tensor, " n"]:
    """Labels of samples to be scored, as the policy asks for: `balanced`, all classes in turn; `reference`, of each
    class its share of the reference; `random`, each class as likely. As many as asked, else as the reference has."""
    num_images = evaluation.num_samples or num_reference
    if num_images < 1:
        raise ValueError("--num_samples: the reference does not say how many images it is of; give a number")
    if num_classes == 0 or evaluation.labels == "balanced":
        return balanced_labels(num_images, num_classes)
    if evaluation.labels == "reference":
        if reference is None:
            raise ValueError("--labels reference: the reference has no labels; choose from balanced, random")
        return reference[stratified(reference, num_images, evaluation.seed)]
    return torch.randint(num_classes, (num_images,), generator=generator_for(evaluation.seed + trial, "labels"))


def balanced_labels(num_images: int, num_classes: int) -> Int64[Tensor, " n"]:
    """Labels in turn, so that classes differ in count by one at most; all 0 for an unconditional model."""
    return torch.arange(num_images) % max(1, num_classes)
