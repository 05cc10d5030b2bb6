"""Log-likelihood of held-out images under a checkpoint."""

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from autoencoders.codec import Codec
from checkpoints.checkpoint import Checkpoint
from data.image_set import ImageSet
from data.subsets import map_labels, stratified
from diffusion.sde import bits_per_dimension
from machine.accelerator import indices_of_process
from machine.randomness import generator_for
from metrics.image_batches import split_into_batches
from metrics.scores import Score


def held_out_likelihood(
    checkpoint: Checkpoint, codec: Codec, held_out: ImageSet, num_images: int, accelerator: Accelerator, *, seed: int
) -> Score:
    """Estimate bits per dimension of held-out images given their labels: mean and standard error.

    The images are a stratified sample. In latent space the result concerns the density of latents. The random numbers
    for image `i` depend on (seed, i) only.
    """
    if not 2 <= num_images <= len(held_out):
        raise ValueError(f"--likelihood {num_images} must lie in 2..{len(held_out)}, the held-out images; 0: none")
    diffusion, device = checkpoint.build_diffusion(), accelerator.device
    model, labels = checkpoint.load_model(device), held_out.labels
    chosen = stratified(labels, num_images, seed)
    if checkpoint.classes:
        labels = map_labels(labels, held_out.classes, checkpoint.classes, "--likelihood")
    results: list[tuple[int, float]] = []  # index and bits of this process's images
    quiet = not accelerator.is_main_process
    with tqdm(total=num_images, desc="likelihood", unit="img", disable=quiet, leave=False) as bar:
        for indices in split_into_batches(indices_of_process(num_images, accelerator), 64):
            x_0, probes = [], []
            for index, image_index in zip(indices.tolist(), chosen[indices].tolist(), strict=True):
                generator = generator_for(seed, "likelihood", index, device=device)
                x_0.append(codec.encode(held_out[image_index][0][None].to(device), generator))
                probes.append(torch.randint(0, 2, x_0[-1].shape, generator=generator, device=device) * 2.0 - 1)
            y = labels[chosen[indices]].to(device)
            bits = bits_per_dimension(diffusion, model, torch.cat(x_0), y, probe=torch.cat(probes))
            results += zip(indices.tolist(), (bits + codec.density_offset).tolist(), strict=True)
            bar.update(len(indices) * accelerator.num_processes)
    bits = torch.tensor([value for _, value in sorted(gather_object(results))], dtype=torch.float64)
    return Score(bits.mean().item(), (bits.std() / len(bits) ** 0.5).item(), spread=f"standard error of {num_images}")
