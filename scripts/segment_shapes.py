"""Test in a few minutes whether a backbone learns at all, by training it for segmentation.

python scripts/segment_shapes.py
python scripts/segment_shapes.py --models '[XSwin, USwin, UNet]' --difficulty medium --num_steps 2000

XSwin without time and labels (`conditioning=none`) is a dense predictor with any number of channels. The procedural
shapes have exact masks, which assign each pixel to the background or to one of ten classes. The baseline is the U-Net
with a constant time of 0.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiment.cli import run_main
from settings import within, writes

SWIN = {"dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 2, "num_global_blocks": 2}
SWIN |= {"conditioning": "none", "conv_norm": "group", "drop_path": 0.0}
UNET = {"channels": [16, 32, 64, 96], "down": ["R", "R", "RA"], "middle_channels": [96], "middle": ["AR"]}
UNET |= {"up": ["RA", "R", "R"], "time_dim": 32}
BATCH_SIZE = 16
MODELS: dict[str, tuple[str, Any]] = {"XSwin": ("XSwin", SWIN), "USwin": ("USwin", SWIN), "UNet": ("UNet-Mini", UNET)}
COLORS = [(235, 235, 235), (68, 119, 170), (238, 102, 119), (34, 136, 51), (204, 187, 68), (102, 204, 238)]
COLORS += [(170, 51, 119), (136, 136, 136), (204, 136, 0), (102, 85, 204), (153, 102, 51)]


@dataclass(frozen=True)
class SegmentConfig:
    """Train each model to segment the shapes, and print its scores on held-out ones.

    Args:
        models: names among XSwin, USwin and UNet
        difficulty: difficulty of the shapes
        image_size: side in pixels
        num_steps: optimizer steps of each model
        output: picture of held-out images, their masks and the predictions of each model
    """

    models: list[str] = field(default_factory=lambda: ["XSwin", "UNet"])
    difficulty: Literal["easy", "medium", "hard"] = "easy"
    image_size: int = within("[1, inf)", 32)
    num_steps: int = within("[1, inf)", 500)
    output: Path = writes(".png .pdf", Path("runs/segmentation.png"))

    def check(self, prefix: str) -> None:
        for name in self.models:
            if name not in MODELS:
                raise ValueError(f"{prefix}models {name}: choose from {', '.join(MODELS)}")


def main(config: SegmentConfig) -> None:
    """Train each model, and compare their predictions on the same held-out images."""
    import torch

    from data.shapes import ShapesDataset
    from evaluation.table import terminal
    from models import create_model
    from sampling.grids import save_grid

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options: Any = {"image_size": config.image_size, "difficulty": config.difficulty}
    train, held_out = (ShapesDataset(4000, split=split, **options) for split in ("train", "test"))
    images, masks = (part.to(device) for part in segmentation(held_out, range(len(held_out) // 2)))
    num_classes = 1 + len(train.classes)

    rows, pictures = [["model", "parameters", "img/s", "IoU of the shape", "mean IoU of the classes"]], []
    for name in config.models:
        backbone, args = MODELS[name]
        torch.manual_seed(0)
        shape = {"input_size": config.image_size, "in_channels": 3, "out_channels": num_classes, "num_classes": 0}
        model = create_model(backbone, **shape, **args).to(device)
        start = time.perf_counter()
        fit(model, train, device, config.num_steps)
        speed = config.num_steps * BATCH_SIZE / (time.perf_counter() - start)
        with torch.no_grad():
            logits = [call(model.eval(), part) for part in images.split(100)]
        predicted = torch.cat(logits).argmax(dim=1)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        shape_iou, mean_iou = scores(predicted, masks, num_classes)
        rows.append([name, f"{parameters / 1e6:.2f}M", f"{speed:.0f}", f"{shape_iou:.3f}", f"{mean_iou:.3f}"])
        pictures.append(predicted)

    palette = torch.tensor(COLORS, dtype=torch.uint8)
    grid = [images[:10].cpu().mul(127.5).add(127.5).byte()]
    grid += [palette[labels[:10].cpu()].permute(0, 3, 1, 2) for labels in (masks, *pictures)]
    captions = [name for name in ("image", "mask", *config.models) for _ in range(10)]
    save_grid(torch.cat(grid), config.output, columns=10, captions=captions, keep=True)
    print(terminal(rows))
    print(f"{len(masks)} held-out images; picture: {config.output}")


def segmentation(shapes: Any, indices: Any) -> tuple[Any, Any]:
    """Images in [-1, 1], and masks with 0 for the background and 1 + class for the shape."""
    import torch

    images = torch.stack([shapes[index][0] for index in indices]).float() / 127.5 - 1
    masks = torch.stack([shapes.mask(index) * (1 + int(shapes.labels[index])) for index in indices])
    return images, masks


def call(model: Any, images: Any) -> Any:
    """Logits [n classes h w] of the backbone at time 0, without labels."""
    zeros = images.new_zeros(len(images)).long()
    return model(images, zeros, zeros)


def fit(model: Any, shapes: Any, device: Any, num_steps: int) -> None:
    """Train with the cross entropy of each pixel and AdamW, with 20 steps of warm-up and cosine decay."""
    import torch
    from tqdm import tqdm

    from experiment.config import OptimConfig
    from training.optimizer import learning_rate

    config = OptimConfig(lr=2e-3, warmup_steps=20, decay="cosine")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for step in tqdm(range(num_steps), desc=type(model).__name__, leave=False, mininterval=5):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, num_steps)
        indices = torch.randint(len(shapes), (BATCH_SIZE,), generator=generator).tolist()
        images, masks = (part.to(device) for part in segmentation(shapes, indices))
        torch.nn.functional.cross_entropy(call(model, images), masks).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def scores(predicted: Any, masks: Any, num_classes: int) -> tuple[float, float]:
    """Intersection over union of shapes regardless of their class, and its mean over classes."""

    def iou(a: Any, b: Any) -> float:
        return ((a & b).sum() / (a | b).sum().clamp(min=1)).item()

    classes = [iou(predicted == label, masks == label) for label in range(1, num_classes)]
    return iou(predicted > 0, masks > 0), sum(classes) / len(classes)


if __name__ == "__main__":
    run_main(main, SegmentConfig)
