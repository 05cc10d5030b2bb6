"""Pictures of what an autoencoder loses."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import UInt8
from torch import Tensor

from autoencoders.codec import LatentCodec
from data.subsets import stratified
from evaluation.sources import Source
from sampling.image_files import save_labelled

AMPLIFIED = 3  # times that differences are drawn of what they are, around grey
COLUMNS = 10


def draw_reconstructions(images: Source, codecs: Sequence[LatentCodec], device: torch.device, path: Path) -> None:
    """Some images of the classes, and for each autoencoder what comes back of them and by how much it differs."""
    num = min(COLUMNS, images.num_images)
    labels = torch.zeros(images.num_images).long() if images.labels is None else images.labels
    originals = images.images(stratified(labels, num, seed=0))
    rows = [("input", _tiles(originals))]
    for codec in codecs:
        name = "reconstruction" if len(codecs) == 1 else Path(codec.source).name
        reconstructed = codec.decode(codec.encode(originals.to(device))).cpu()
        difference = AMPLIFIED * (reconstructed.float() - originals.float()) + 127.5
        rows.append((name, _tiles(reconstructed)))
        rows.append((f"difference x{AMPLIFIED}", _tiles(difference.clamp(0, 255).to(torch.uint8))))
    save_labelled(rows, [], path, scale=max(1, 128 // originals.shape[-1]))


def _tiles(images: UInt8[Tensor, "n 3 h w"]) -> list[UInt8[np.ndarray, "h w 3"]]:
    return list(rearrange(images, "n c h w -> n h w c").numpy())


def draw_spectra(frequencies: Sequence[float], powers: Mapping[str, Sequence[float]], path: Path) -> None:
    """Power by spatial frequency, of the images (the first of `powers`) and of reconstructions, and below it their
    ratio: under 1 detail is lost, over 1 it was made up."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 5.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    (first, images), *others = powers.items()
    above.plot(frequencies, images, color="black", linewidth=1.5, label=first)
    for name, power in others:
        ratio = np.divide(power, images, out=np.full(len(power), np.nan), where=np.array(images) > 1e-12)
        (line,) = above.plot(frequencies, power, linewidth=1.5, label=name)
        below.plot(frequencies, ratio, color=line.get_color(), linewidth=1.5)
    above.set(yscale="log", ylabel="power")
    above.legend(frameon=False, fontsize=8)
    below.axhline(1.0, color="black", linewidth=0.8)
    below.set(xlabel="spatial frequency (cycles a pixel)", ylabel="reconstructed / input", xlim=(0, 0.5))
    below.set_ylim(bottom=0)
    for axes in (above, below):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
