"""Images from a folder, a zip of one, or tar shards, read in place."""

import hashlib
import math
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from data.duplicates import near_duplicates
from data.files import NAMES, Tars, content_hash, open_files
from data.image_set import ImageSet
from data.layout import DataError, Layout, understand
from data.pixels import fit, open_image, to_rgb
from data.tars import understand_tars
from settings import check_name

T = TypeVar("T")
_NEAR_DUPLICATES: dict[str, dict[str, str]] = {}  # by the images' hash: both splits ask for them


class ImageDataset(ImageSet):
    """`dataset[i] -> (uint8 [3 h w], label)` over a tree of images or a zip of one, understood by `data.layout`,
    or over tar shards (`data.tars`).

    Where the tree has no split of its own, `test_fraction` of each class is held out, a function of `split_seed` and
    names alone. Images are fitted to `image_size` (side, or height and width); None keeps each as it is. Without
    `use_labels` the set is unlabelled, as where there are no class folders, and its split the same as with.
    """

    crop = "center, upright"

    def __init__(
        self,
        path: str | Path,
        *,
        split: str = "all",
        image_size: int | tuple[int, int] | None = None,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        classes: Sequence[str] = (),
        exclude_classes: Sequence[str] = (),
        on_error: str = "stop",
        min_size: int = 0,
        use_labels: bool = True,
        group_near_duplicates: bool = False,
    ) -> None:
        check_name("split", split, ("train", "test", "all"))
        self.source = open_files(Path(path))
        self.source_name, self.split = self.source.path.name, split
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else image_size

        try:
            layout = self._understand(classes, exclude_classes)
        except DataError as error:
            raise DataError(f"--data.path {path}: {error}") from error
        beside = self.source.beside if isinstance(self.source, Tars) else []
        self.left_out = {"links to what is there already": self.source.repeated, "beside the shards": beside}
        self.left_out |= layout.left_out
        names, found = list(layout.classes), sorted({*layout.classes.values()} - {""})
        if not names:
            raise DataError(f"--data.path {path}: no images in it; give a folder with one for each class{self._less()}")
        composed = {unicodedata.normalize("NFC", name): name for name in found}  # macOS takes names apart
        if len(composed) < len(found):
            twice = next(name for name in found if composed[unicodedata.normalize("NFC", name)] != name)
            raise DataError(f"--data.path {path}: two classes are called {twice}, in two Unicode forms: rename one")

        def known(flag: str, asked: Sequence[str]) -> set[str]:
            asked = [composed.get(unicodedata.normalize("NFC", name), name) for name in asked]
            if unknown := sorted({*asked} - {*found}):
                everything = "'[]' leaves out none" if flag == "exclude_classes" else "null takes all"
                has = f"there are {abridged(found)}; {everything}" if found else "these images have none, leave it out"
                raise DataError(f"--data.{flag} {unknown[0]}: no such class; {has}")
            return {*asked}

        excluded = known("exclude_classes", exclude_classes) | ({*found} - known("classes", classes or found))
        self.classes = [name for name in found if name not in excluded]
        used = {name: label for name, label in layout.classes.items() if label not in excluded}
        self.left_out = {**self.left_out, "of excluded classes": [name for name in names if name not in used]}

        note, held_out = layout.note, set()
        if layout.splits and group_near_duplicates:
            raise DataError(f"--data.group_near_duplicates true: {path} has a split of its own ({note}); leave it out")
        if layout.splits:
            held_out = set(layout.splits["test"])
        elif split != "all":
            groups = self._near_duplicates(used, on_error) if group_near_duplicates else {}
            held_out = hold_out(used, test_fraction, split_seed, groups)
            how = f"split by --data.test_fraction {test_fraction}"
            together = f", {len(groups)} near-duplicates in {len(set(groups.values()))} groups kept together"
            note = ", ".join(filter(None, [note, how + together * group_near_duplicates]))
        untrained = set(self.classes) - {label for name, label in used.items() if name not in held_out}
        if untrained:
            raise DataError(f"--data.path {path}: class '{min(untrained)}' has held-out images and none to train on")
        self.note = note
        chosen = [name for name in used if split == "all" or (name in held_out) == (split == "test")]
        if on_error == "skip":
            chosen = self._keep("damaged", chosen, self._is_readable)
        if min_size:
            chosen = self._keep(f"smaller than {min_size}", chosen, lambda name: min(self._size(name)) >= min_size)
        if not chosen:
            raise DataError(f"--data.path {path}: no images left in the {split} split{self._less()}")
        gone = {*self.classes} - {used[name] for name in chosen} if use_labels and split != "test" else ()
        if gone:  # a class that is asked of the model, and was never shown to it
            raise DataError(
                f"--data.path {path}: class '{min(gone)}' has no images left in the {split} split{self._less()}; "
                f"--data.exclude_classes '[{min(gone)}]'"
            )
        self.names = chosen
        order = {name: position for position, name in enumerate(names)}
        numbered = {name: number for number, name in enumerate(self.classes)}
        self.source_indices = torch.tensor([order[name] for name in chosen])
        self.labels = torch.tensor([numbered.get(used[name], 0) for name in chosen])
        if not use_labels:
            self.classes, self.labels = [], torch.zeros_like(self.labels)
        self.source_hash = content_hash(self.source, [*names, *layout.tables])
        if isinstance(self.source, Tars):  # where no name of an image or a table says its class
            said = "".join(f"{name}:{label}\n" for name, label in layout.classes.items())
            self.source_hash = hashlib.sha256(f"{self.source_hash}\n{said}".encode()).hexdigest()

    def _understand(self, classes: Sequence[str], exclude_classes: Sequence[str]) -> Layout:
        files, chosen = self.source, (classes, exclude_classes)
        if not isinstance(files, Tars):
            return understand(files.names, files.read, *chosen)
        beside = (files.path if files.path.is_dir() else files.path.parent) / NAMES
        class_names = beside.read_text(encoding="utf-8-sig") if beside.is_file() else None
        return understand_tars(files.names, files.read, class_names, *chosen)

    def read(self, index: int) -> UInt8[Tensor, "3 h w"]:
        return self._read(self.names[index])

    def num_enlarged(self) -> int:
        """Images that are smaller than `image_size`, by what their headers say."""
        return sum(min(size) < max(self.image_size or (0,)) for _, size in self.sizes())

    def sizes(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Name, width and height of each image as it lies there, by its header."""
        for name in tqdm(self.names, desc="measuring images", leave=False):
            yield name, self._size(name)

    def _read(self, name: str) -> Tensor:
        pixels = self._of_image(name, lambda image: np.array(fit(to_rgb(image), self.image_size)))
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def _size(self, name: str) -> tuple[int, int]:
        return self._of_image(name, lambda image: image.size)

    def _of_image(self, name: str, read: Callable[[Image.Image], T]) -> T:
        try:
            with open_image(self.source.read(name)) as image:
                return read(image)
        except Exception as error:  # decoders raise whatever damaged bytes lead them to
            reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
            raise DataError(
                f"{self.source.path}: {name} is damaged ({reason}); mend it, or --data.on_error skip"
            ) from error

    def _is_readable(self, name: str) -> bool:
        try:
            self._read(name)
        except DataError:
            return False
        return True

    def _near_duplicates(self, names: Iterable[str], on_error: str) -> dict[str, str]:
        key = content_hash(self.source, list(names))
        if key not in _NEAR_DUPLICATES:
            readable = [name for name in names if on_error == "stop" or self._is_readable(name)]
            _NEAR_DUPLICATES[key] = near_duplicates(readable, lambda name: self._of_image(name, to_rgb))
        return _NEAR_DUPLICATES[key]

    def _keep(self, otherwise: str, names: list[str], fits: Callable[[str], bool]) -> list[str]:
        kept = [name for name in tqdm(names, desc="checking images", leave=False) if fits(name)]
        self.left_out = {**self.left_out, otherwise: sorted({*names} - {*kept})}
        return kept

    def _less(self) -> str:
        words = [f"{len(names)} {why} ({abridged(names, 3)})" for why, names in self.left_out.items() if names]
        return f"; left out: {', '.join(words)}" if words else ""


def hold_out(
    classes: Mapping[str, str], fraction: float, seed: int, group_of: Mapping[str, str] = MappingProxyType({})
) -> set[str]:
    """Names held out: of each class the first `fraction` by a seeded hash; names of one group end on the same side."""
    if not 0 < fraction < 1:
        raise DataError(f"--data.test_fraction {fraction} must lie between 0 and 1")
    members: defaultdict[str, defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, label in classes.items():
        members[label][group_of.get(name, name)].append(name)
    is_held: dict[str, bool] = {}
    for label, groups in members.items():
        num = sum(map(len, groups.values()))
        if num < 2:
            remedy = f"add some, or --data.exclude_classes '[{label}]'" if label else "add some"
            raise DataError(f"class '{label}' has one image, too few to split; {remedy}")
        room = min(num - 1, max(1, math.floor(num * fraction + 0.5)))
        room -= sum(len(names) for group, names in groups.items() if is_held.get(group))
        for group in sorted(groups, key=lambda group: hashlib.sha256(f"{seed}/{group}".encode()).digest()):
            if group not in is_held:
                is_held[group] = len(groups[group]) <= room
                room -= len(groups[group]) * is_held[group]
    return {name for groups in members.values() for group, names in groups.items() if is_held[group] for name in names}


def abridged(names: Sequence[str], at_most: int = 5) -> str:
    """The first few, and how many there are."""
    shown = ", ".join(names[:at_most])
    return shown if len(names) <= at_most else f"{shown}, ... ({len(names)} in all)"
