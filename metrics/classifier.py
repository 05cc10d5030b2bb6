"""A classifier of images, trained in seconds to minutes: the feature extractor for where none can be downloaded. Scores
on its features compare runs on the same data with each other and nothing else."""

from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64, UInt8
from torch import Generator, Tensor, nn
from tqdm import tqdm

from metrics.programs import save_program

LR = 2e-3


class SmallClassifier(nn.Module):
    """Stages of two convolutions, each half as large and twice as wide, down to 4x4; a global average, a linear layer
    to the features and one to the classes. Small images (`side`) hide an autoencoder's blur, large ones show more."""

    def __init__(self, num_classes: int, *, side: int = 32, width: int = 24) -> None:
        super().__init__()
        if side < 8 or side & (side - 1):
            raise ValueError(f"--side {side}: give a power of two, from 8 on")
        self.side = side
        widths = [3, *(width << level for level in range(side.bit_length() - 3))]
        self.stages = nn.Sequential(*map(_stage, widths[:-1], widths[1:]))
        num_features = max(64, widths[-1] // 2)
        self.to_features = nn.Linear(widths[-1], num_features)
        self.to_logits = nn.Linear(num_features, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [n d] and class probabilities [n k] of uint8 RGB images [n 3 h w] of any size."""
        # Plain Tensor in the signature: checking axes would leave Python comparisons of shapes in the program.
        features = self.features(self.preprocess(images))
        return features, self.to_logits(F.relu(features)).softmax(dim=1)

    def preprocess(self, images: Tensor) -> Tensor:
        """uint8 of any size to [-1, 1] at the network's own size."""
        pixels = images.to(self.to_logits.weight.dtype) / 127.5 - 1  # [n 3 h w]
        return F.interpolate(pixels, size=(self.side, self.side), mode="bilinear", antialias=True)

    def features(self, pixels: Tensor) -> Tensor:
        """[n d] of preprocessed images."""
        return self.to_features(self.stages(pixels).mean(dim=(2, 3)))

    @torch.no_grad()
    def predict(self, images: UInt8[Tensor, "n 3 h w"]) -> Int64[Tensor, " n"]:
        return torch.cat([self(batch)[1].argmax(dim=1) for batch in images.split(256)])

    def save(self, path: str | Path) -> Path:
        """Write the extractor's file, for `--extractor`: a program of torch.export (`.pt2`), else TorchScript."""
        return save_program(self.eval(), torch.zeros(2, 3, self.side, self.side, dtype=torch.uint8), path)

    def save_perceptual(self, path: str | Path) -> Path:
        """Write a network for perceptual losses: every stage's features, of images at their own size."""
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
    progress: bool = True,
) -> SmallClassifier:
    """Train on labelled images, shifted, blurred and noised so that an autoencoder's faults do not matter; on 5,000
    easy `shapes` 12 s on one CPU core, all held-out ones right. `mirror` turns every other image around."""
    if len(images) == 0 or len(images) != len(labels):
        raise ValueError(f"{len(images)} images and {len(labels)} labels: give as many labels as images, at least one")
    if images.dtype != torch.uint8:
        raise ValueError(f"images are {str(images.dtype).removeprefix('torch.')}; give uint8, from 0 to 255")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels from {labels.min()} to {labels.max()}: classes are 0..{num_classes - 1}")

    with torch.random.fork_rng(devices=[]):  # nn.Module draws its weights from the global generator
        torch.manual_seed(seed)
        classifier = SmallClassifier(num_classes, side=side, width=width)
    generator = torch.Generator().manual_seed(seed)
    num_steps = epochs * -(-len(images) // batch_size)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=num_steps, pct_start=0.2)

    classifier.train().to(memory_format=torch.channels_last)
    with tqdm(total=num_steps, desc="classifier", unit="step", leave=False, disable=not progress) as bar:
        for _ in range(epochs):
            for batch in torch.randperm(len(images), generator=generator).split(batch_size):
                x = augment(classifier.preprocess(images[batch]), generator, mirror=mirror)
                x = x.contiguous(memory_format=torch.channels_last)  # up to twice as fast on CPUs
                logits = classifier.to_logits(F.relu(classifier.features(x)))
                loss = F.cross_entropy(logits, labels[batch], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return classifier.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)


def augment(
    pixels: Float[Tensor, "b c h w"], generator: Generator, *, mirror: bool = False
) -> Float[Tensor, "b c h w"]:
    """Shift each image by up to a sixteenth, blur every other one, add noise of a random strength up to 0.1."""
    b, _, h, w = pixels.shape
    reach = h // 16
    padded = F.pad(pixels, [reach] * 4, mode="replicate")
    places = zip(padded, *torch.randint(0, 2 * reach + 1, (2, b), generator=generator).tolist(), strict=True)
    shifted = torch.stack([image[:, top : top + h, left : left + w] for image, top, left in places])
    if mirror:
        as_it_is = rearrange(torch.rand(b, generator=generator) < 0.5, "b -> b 1 1 1")
        shifted = torch.where(as_it_is, shifted, shifted.flip(-1))
    blurred = F.avg_pool2d(F.pad(shifted, [1] * 4, mode="replicate"), kernel_size=3, stride=1)
    sharp = rearrange(torch.rand(b, generator=generator) < 0.5, "b -> b 1 1 1")
    strength = 0.1 * rearrange(torch.rand(b, generator=generator), "b -> b 1 1 1")
    return torch.where(sharp, shifted, blurred) + strength * torch.randn(shifted.shape, generator=generator)


class _StageFeatures(nn.Module):
    """The outputs of all stages, each place of norm 1, side by side: their mean squared difference is the sum of the
    stages' mean squared distances, as in LPIPS (Zhang et al. 2018, eq. 1, all channels alike)."""

    def __init__(self, stages: nn.Sequential) -> None:
        super().__init__()
        self.stages = stages
        # A product with it is in float32 whatever autocast made of the stage; a program's own casts are checks.
        self.register_buffer("one", torch.ones(1, 1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        x, features = images / 127.5 - 1, []  # of 0 to 255
        for stage in self.stages:
            x = stage(x)
            num_places = x.shape[-2] * x.shape[-1]
            features.append((F.normalize(self.one * x, dim=1, eps=1e-6) / num_places**0.5).flatten(1))
        joined = torch.cat(features, dim=1)
        return joined * joined.shape[1] ** 0.5


def _stage(c_in: int, c_out: int) -> nn.Sequential:
    halving = [nn.Conv2d(c_in, c_out, kernel_size=3, stride=2, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
    keeping = [nn.Conv2d(c_out, c_out, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
    return nn.Sequential(*halving, *keeping)
