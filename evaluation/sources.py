"""Sources of images to be scored. They provide images by index, so that processes can share the work."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from accelerate import Accelerator
from jaxtyping import Int64, UInt8
from torch import Tensor

from autoencoders.codec import Codec
from checkpoints.checkpoint import Checkpoint
from data import summarize_left_out
from data.image_set import ImageSet
from data.images import ImageDataset
from data.subsets import map_labels, stratified
from diffusion.samplers import randn_like
from experiment.config import EvaluationConfig, SamplingConfig
from machine.atomic_files import sha256_of
from machine.randomness import generator_for
from metrics.image_batches import ImageBatch, Images, image_batches, split_into_batches
from metrics.npz import images_in, labels_in, read_arrays, weights_in
from sampling.checks import resolve_sampling
from sampling.generation import Generator, create_generator
from sampling.labels import sample_labels
from settings import set_values


@dataclass(frozen=True)
class Source:
    """Images by index, with their provenance."""

    name: str
    num_images: int
    batches: Callable[[Tensor, int], Iterator[ImageBatch]]  # (indices, batch size)
    provenance: dict[str, Any]
    labels: Int64[Tensor, " n"] | None = None
    classes: Sequence[str] = ()  # names of the labels

    def images(self, indices: Tensor) -> UInt8[Tensor, "n 3 h w"]:
        return torch.cat([batch.images for batch in self.batches(indices, 64)])


def from_generator(generator: Generator, name: str, classes: Sequence[str] = (), **provenance: object) -> Source:
    """Samples of a generator, generated when they are needed. `provenance` gives further entries."""
    provenance = {"kind": "samples", **generator.provenance, **provenance}
    labels = generator.labels if classes else None
    return Source(name, len(generator.labels), generator.batches, provenance, labels, classes)


def from_images(
    images: Images,
    name: str,
    index: Int64[Tensor, " n"] | None = None,
    *,
    labels: Int64[Tensor, " m"] | None = None,
    classes: Sequence[str] = (),
    **provenance: object,
) -> Source:
    """Images of a data set or a tensor, optionally only those at `index`. `labels` has one for each of all images."""
    chosen = torch.arange(len(images)) if index is None else index  # pyright: ignore[reportArgumentType]
    chosen_labels = labels[chosen] if labels is not None and classes else None

    def batches(indices: Tensor, batch_size: int) -> Iterator[ImageBatch]:
        loaded = image_batches(images, batch_size, indices=chosen[indices])
        for part, batch in zip(split_into_batches(indices, batch_size), loaded, strict=True):
            yield replace(batch, indices=part, labels=None if chosen_labels is None else chosen_labels[part])

    return Source(name, len(chosen), batches, {**provenance, "num_images": len(chosen)}, chosen_labels, classes)


def from_dataset(dataset: Any, name: str, num: int | None = None, seed: int = 0, **provenance: object) -> Source:
    """Images of a data set, or a stratified sample of `num` images if it has more."""
    index = stratified(dataset.labels, min(num or len(dataset), len(dataset)), seed)
    return from_images(dataset, name, index, labels=dataset.labels, **{**dataset.describe(), **provenance})


def matching_images(
    samples: Source, dataset: Any, name: str, flag: str, seed: int = 0
) -> tuple[Source, Int64[Tensor, " n"]]:
    """Choose images of a data set that match samples in number and, by name, in classes; also return their indices.
    Without labels they are a stratified sample. Images repeat if a class has too few."""
    if samples.labels is None or not dataset.classes:
        index = stratified(dataset.labels, samples.num_images, seed)
    else:
        labels = map_labels(samples.labels, samples.classes, dataset.classes, flag)
        generator, index = torch.Generator().manual_seed(seed), torch.empty_like(labels)
        for label in labels.unique().tolist():
            of_class = (dataset.labels == label).nonzero().flatten()
            if len(of_class) == 0:
                raise ValueError(f"{flag}: the {name} have no image of the class {dataset.classes[label]}")
            shuffled = of_class[torch.randperm(len(of_class), generator=generator)]
            positions = (labels == label).nonzero().flatten()
            index[positions] = shuffled[torch.arange(len(positions)) % len(of_class)]
    provenance = {**dataset.describe(), "label_policy": "the samples'", "num_different": len(index.unique())}
    return from_images(dataset, name, index, labels=dataset.labels, **provenance), index


def reconstructions(source: Source, codec: Codec, device: torch.device, seed: int | None = None) -> Source:
    """Reconstructions by the autoencoder, from the posterior's mean or, with a seed, a sample of it."""

    def encode(batch: ImageBatch) -> Tensor:
        images = batch.images.to(device)
        if seed is None:
            return codec.encode(images)
        generators = [generator_for(seed, "posterior", index) for index in batch.indices.tolist()]
        shape = (len(images), *codec.latent_shape(*images.shape[-2:]))
        return codec.draw(codec.prepare(images), randn_like(torch.empty(shape, device=device), generators))

    def batches(indices: Tensor, batch_size: int) -> Iterator[ImageBatch]:
        for batch in source.batches(indices, batch_size):
            yield replace(batch, images=codec.decode(encode(batch)).cpu())

    provenance = {**source.provenance, "kind": "reconstructions", "autoencoder": codec.provenance}
    return replace(source, name="reconstructions", batches=batches, provenance=provenance)


