"""Images from a folder or a zip of one, a class a folder, read in place."""

from __future__ import annotations

import hashlib
import io
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import TypeVar

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

SUFFIXES = frozenset(Image.registered_extensions())
SPLITS = ("train", "test", "all")
T = TypeVar("T")


class DataError(ValueError):
    """Images that cannot be read as asked, in the user's words."""


class ImageDataset(Dataset):
    """`dataset[i] -> (uint8 [3 h w], label)` over a class-per-folder tree, or a zip of one.

    A `train/` and `test/` level above the classes is the split where it exists. Elsewhere `test_fraction` of each
    class is held out: which images, is a function of `split_seed` and their names alone, so it is the same on every
    machine. Images that lie in no class folder make an unlabelled set (`classes == []`).

    `image_size` (side, or height and width): larger or smaller images are cut to the centre rectangle of that
    shape and resized (Lanczos); None keeps each image as it is. Images with a side below `min_size` are left out, and
    counted. Without `use_labels` the set is unlabelled whatever its folders, and its split the same as with.

    Raises:
        DataError: in words, for a path, split or image that does not do.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        split: str = "all",
        image_size: int | tuple[int, int] | None = None,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        exclude_classes: Sequence[str] = (),
        on_error: str = "stop",
        min_size: int = 0,
        use_labels: bool = True,
    ) -> None:
        if split not in SPLITS:
            raise DataError(f"split {split}: unknown, choose from {', '.join(SPLITS)}")
        self.source = _open_source(Path(path))
        self.split, self.crop = split, "center"
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else image_size

        names = sorted(name for name in self.source.names if _is_image(name))
        if not names:
            raise DataError(f"--data.path {path}: no images in it; it should hold a folder of images a class")
        by_split = _group_by_level(names)
        classes = sorted({_class_of(name, by_split is not None) for name in names} - {""})
        unknown = sorted(set(exclude_classes) - set(classes))
        if unknown:
            raise DataError(f"--data.exclude_classes {unknown[0]}: no such class; there are {_abridged(classes)}")
        self.classes = [name for name in classes if name not in exclude_classes]

        numbered = {name: number for number, name in enumerate(self.classes)}
        members: dict[str, list[str]] = {}
        for name in names if by_split is None or split == "all" else by_split[split]:
            members.setdefault(_class_of(name, by_split is not None), []).append(name)
        if by_split is None and split != "all":
            members = {
                label: _hold_out(group, label, split, test_fraction, split_seed)
                for label, group in members.items()
                if label not in exclude_classes
            }
        order = {name: position for position, name in enumerate(names)}
        chosen = sorted(
            (order[name], numbered.get(label, 0))
            for label, group in members.items()
            if not self.classes or label in numbered
            for name in group
        )
        self.skipped: list[str] = []
        if on_error == "skip":
            chosen = self._readable(chosen, names)
        if min_size:
            chosen = self._large_enough(chosen, names, min_size)
        if not chosen:
            raise DataError(f"--data.path {path}: no images left in the {split} split")
        self.names = [names[position] for position, _ in chosen]
        self.source_indices = torch.tensor([position for position, _ in chosen])
        self.labels = torch.tensor([label for _, label in chosen])
        if not use_labels:
            self.classes, self.labels = [], torch.zeros_like(self.labels)
        self.source_hash = self.source.content_hash(names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image [3 h w] in uint8, and its class (0 where there are none)."""
        return self._read(self.names[index]), int(self.labels[index])

    def describe(self) -> dict[str, object]:
        """What a cache of these images must agree on."""
        return {
            "source": self.source.path.name,
            "source_hash": self.source_hash,
            "split": f"{self.split}-{hashlib.sha256(self.source_indices.numpy().tobytes()).hexdigest()[:16]}",
            "image_size": list(self.image_size or ()),
            "crop": self.crop,
            "classes": self.classes,
            "num_images": len(self),
        }

    def _read(self, name: str) -> Tensor:
        return self._of_image(name, lambda image: pil_to_tensor(fit(to_rgb(image), self.image_size)))

    def _of_image(self, name: str, read: Callable[[Image.Image], T]) -> T:
        try:
            with Image.open(io.BytesIO(self.source.read(name))) as image:
                return read(image)
        except (OSError, ValueError, SyntaxError, zipfile.BadZipFile) as error:
            reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
            raise DataError(
                f"{self.source.path}: {name} is damaged ({reason}); mend it, or --data.on_error skip"
            ) from error

    def _readable(self, chosen: list[tuple[int, int]], names: list[str]) -> list[tuple[int, int]]:
        kept = []
        for position, label in tqdm(chosen, desc="checking images", leave=False):
            try:
                self._read(names[position])
                kept.append((position, label))
            except DataError:
                self.skipped.append(names[position])
        if self.skipped:
            print(f"{self.source.path}: skipped {len(self.skipped)} damaged images: {_abridged(self.skipped)}")
        return kept

    def _large_enough(self, chosen: list[tuple[int, int]], names: list[str], min_size: int) -> list[tuple[int, int]]:
        sides = [self._of_image(names[position], lambda image: min(image.size)) for position, _ in chosen]
        small = [names[position] for (position, _), side in zip(chosen, sides, strict=True) if side < min_size]
        if small:
            print(f"{self.source.path}: left out {len(small)} images smaller than {min_size}: {_abridged(small)}")
        return [one for one, side in zip(chosen, sides, strict=True) if side >= min_size]


