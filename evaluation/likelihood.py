"""Log-likelihood of held-out images under a checkpoint."""

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from autoencoders.codec import Codec
from checkpoints.checkpoint import Checkpoint
from data.image_set import ImageSet
from data.subsets import by_name, stratified
from diffusion.sde import bits_per_dimension
from machine.accelerator import share
from machine.randomness import generator_for
from metrics.image_batches import in_batches
from metrics.scores import Score


def held_out_likelihood(
    checkpoint: Checkpoint, codec: Codec, held_out: ImageSet, num_images: int, accelerator: Accelerator, *, seed: int
) -> Score:
    """Bits per dimension of held-out images given their labels, of each class its share: mean and standard error. In
    latent space it is of the latents' density. Image `i`'s draws are a function of (seed, i)."""
    if not 2 <= num_images <= len(held_out):
        raise ValueError(f"--likelihood {num_images} must lie in 2..{len(held_out)}, the held-out images; 0: none")
    diffusion, device = checkpoint.build_diffusion(), accelerator.device
    model, labels = checkpoint.load_model(device), held_out.labels
    chosen = stratified(labels, num_images, seed)
    if checkpoint.classes:
        labels = by_name(labels, held_out.classes, checkpoint.classes, "--likelihood")
    bits_of: list[tuple[int, float]] = []  # index and bits of this process's images
    hidden = not accelerator.is_main_process
    with tqdm(total=num_images, desc="likelihood", unit="img", disable=hidden, leave=False) as bar:
        for part in in_batches(share(num_images, accelerator), 64):
            x_0, signs = [], []
            for index, one in zip(part.tolist(), chosen[part].tolist(), strict=True):
                draw = generator_for(seed, "likelihood", index, device=device)
                x_0.append(codec.encode(held_out[one][0][None].to(device), draw))
                signs.append(torch.randint(0, 2, x_0[-1].shape, generator=draw, device=device) * 2.0 - 1)
            y = labels[chosen[part]].to(device)
            bits = bits_per_dimension(diffusion, model, torch.cat(x_0), y, probe=torch.cat(signs))
            bits_of += zip(part.tolist(), (bits + codec.density_offset).tolist(), strict=True)
            bar.update(len(part) * accelerator.num_processes)
    bits = torch.tensor([value for _, value in sorted(gather_object(bits_of))], dtype=torch.float64)
    return Score(bits.mean().item(), (bits.std() / len(bits) ** 0.5).item(), spread=f"standard error of {num_images}")
