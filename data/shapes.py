"""`shapes`: a procedural data set of anti-aliased coloured shapes on a background, in ten classes and any size.

Image `i` is a function of (seed, i) only. Each shape is a signed distance function, negative inside; clamping the
distance over one pixel anti-aliases the edges.
"""

import colorsys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from data.image_set import ImageSet
from settings import check_name

Field = np.ndarray  # [h w], a signed distance in units of the shape's radius
MOST_IMAGES = 10**8


@dataclass(frozen=True)
class Difficulty:
    """Ranges of the random properties of an image. Lengths are fractions of the image's side, angles are in turns."""

    num_hues: int | None  # of the shape; None for any colour
    radius: tuple[float, float]
    jitter: float  # largest shift of the centre
    rotation: float  # largest angle in either direction
    num_grounds: int  # 1 for light backgrounds, 2 for light and dark ones
    ground_contrast: float  # 0 for plain backgrounds, up to 1 for any colour with a gradient
    texture: float  # standard deviation of the background's noise, in [0, 1]


DIFFICULTIES = {
    "easy": Difficulty(3, (0.34, 0.36), 0.01, 0.0, 1, 0.0, 0.0),
    "medium": Difficulty(8, (0.24, 0.36), 0.08, 0.06, 2, 0.3, 0.0),
    "hard": Difficulty(None, (0.16, 0.38), 0.14, 0.5, 2, 1.0, 0.04),
}


class ShapesDataset(ImageSet):
    """Shapes: `num_images` in the training split; the next fifth as many are the test split."""

    source_name = "shapes"

    def __init__(
        self,
        num_images: int = 5000,
        *,
        split: str = "train",
        image_size: int = 64,
        difficulty: str = "easy",
        seed: int = 0,
        use_labels: bool = True,
    ) -> None:
        check_name("--data.difficulty", difficulty, DIFFICULTIES)
        if not len(SHAPES) <= num_images <= MOST_IMAGES:
            raise ValueError(f"--data.num_images {num_images}: must lie in {len(SHAPES)}..{MOST_IMAGES}, one a class")
        num_test = max(len(SHAPES), num_images // 5)
        ranges = {"train": (0, num_images), "test": (num_images, num_test), "all": (0, num_images + num_test)}
        check_name("split", split, ranges)
        self.first, num_images = ranges[split]
        self.split, self.side, self.difficulty, self.seed = split, image_size, difficulty, seed
        self.image_size = (image_size, image_size)
        self.note = f"difficulty {difficulty}"
        self.classes = list(SHAPES) if use_labels else []
        self.source_indices = torch.arange(self.first, self.first + num_images)
        self.labels = self.source_indices % max(1, len(self.classes))
        self.source_hash = f"shapes-v2-{difficulty}-seed{seed}-{asdict(DIFFICULTIES[difficulty])}"

    def read(self, index: int) -> UInt8[Tensor, "3 h w"]:
        return torch.from_numpy(draw_shape(*self._recipe(index)))

    def mask(self, index: int) -> Tensor:
        """Segmentation mask [h w]: True for pixels whose centre lies inside the shape."""
        return torch.from_numpy(draw_coverage(*self._recipe(index)) > 0.5)

    def _recipe(self, index: int) -> tuple[str, int, Difficulty, np.random.Generator]:
        number = self.first + index
        shape = list(SHAPES)[number % len(SHAPES)]
        return shape, self.side, DIFFICULTIES[self.difficulty], np.random.default_rng([self.seed, number])

    def describe(self) -> dict[str, Any]:
        """Describe the images, the split in the format of existing caches."""
        return {**super().describe(), "split": f"{self.split} of {len(self)} from {self.first}"}


def draw_shape(name: str, size: int, difficulty: Difficulty, rng: np.random.Generator) -> np.ndarray:
    """Render an image, uint8 [3 size size]."""
    coverage = draw_coverage(name, size, difficulty, rng)
    ground = _draw_ground(size, difficulty, rng)
    color = _draw_color(difficulty, rng, away_from=ground.mean(axis=(1, 2)))
    image = ground + coverage * (color[:, None, None] - ground)
    return np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)


