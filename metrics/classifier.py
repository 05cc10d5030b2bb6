"""A small image classifier, trained in seconds to minutes, as a feature extractor where none can be downloaded. Scores
on its features only compare with other scores on the same classifier."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64, UInt8
from torch import Generator, Tensor, nn
from tqdm import tqdm

from machine.precision import has_bf16
from metrics.programs import save_program

LR = 2e-3


class SmallClassifier(nn.Module):
    """A convolutional classifier of images resized to `side` pixels.

    Stages of two convolutions halve the resolution and double the width, down to 4x4. Global average pooling, a linear
    layer to the features and one to the classes follow. A small `side` makes it insensitive to an autoencoder's blur. A
    `thorough` one looks at every pixel first, and halves the resolution by pooling, for three times the work.
    """

    def __init__(self, num_classes: int, *, side: int = 32, width: int = 24, thorough: bool = False) -> None:
        super().__init__()
        if side < 8 or side & (side - 1):
            raise ValueError(f"--side {side}: give a power of two, from 8 on")
        self.side = side
        widths, first = [width << level for level in range(side.bit_length() - 3)], (width + 1) // 2 if thorough else 3
        stages = [_stage(*pair, pool=thorough) for pair in pairwise([first, *widths])]
        if thorough:
            stages[0].insert(0, nn.Sequential(nn.Conv2d(3, first, kernel_size=3, padding=1), nn.ReLU()))
        self.stages, self.mirrors = nn.Sequential(*stages), False
        num_features = max(64, widths[-1] // 2)
        self.to_features = nn.Linear(widths[-1], num_features)
        self.to_logits = nn.Linear(num_features, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features [n d] and class probabilities [n k] of uint8 RGB images [n 3 h w] of any size."""
        # The signature names no axes, because checks of shapes would be exported with the program.
        features = self.features(self.preprocess(images))
        return features, self.to_logits(F.relu(features)).softmax(dim=1)

    def preprocess(self, images: Tensor) -> Tensor:
        """Convert uint8 images of any size to [-1, 1] at the network's size."""
        pixels = images.to(self.to_logits.weight.dtype) / 127.5 - 1  # [n 3 h w]
        return F.interpolate(pixels, size=(self.side, self.side), mode="bilinear", antialias=True)

    def features(self, pixels: Tensor) -> Tensor:
        """Return features [n d] of preprocessed images."""
        return self.to_features(self.stages(pixels).mean(dim=(2, 3)))

    @torch.no_grad()
    def probabilities(self, images: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n k"]:
        """Return class probabilities; if it learned from mirrored images too, means over each image and its mirror
        image."""
        views = [images, images.flip(-1)] if self.mirrors else [images]
        return torch.stack([torch.cat([self(batch)[1] for batch in view.split(256)]) for view in views]).mean(dim=0)

    def predict(self, images: UInt8[Tensor, "n 3 h w"]) -> Int64[Tensor, " n"]:
        return self.probabilities(images).argmax(dim=1)

    def save(self, path: str | Path, classes: Sequence[str] = ()) -> Path:
        """Save a file for `--extractor`, with the names of the `classes`: a torch.export program if it ends in `.pt2`,
        otherwise TorchScript."""
        return save_program(self.eval(), torch.zeros(2, 3, self.side, self.side, dtype=torch.uint8), path, classes)

    def save_perceptual(self, path: str | Path) -> Path:
        """Save a network for perceptual losses: the features of all stages, without resizing images."""
        return save_program(_StageFeatures(self.stages).eval(), torch.zeros(2, 3, self.side, self.side), path)


def train_classifier(
    images: UInt8[Tensor, "n 3 h w"],
    labels: Int64[Tensor, " n"],
    num_classes: int,
    *,
    seed: int = 0,
    epochs: int = 4,
    batch_size: int = 64,
    side: int = 32,
    width: int = 24,
    mirror: bool = False,
    thorough: bool = False,
    progress: bool = True,
) -> SmallClassifier:
    """Train a classifier, see `SmallClassifier`, on images and their labels from 0. The seed sets its initial weights,
    order and augmentation; `mirror` flips half of the images. A `thorough` classifier is trained in bf16 where the CPU
    has it.

    Images are shifted, blurred and noised, so that it becomes insensitive to an autoencoder's artefacts; for a thorough
    one a part of each is hidden instead. On 5,000 of the procedural `shapes` it takes 12 s on one CPU core and
    classifies all held-out ones correctly.
    """
    if len(images) == 0 or len(images) != len(labels):
        raise ValueError(f"{len(images)} images and {len(labels)} labels: give as many labels as images, at least one")
    if images.dtype != torch.uint8:
        raise ValueError(f"images are {str(images.dtype).removeprefix('torch.')}; give uint8, from 0 to 255")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels from {labels.min()} to {labels.max()}: classes are 0..{num_classes - 1}")

    with torch.random.fork_rng(devices=[]):  # torch initialises weights from the global generator
        torch.manual_seed(seed)
        classifier = SmallClassifier(num_classes, side=side, width=width, thorough=thorough)
    classifier.mirrors = mirror
    generator = torch.Generator().manual_seed(seed)
    num_steps = epochs * -(-len(images) // batch_size)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=num_steps, pct_start=0.2)

    bf16 = thorough and has_bf16(torch.device("cpu"))[0]
    classifier.train().to(memory_format=torch.channels_last)
    with tqdm(total=num_steps, desc="classifier", unit="step", leave=False, disable=not progress) as bar:
        for _ in range(epochs):
            for batch in torch.randperm(len(images), generator=generator).split(batch_size):
                x = shift(classifier.preprocess(images[batch]), generator, mirror=mirror)
                x = hide_square(x, generator) if thorough else degrade(x, generator)
                x = x.contiguous(memory_format=torch.channels_last)  # up to twice as fast on CPUs
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    logits = classifier.to_logits(F.relu(classifier.features(x)))
                loss = F.cross_entropy(logits.float(), labels[batch], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return classifier.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)


def shift(pixels: Float[Tensor, "b c h w"], generator: Generator, *, mirror: bool = False) -> Float[Tensor, "b c h w"]:
    """Shift each image by up to a sixteenth of its height; `mirror` also flips half of them."""
    b, _, h, w = pixels.shape
    max_shift = h // 16
    padded = F.pad(pixels, [max_shift] * 4, mode="replicate")
    offsets = torch.randint(0, 2 * max_shift + 1, (2, b), generator=generator).tolist()
    crops = zip(padded, *offsets, strict=True)
    shifted = torch.stack([image[:, top : top + h, left : left + w] for image, top, left in crops])
    if not mirror:
        return shifted
    keep = rearrange(torch.rand(b, generator=generator) < 0.5, "b -> b 1 1 1")
    return torch.where(keep, shifted, shifted.flip(-1))


def degrade(pixels: Float[Tensor, "b c h w"], generator: Generator) -> Float[Tensor, "b c h w"]:
    """Blur half of the images, and add noise of random strength up to 0.1."""
    blurred = F.avg_pool2d(F.pad(pixels, [1] * 4, mode="replicate"), kernel_size=3, stride=1)
    sharp = rearrange(torch.rand(len(pixels), generator=generator) < 0.5, "b -> b 1 1 1")
    strength = 0.1 * rearrange(torch.rand(len(pixels), generator=generator), "b -> b 1 1 1")
    return torch.where(sharp, pixels, blurred) + strength * torch.randn(pixels.shape, generator=generator)


def hide_square(pixels: Float[Tensor, "b c h w"], generator: Generator) -> Float[Tensor, "b c h w"]:
    """Set a sixteenth of each image to grey, a rectangle at a random place (Cutout, DeVries and Taylor 2017)."""
    hidden = torch.ones(len(pixels), 1, 1, 1, dtype=torch.bool)
    for axis, size in ((2, pixels.shape[2]), (3, pixels.shape[3])):
        start = torch.randint(0, size - size // 4 + 1, (len(pixels), 1), generator=generator)
        inside = (torch.arange(size) >= start) & (torch.arange(size) < start + size // 4)
        hidden = hidden & inside.unsqueeze(1).unsqueeze(5 - axis)
    return pixels.masked_fill(hidden, 0.0)


class _StageFeatures(nn.Module):
    """The outputs of all stages, normalised at each position and concatenated. Their mean squared difference is the sum
    over stages of mean squared distances, as in LPIPS (Zhang et al. 2018, eq. 1) with equal weights of all channels."""

    def __init__(self, stages: nn.Sequential) -> None:
        super().__init__()
        self.stages = stages
        # Multiplying by it casts a stage's output to float32 under autocast; an exported cast would only check a dtype.
        self.register_buffer("one", torch.ones(1, 1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        x, features = images / 127.5 - 1, []  # images are in [0, 255]
        for stage in self.stages:
            x = stage(x)
            num_positions = x.shape[-2] * x.shape[-1]
            features.append((F.normalize(self.one * x, dim=1, eps=1e-6) / num_positions**0.5).flatten(1))
        concatenated = torch.cat(features, dim=1)
        return concatenated * concatenated.shape[1] ** 0.5


def _stage(c_in: int, c_out: int, *, pool: bool) -> nn.Sequential:
    """Two convolutions; the first halves the resolution, by its stride or by pooling after it."""
    first = nn.Conv2d(c_in, c_out, kernel_size=3, stride=1 if pool else 2, padding=1, bias=False)
    second = nn.Conv2d(c_out, c_out, kernel_size=3, padding=1, bias=False)
    halve = [nn.MaxPool2d(2)] if pool else []
    return nn.Sequential(first, *halve, nn.BatchNorm2d(c_out), nn.ReLU(), second, nn.BatchNorm2d(c_out), nn.ReLU())
