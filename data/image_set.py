"""What every data set offers: images of a split, their classes, and a description that tells them from others."""

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset


class ImageSet(Dataset[tuple[Tensor, int]]):
    """`dataset[i] -> (uint8 [3 h w], label)` of one split; a subclass sets the attributes without a value and reads.
    Caches, checkpoints and scores compare `describe()`: `source_hash` must tell other images from these."""

    split: str  # "train", "test" or "all"
    image_size: tuple[int, int] | None  # height and width; None where each image has its own
    classes: list[str]  # none: an unlabelled set
    labels: Int64[Tensor, " n"]  # 0 where there are no classes
    source_indices: Int64[Tensor, " n"]  # numbers of the images among those of all splits
    source_name: str
    source_hash: str
    crop: str = "none"
    note: str = ""  # how it was understood, in words
    left_out: Mapping[str, Sequence[str]] = MappingProxyType({})  # names by the reason

    @abstractmethod
    def read(self, index: int) -> UInt8[Tensor, "3 h w"]:
        """The image of this number."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image [3 h w] in uint8, and its class (0 where there are none)."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.read(index), int(self.labels[index])

    def describe(self) -> dict[str, Any]:
        """What a cache of these images must agree on."""
        split = f"{self.split}-{hashlib.sha256(self.source_indices.numpy().tobytes()).hexdigest()[:16]}"
        about: dict[str, Any] = {"source": self.source_name, "source_hash": self.source_hash, "split": split}
        about |= {"image_size": list(self.image_size or ()), "crop": self.crop}
        return {**about, "classes": self.classes, "num_images": len(self)}

    def num_enlarged(self) -> int:
        return 0
