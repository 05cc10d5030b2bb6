"""The sets of images that `evaluate.py` can score, each with what is needed to make it again."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from data import open_dataset
from experiment.build import open_split
from experiment.checkpoint import Checkpoint
from experiment.config import DataConfig
from experiment.generation import balanced_labels, generate
from models.autoencoder import create_codec

Images = tuple[Any, dict[str, object]]  # a dataset or uint8 [n 3 h w], and its provenance


def override_sampling(checkpoint: Checkpoint, flags):
    """The checkpoint's sampling configuration with the flags that were given; unguided where there are no classes."""
    given = {
        name: getattr(flags, name)
        for name in ("sampler", "num_steps", "guidance_scale", "eta")
        if getattr(flags, name) is not None
    }
    unguided = {} if checkpoint.classes else {"guidance_scale": 1.0}
    return replace(checkpoint.config.sampling, **{**unguided, **given})


def draw_samples(checkpoint: Checkpoint, config, data: DataConfig, num: int, accelerator: Accelerator) -> Images:
    """Samples of a checkpoint's averaged weights, classes balanced."""
    sampling = override_sampling(checkpoint, config)
    codec = create_codec(config.autoencoder or checkpoint.config.autoencoder).to(accelerator.device)
    images = generate(
        checkpoint.load_model(accelerator.device),
        checkpoint.build_process(),
        codec,
        balanced_labels(num, len(checkpoint.classes)),
        sampling,
        image_size=checkpoint.image_size,
        seed=config.seed,
        batch_size=config.batch_size,
        accelerator=accelerator,
    )
    return images, {
        "kind": "checkpoint",
        "checkpoint": checkpoint.path.as_posix(),
        "model": checkpoint.spec.name,
        "step": checkpoint.step,
        "trained_at_commit": checkpoint.commit,
        "weights": "ema",
        "labels": "balanced",
        "seed": config.seed,
        "autoencoder": codec.identity,
        **asdict(sampling),
    }


def read_samples(path: str, image_size: int, num: int | None) -> Images:
    """A folder or zip of images, or `arr_0` [n h w 3] of an npz (ADM's format).

    Raises:
        ValueError: when the file is neither, or its images have another size than the reference's.
    """
    if Path(path).suffix != ".npz":
        dataset = open_dataset(path, split="all", image_size=image_size)
        return dataset, {"kind": "folder", **dataset.describe(), "classes": len(dataset.classes)}
    try:
        with np.load(path, allow_pickle=False) as file:
            array = file["arr_0"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--samples {path}: not an npz with images in arr_0 ({error})") from error
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1:] != (image_size, image_size, 3):
        raise ValueError(
            f"--samples {path}: arr_0 is {array.dtype} {list(array.shape)}, the reference needs uint8 "
            f"[n, {image_size}, {image_size}, 3]"
        )
    images = torch.from_numpy(array[:num]).permute(0, 3, 1, 2).contiguous()
    return images, {"kind": "npz", "path": path, "num_images": len(images)}


def training_images(checkpoint, config, data: DataConfig, num: int, accelerator: Accelerator) -> Images:
    """The floor: real training images, evenly spread, against the held-out ones."""
    dataset = open_split(data, "train")
    index = torch.linspace(0, len(dataset) - 1, min(num, len(dataset))).long().tolist()
    subset = torch.utils.data.Subset(dataset, index)
    return subset, {"kind": "training images", **dataset.describe(), "classes": len(dataset.classes)}


def reconstructions(checkpoint, config, data: DataConfig, num: int, accelerator: Accelerator) -> Images:
    """The ceiling: what the autoencoder makes of the held-out images themselves."""
    name = config.autoencoder or (checkpoint.config.autoencoder if checkpoint else "embedded")
    codec = create_codec(name).to(accelerator.device)
    dataset = open_split(data, "test")
    images: list[Tensor] = []
    for start in range(0, min(num, len(dataset)), config.batch_size):
        stop = min(start + config.batch_size, num, len(dataset))
        batch = torch.stack([dataset[i][0] for i in range(start, stop)])
        images.append(codec.decode(codec.encode(batch.to(accelerator.device))).cpu())
    return torch.cat(images), {"kind": "reconstructions", "autoencoder": codec.identity}


KINDS = {"train": training_images, "reconstructions": reconstructions}