def draw_coverage(name: str, size: int, difficulty: Difficulty, rng: np.random.Generator) -> np.ndarray:
    """Fraction of each pixel that the shape covers, in [0, 1], [size size]."""
    radius = rng.uniform(*difficulty.radius)
    center = 0.5 + rng.uniform(-difficulty.jitter, difficulty.jitter, 2)
    angle = 2 * np.pi * rng.uniform(-difficulty.rotation, difficulty.rotation)
    pixel = (np.arange(size) + 0.5) / size
    x, y = np.meshgrid(pixel - center[0], pixel - center[1])
    u = (np.cos(angle) * x + np.sin(angle) * y) / radius
    v = (-np.sin(angle) * x + np.cos(angle) * y) / radius
    return np.clip(0.5 - SHAPES[name](u, v) * radius * size, 0, 1)


def _draw_ground(size: int, difficulty: Difficulty, rng: np.random.Generator) -> np.ndarray:
    plain = np.full(3, rng.choice([0.94, 0.08][: difficulty.num_grounds]))
    colored = plain + difficulty.ground_contrast * (rng.uniform(0, 1, 3) - plain)
    slope = difficulty.ground_contrast * rng.uniform(-0.15, 0.15, (3, 2))
    ramp = np.linspace(-1, 1, size)
    ground = colored[:, None, None] + slope[:, :1, None] * ramp[:, None] + slope[:, 1:, None] * ramp
    return ground + difficulty.texture * rng.standard_normal((1, size, size))


def _draw_color(difficulty: Difficulty, rng: np.random.Generator, away_from: np.ndarray) -> np.ndarray:
    for _ in range(20):
        if difficulty.num_hues is None:
            color = rng.uniform(0, 1, 3)
        else:
            hue = rng.integers(difficulty.num_hues) / difficulty.num_hues
            color = np.array(colorsys.hsv_to_rgb(hue, 0.85, 0.85))
        if np.abs(color - away_from).max() > 0.45:
            break
    return color


def _triangle(u: Field, v: Field) -> Field:
    u, v = u / 1.15, (v - 0.25) / 1.15
    normals = 2 * np.pi * (np.arange(3) + 0.5) / 3
    sides = [np.sin(angle) * u - np.cos(angle) * v for angle in normals]
    return 1.15 * (np.maximum.reduce(sides) - np.cos(np.pi / 3))


def _star(u: Field, v: Field) -> Field:
    """Five points: each tenth of a turn is bounded by the straight line from a tip to a notch."""
    turn = 2 * np.pi / 5
    angle = np.abs((np.arctan2(u, -v) + turn / 2) % turn - turn / 2)
    along, across = np.hypot(u, v) * np.cos(angle), np.hypot(u, v) * np.sin(angle)
    tip, notch = np.array([1.05, 0.0]), 0.42 * np.array([np.cos(turn / 2), np.sin(turn / 2)])
    edge = (notch - tip) / np.linalg.norm(notch - tip)
    return (along - tip[0]) * edge[1] - (across - tip[1]) * edge[0]


def _heart(u: Field, v: Field) -> Field:
    """Two discs above the lower half of a square that stands on its corner (Quilez, 2-D distance functions)."""
    x, y = np.abs(u) / 1.75, (0.85 - v) / 1.75
    disc = np.hypot(x - 0.25, y - 0.75) - np.sqrt(2) / 4
    fold = np.maximum(x + y, 0) / 2
    body = np.minimum(np.hypot(x, y - 1), np.hypot(x - fold, y - fold)) * np.sign(x - y)
    return 1.75 * np.where(x + y > 1, disc, body)


def _cross(u: Field, v: Field) -> Field:
    a, b = np.maximum(np.abs(u), np.abs(v)), np.minimum(np.abs(u), np.abs(v))
    return np.maximum(a - 0.95, b - 0.3)


def _arrow(u: Field, v: Field) -> Field:
    """A shaft and a head, pointing right."""
    shaft = np.maximum(np.abs(u + 0.4) - 0.6, np.abs(v) - 0.24)
    head = np.maximum(-u, (u + np.abs(v) - 1.0) / np.sqrt(2))
    head = np.maximum(head, np.abs(v) - 0.8)
    return np.minimum(shaft, head)


def _stripes(u: Field, v: Field) -> Field:
    """Three horizontal bars, one above the other."""
    bars = np.abs((v + 0.9) % 0.72 - 0.18) - 0.18
    return np.maximum.reduce([bars, np.abs(u) - 0.9, np.abs(v) - 0.9])


SHAPES: dict[str, Callable[[Field, Field], Field]] = {
    "circle": lambda u, v: np.hypot(u, v) - 0.95,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.82,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "cross": _cross,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.73) - 0.24,
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 0.95, 0.78 - np.hypot(u - 0.45, v)),
    "arrow": _arrow,
    "stripes": _stripes,
}