@contextmanager
def rename_flag(flag: str, instead_of: str) -> Iterator[None]:
    """Context that replaces the flag `instead_of` in error messages by `flag`, which the user gave."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace(instead_of, flag)) from error


def read_samples(path: str, image_size: int, num: int | None, seed: int = 0) -> Source:
    """Read samples from a folder or a zip of images, or from `arr_0` [n h w 3] of an npz in ADM's format, with labels
    if it names the classes. Of more than `num` images, take a stratified sample."""
    if Path(path).suffix != ".npz":
        with rename_flag("--samples", "--data.path"):
            dataset = ImageDataset(path, image_size=image_size)  # not `open_dataset`: a folder may be called shapes
            for name, (width, height) in dataset.sizes():
                if (width, height) != (image_size, image_size):
                    raise ValueError(
                        f"--samples {path}: {name} has {width}x{height} pixels, not the reference's {image_size}; "
                        "give samples as they were drawn (a grid of them is a picture, no sample)"
                    )
        return from_dataset(dataset, Path(path).name, num, seed, kind="images", left_out=summarize_left_out(dataset))
    flag = f"--samples {path}"
    arrays = read_arrays(Path(path), flag)
    images, strata, classes = images_in(arrays, flag), torch.zeros(len(arrays["arr_0"]), dtype=torch.int64), []
    if images.shape[2:] != (image_size, image_size):
        side = "x".join(map(str, images.shape[2:]))
        raise ValueError(f"{flag}: its images have {side} pixels, not the reference's {image_size}")
    if "classes" in arrays and arrays["classes"].size:
        strata, classes = labels_in(arrays, flag)
    index = stratified(strata, min(num or len(images), len(images)), seed)
    identity = {"kind": "npz", "path": path, "sha256": sha256_of(Path(path)), **weights_in(arrays)}
    return from_images(images, Path(path).name, index, labels=strata, classes=classes, **identity)


def from_checkpoint(
    checkpoint: Checkpoint,
    settings: list[dict[str, Any]],
    evaluation: EvaluationConfig,
    codec: Codec,
    accelerator: Accelerator,
    num_trials: int,
    reference: ImageSet | UInt8[Tensor, "n 3 h w"] | None,
    compiled: str | None = None,
) -> list[list[Source]]:
    """Samples of a checkpoint: for each of the overrides in `settings` a list of trials with consecutive seeds. By
    default there are as many samples as images in the `reference`, if it has images; `--labels reference` takes their
    labels."""
    diffusion, defaults = checkpoint.build_diffusion(), checkpoint.config.sampling
    resolved = [
        resolve_sampling(defaults, diffusion, checkpoint.num_guided, say=accelerator.print, **overrides)
        for overrides in settings
    ]
    num_reference, num_classes = 0 if reference is None else len(reference), len(checkpoint.classes)
    num = evaluation.num_samples or num_reference
    if evaluation.labels == "balanced" and num < num_classes:
        warning = f"--num_samples {num}: only {num} of {num_classes} classes are sampled, but compared with all"
        accelerator.print(f"{warning}; --labels random draws of all, as does --labels reference")
    reference_labels = None
    if isinstance(reference, ImageSet) and evaluation.labels == "reference" and checkpoint.classes:
        reference_labels = map_labels(reference.labels, reference.classes, checkpoint.classes, "--labels reference")
    model = checkpoint.load_model(accelerator.device)
    provenance: dict[str, Any] = {"checkpoint": checkpoint.path.as_posix(), "model": checkpoint.spec.name}
    provenance |= {"step": checkpoint.step, "trained_at_commit": checkpoint.commit, "labels": evaluation.labels}
    provenance["weights_sha256"] = checkpoint.weights_sha256

    def create(sampling: SamplingConfig, trial: int) -> Source:
        labels = sample_labels(evaluation, num_reference, num_classes, reference_labels, trial)
        seed = evaluation.seed + trial
        how: dict[str, Any] = {"model": model, "compiled": compiled}
        generator = create_generator(checkpoint, sampling, codec, labels, seed, accelerator, **how)
        name = checkpoint.config.name or checkpoint.spec.name
        return from_generator(generator, name, checkpoint.classes, **provenance)

    return [[create(sampling, trial) for trial in range(num_trials)] for sampling in resolved]


def sweep(flags: SamplingConfig) -> list[dict[str, Any]]:
    """All combinations of the values of flags with several values, such as `--guidance_scale 1,1.5,2`."""
    hints = get_type_hints(SamplingConfig)
    values = {name: _split(f"--sampling.{name}", value, hints[name]) for name, value in set_values(flags).items()}
    return [dict(zip(values, combination, strict=True)) for combination in product(*values.values())]


def _split(flag: str, value: Any, hint: Any) -> list[Any]:
    if not isinstance(value, str):
        return [value]
    convert = next((type_ for type_ in (int, float) if type_ in (hint, *get_args(hint))), str)
    try:
        return [convert(word) for word in value.split(",")]
    except ValueError:
        raise ValueError(f"{flag} {value}: give a number, or several with commas in between") from None