class _Folder:
    def __init__(self, path: Path) -> None:
        self.path = path
        found = (Path(root) / file for root, _, files in os.walk(path, followlinks=True) for file in files)
        self.names = [file.relative_to(path).as_posix() for file in found]

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def content_hash(self, names: Iterable[str]) -> str:
        digest = hashlib.sha256()
        for name in names:
            digest.update(f"{name}:{hashlib.sha256(self.read(name)).hexdigest()}\n".encode())
        return digest.hexdigest()


class _Zip:
    """A zip, opened anew in each process that reads it: a shared handle would share its file position."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: tuple[int, zipfile.ZipFile] | None = None
        try:
            with zipfile.ZipFile(path) as archive:
                self.entries = {entry.filename: entry for entry in archive.infolist() if not entry.is_dir()}
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(f"--data.path {path}: neither a folder nor a whole zip file ({error})") from error
        self.names = list(self.entries)

    def read(self, name: str) -> bytes:
        if self._handle is None or self._handle[0] != os.getpid():
            self._handle = (os.getpid(), zipfile.ZipFile(self.path))
        return self._handle[1].read(name)

    def content_hash(self, names: Iterable[str]) -> str:
        digest = hashlib.sha256()
        for name in names:
            entry = self.entries[name]
            digest.update(f"{name}:{entry.file_size}:{entry.CRC:08x}\n".encode())
        return digest.hexdigest()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_handle": None}


def _open_source(path: Path) -> _Folder | _Zip:
    if path.is_dir():
        return _Folder(path)
    if path.is_file():
        return _Zip(path)
    raise DataError(f"--data.path {path}: does not exist; give a folder or zip with a class a folder, or 'shapes'")


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return not hidden and path.suffix.lower() in SUFFIXES


def _group_by_level(names: list[str]) -> dict[str, list[str]] | None:
    """Names by `train` and `test`, or None where the tree has no such level."""
    groups = {level: [name for name in names if name.startswith(f"{level}/")] for level in ("train", "test")}
    return groups if all(groups.values()) and sum(map(len, groups.values())) == len(names) else None


def _class_of(name: str, has_level: bool) -> str:
    parts = PurePosixPath(name).parts[1 if has_level else 0 :]
    return "/".join(parts[:-1])


def _hold_out(group: list[str], label: str, split: str, fraction: float, seed: int) -> list[str]:
    """A class's share of a split: names ordered by a seeded hash, the first `fraction` of them held out."""
    if not 0 < fraction < 1:
        raise DataError(f"--data.test_fraction {fraction} must lie between 0 and 1")
    if len(group) < 2:
        raise DataError(
            f"class '{label}' has one image, too few to split; add some, or --data.exclude_classes '[{label}]'"
        )
    ordered = sorted(group, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    num_test = min(len(group) - 1, max(1, math.floor(len(group) * fraction + 0.5)))
    return ordered[:num_test] if split == "test" else ordered[num_test:]


def to_rgb(image: Image.Image) -> Image.Image:
    """Three 8-bit channels; transparency lies on white, 16-bit grey is scaled."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = image.point(lambda value: value / 257).convert("L")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers)
    return image.convert("RGB")


def fit(image: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    """The centre rectangle of the shape of `size` (height, width), resized to it (Lanczos)."""
    if size is None or image.size == (size[1], size[0]):
        return image
    height, width = size
    scale = min(image.width / width, image.height / height)
    crop_width, crop_height = width * scale, height * scale
    left, top = (image.width - crop_width) / 2, (image.height - crop_height) / 2
    box = (left, top, left + crop_width, top + crop_height)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def _abridged(names: Sequence[str], at_most: int = 5) -> str:
    shown = ", ".join(names[:at_most])
    return shown if len(names) <= at_most else f"{shown}, ... ({len(names)} in all)"
