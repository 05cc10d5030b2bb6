"""Generate images for labels, distributed over all processes."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from tqdm import tqdm

from autoencoders.codec import Codec
from checkpoints.checkpoint import Checkpoint
from diffusion import Diffusion, sample
from diffusion.samplers import Callback, num_calls, num_evaluations, num_steps_for, randn_like
from experiment.config import SamplingConfig
from machine.precision import inference_autocast, precision_of
from machine.randomness import generator_for
from metrics.cost import cost
from metrics.image_batches import ImageBatch, split_into_batches
from models.compilation import compile_blocks
from sampling.checks import files_in_record, load_guide_model

BATCH_SIZE, LARGE_BATCH_SIZE = 64, 512
SMALL = 10.0  # GFLOPs an image: a large GPU computes 64 of them in the 2 ms that some 400 launches take
DECODED_AT_ONCE = 64  # images; in larger batches the decoder, not the backbone, would set the peak of memory


@dataclass(frozen=True)
class Generator:
    """Generates images by index. Image `i` depends on (seed, i, its label) only, not on batches or devices."""

    model: nn.Module
    diffusion: Diffusion
    codec: Codec
    labels: Int64[Tensor, " n"]
    sampling: SamplingConfig
    image_size: tuple[int, int]
    seed: int
    accelerator: Accelerator
    callback: Callback | None = None
    guide_model: nn.Module | None = None  # for autoguidance
    on_stage: Callable[[str, Tensor], None] | None = None  # receives the output of each stage of a cascade
    compiled: str | None = None  # see `compile_blocks`; batches are then padded, as each size needs a compilation

    @property
    def num_steps(self) -> int:
        return num_steps_for(self.sampling, self.diffusion)

    @property
    def batch_size(self) -> int:
        """Images per batch by default: more for a small model on a GPU, which would otherwise wait for the
        host between its kernels. The images are the same in any batch."""
        if self.accelerator.device.type != "cuda":
            return BATCH_SIZE
        with torch.compiler.set_stance("force_eager"):  # an image would be one more batch size to compile for
            spent = cost(self.model, latent_shape=self.codec.latent_shape(*self.image_size)).gflops
        return LARGE_BATCH_SIZE if spent < SMALL else BATCH_SIZE

    @property
    def provenance(self) -> dict[str, Any]:
        """Everything except model and labels that the images depend on, for records."""
        sampling = replace(self.sampling, num_steps=self.num_steps)
        values: dict[str, Any] = {"seed": self.seed, "weights": "ema", "autoencoder": self.codec.provenance}
        values |= {"precision": precision_of(self.accelerator), "model_calls": num_calls(self.diffusion, sampling)}
        values |= {"network_evaluations": num_evaluations(self.diffusion, sampling)}
        values |= {"compiled": self.compiled} if self.compiled else {}
        return {**values, **asdict(sampling), **files_in_record(sampling)}

    def batches(self, indices: Int64[Tensor, " m"], batch_size: int) -> Iterator[ImageBatch]:
        for batch in split_into_batches(indices, batch_size):
            size = min(batch_size, len(self.labels)) if self.compiled else len(batch)
            images = self.draw(batch[torch.arange(size) % len(batch)])[: len(batch)]
            yield ImageBatch(batch, images.cpu(), self.labels[batch])

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
        """Run the sampler from noise, or from `x_t` at `start`, with a generator per image, and decode."""
        begin_step = torch.compiler.cudagraph_mark_step_begin if self.compiled == "graphs" else lambda: None

        def callback(step: int, x_t: Tensor, x_0: Tensor) -> None:
            begin_step()  # the next one
            if self.callback is not None:
                self.callback(step, x_t, x_0)

        begin_step()
        with inference_autocast(self.accelerator.device, precision_of(self.accelerator), self.model, self.guide_model):
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
                callback=callback,
                on_stage=self.on_stage,
            )
        return torch.cat([self.codec.decode(part) for part in x_0.split(DECODED_AT_ONCE)])


def create_generator(
    checkpoint: Checkpoint,
    sampling: SamplingConfig,
    codec: Codec,
    labels: Int64[Tensor, " n"],
    seed: int,
    accelerator: Accelerator,
    *,
    model: nn.Module | None = None,
    compiled: str | None = None,
    **callbacks: Any,
) -> Generator:
    """Create the generator of a checkpoint, with its guide; `model` if its weights are already loaded. If `compiled`,
    the blocks of both are compiled in place (`compile_blocks`)."""
    diffusion, size = checkpoint.build_diffusion(), checkpoint.image_size
    codec_shape, model_shape = codec.latent_shape(*size), (checkpoint.spec.in_channels, *checkpoint.spec.input_size)
    if codec_shape != model_shape:
        raise ValueError(
            f"--autoencoder: of images of {size[0]}x{size[1]} its latents are {'x'.join(map(str, codec_shape))}, and "
            f"{checkpoint.path} denoises {'x'.join(map(str, model_shape))}; give the one that it was trained with"
        )
    guide_model = load_guide_model(
        sampling, checkpoint.config.diffusion, checkpoint.spec, accelerator, checkpoint.classes, checkpoint.identity
    )
    model = model or checkpoint.load_model(accelerator.device)
    for part in filter(None, (model, guide_model)):
        if compiled:
            compile_blocks(part, compiled)
    others: dict[str, Any] = {"guide_model": guide_model, "compiled": compiled, **callbacks}
    return Generator(model, diffusion, codec, labels, sampling, size, seed, accelerator, **others)


def generate(generator: Generator, *, batch_size: int | None = None) -> UInt8[Tensor, "n 3 h w"]:
    """Generate all images and return them, in order, on the main process; the other processes return none."""
    batches = list(stream(generator, batch_size=batch_size))
    return torch.cat(batches) if batches else torch.empty(0, 3, *generator.image_size, dtype=torch.uint8)


def stream(generator: Generator, *, batch_size: int | None = None) -> Iterator[UInt8[Tensor, "b 3 h w"]]:
    """Like `generate`, but yield the images in batches, as they may exceed the memory. All processes must iterate."""
    batch_size = batch_size or generator.batch_size
    accelerator, num_images = generator.accelerator, len(generator.labels)
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    quiet = not accelerator.is_main_process
    with tqdm(total=num_images, desc="sampling", unit="img", disable=quiet, leave=False) as bar:
        batches = torch.arange(num_images).split(batch_size * num_ranks)
        for batch in batches:
            size = len(batches[0] if generator.compiled else batch)
            padded = torch.arange(-(-size // num_ranks) * num_ranks) % len(batch)  # to the same number per rank
            local = batch[padded.chunk(num_ranks)[rank]]  # the main process has the first, which callbacks show
            images = batch.new_empty(0)
            errors: list[ValueError | None] = [None]
            done = bar.n
            try:
                images = replace(generator, callback=_advancing(bar, len(batch), generator)).draw(local)
            except ValueError as error:
                errors = [error]
            for error in filter(None, gather_object(errors)):  # or the other processes would wait in `gather`
                raise error
            gathered: Any = accelerator.gather(images)
            if accelerator.is_main_process:
                yield gathered[: len(batch)].cpu()
            bar.update(done + len(batch) - bar.n)


def _advancing(bar: "tqdm[Any]", num_images: int, generator: Generator) -> Callback:
    """Callback that moves the bar over a batch of images step by step, after the generator's own callback."""
    done, num_steps = bar.n, generator.num_steps

    def advance(step: int, x_t: Tensor, x_0: Tensor) -> None:
        if generator.callback is not None:
            generator.callback(step, x_t, x_0)
        bar.update(max(0, done + num_images * (step + 1) // (num_steps + 1) - bar.n))

    return advance
