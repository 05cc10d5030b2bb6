"""The interface of all data sets."""

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset


class ImageSet(Dataset[tuple[Tensor, int]]):
    """The images of one split: `dataset[i] -> (uint8 [3 h w], label)`.

    A subclass implements `read` and sets the attributes without a default. Caches, checkpoints and scores compare
    `describe()`, so `source_hash` must depend on the images' content.
    """

    split: str  # "train", "test" or "all"
    image_size: tuple[int, int] | None  # height and width; None if images have different sizes
    classes: list[str]  # names; empty if unlabelled
    labels: Int64[Tensor, " n"]  # 0 if unlabelled
    source_indices: Int64[Tensor, " n"]  # positions among the images of all splits
    source_name: str
    source_hash: str
    crop: str = "none"
    note: str = ""  # how the files were interpreted, for the first line of a training
    left_out: Mapping[str, Sequence[str]] = MappingProxyType({})  # names by reason

    @abstractmethod
    def read(self, index: int) -> UInt8[Tensor, "3 h w"]:
        """Decode the image of an index."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.read(index), int(self.labels[index])

    def describe(self) -> dict[str, Any]:
        """Describe the images; a cache is only used for images with the same description."""
        split = f"{self.split}-{hashlib.sha256(self.source_indices.numpy().tobytes()).hexdigest()[:16]}"
        about: dict[str, Any] = {"source": self.source_name, "source_hash": self.source_hash, "split": split}
        about |= {"image_size": list(self.image_size or ()), "crop": self.crop}
        return {**about, "classes": self.classes, "num_images": len(self)}

    def num_enlarged(self) -> int:
        """Number of images that are enlarged to `image_size`."""
        return 0

    def num_other_colors(self) -> int:
        """Number of images with a colour profile that is not applied, though it is not that of sRGB."""
        return 0
