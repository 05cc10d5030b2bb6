"""Data sets of image files in a folder, a zip or tar shards, read in place."""

import hashlib
import json
import math
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from data.duplicates import near_duplicates
from data.files import NAMES, Folder, Tars, Zip, content_hash, remember
from data.image_set import ImageSet
from data.layout import DataError, Layout, infer_layout, join_abridged
from data.parquet import Parquets, Place, UnreachableError, open_hub
from data.pixels import SUFFIXES, fit, has_converted_transparency, has_other_colors, open_image, to_rgb
from data.tars import infer_tar_layout
from machine.hugging_face import SCHEME
from settings import check_name

T = TypeVar("T")
_NEAR_DUPLICATES: dict[str, dict[str, str]] = {}  # by the images' hash, computed once for both splits


class ImageDataset(ImageSet):
    """A split (train, test or all) of the images in a folder or a zip (`data.layout`), in tar shards (`data.tars`), or
    in parquet shards, on the disk or on the hub (`data.parquet`).

    The settings are those of `experiment.config.DataConfig`. Without an `image_size`, images keep their own.
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
        train_fraction: float = 1.0,
        classes: Sequence[str] = (),
        exclude_classes: Sequence[str] = (),
        on_error: str = "stop",
        min_size: int = 0,
        use_labels: bool = True,
        group_near_duplicates: bool = False,
        label_column: str | None = None,
    ) -> None:
        check_name("split", split, ("train", "test", "all"))
        self.source, self._flag = open_files(path, label_column), f"--data.path {path}"
        self.source_name, self.split = self.source.path.name, split
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else image_size

        layout = self._infer_layout(classes, exclude_classes)
        label_of = self._select_classes(layout, classes, exclude_classes)
        if layout.splits and group_near_duplicates:
            has = f"{path} has a split of its own ({layout.note})"
            raise DataError(f"--data.group_near_duplicates true: {has}; leave it out")
        grouped = group_near_duplicates and split != "all"
        groups = self._near_duplicates(label_of, on_error) if grouped else None
        in_split = self._select_split(layout, label_of, test_fraction, split_seed, groups)
        if split == "train" and train_fraction < 1:
            in_split = self._select_fraction(in_split, label_of, train_fraction, split_seed)
        self.names = self._drop_unusable(in_split, on_error, min_size)

        if not use_labels:
            self.classes = []
        elif split != "test":
            self._refuse_empty_classes({label_of[name] for name in self.names})
        labels = {name: label for label, name in enumerate(self.classes)}
        numbers = {name: number for number, name in enumerate(layout.classes)}
        self.labels = torch.tensor([labels.get(label_of[name], 0) for name in self.names])
        self.source_indices = torch.tensor([numbers[name] for name in self.names])
        self.source_hash = self._hash(layout)
        # Here rather than when it is needed, because one process opens the images for all.
        self._has_converted_transparency = self._find_converted_transparency()

    def _infer_layout(self, classes: Sequence[str], exclude_classes: Sequence[str]) -> Layout:
        files, beside = self.source, []
        try:
            if isinstance(files, Tars):
                beside, table = files.beside, (files.path if files.path.is_dir() else files.path.parent) / NAMES
                class_names = table.read_text(encoding="utf-8-sig") if table.is_file() else None
                layout = infer_tar_layout(files.names, files.read, class_names, classes, exclude_classes)
            elif isinstance(files, Parquets):
                layout, beside = files.infer_layout(), files.beside
            else:
                layout = infer_layout(files.names, files.read, classes, exclude_classes)
        except DataError as error:
            raise DataError(f"{self._flag}: {error}") from error
        ignored = {"links to what is there already": files.repeated, "beside the shards": beside}
        self.left_out = ignored | layout.left_out
        if not layout.classes:
            raise DataError(f"{self._flag}: no images in it; give a folder with one for each class{self._exclusions()}")
        return layout

    def _select_classes(self, layout: Layout, classes: Sequence[str], exclude_classes: Sequence[str]) -> dict[str, str]:
        """Set `self.classes` to the selected classes, and return the class of each of their images."""
        available = sorted({*layout.classes.values()} - {""})
        composed = {unicodedata.normalize("NFC", name): name for name in available}  # macOS decomposes file names
        if len(composed) < len(available):
            twice = next(name for name in available if composed[unicodedata.normalize("NFC", name)] != name)
            raise DataError(f"{self._flag}: two classes are called {twice}, in two Unicode forms: rename one")

        def check(flag: str, names: Sequence[str], default: str) -> set[str]:
            names = [composed.get(unicodedata.normalize("NFC", name), name) for name in names]
            if unknown := sorted({*names} - {*available}):
                remedy = "these images have none, leave it out"
                if available:
                    remedy = f"there are {join_abridged(available)}; {default}"
                raise DataError(f"--data.{flag} {unknown[0]}: no such class; {remedy}")
            return {*names}

        excluded = check("exclude_classes", exclude_classes, "'[]' leaves out none")
        excluded |= {*available} - check("classes", classes or available, "null takes all")
        self.classes = [name for name in available if name not in excluded]
        self._leave_out("of excluded classes", [name for name, label in layout.classes.items() if label in excluded])
        return {name: label for name, label in layout.classes.items() if label not in excluded}

    def _select_split(
        self,
        layout: Layout,
        label_of: Mapping[str, str],
        test_fraction: float,
        split_seed: int,
        groups: Mapping[str, str] | None,
    ) -> list[str]:
        """Select the images of the split: the files' own, or held out by a hash of names, duplicates as a group."""
        held_out, self.note = {*(layout.splits or {}).get("test", ())}, layout.note
        if not layout.splits and self.split != "all":
            held_out = hold_out(label_of, test_fraction, split_seed, groups or {})
            notes = [self.note, f"split by --data.test_fraction {test_fraction}"]
            if groups is not None:
                num_groups = len({*groups.values()})
                notes.append(f"{len(groups)} near-duplicates in {num_groups} groups kept together")
            self.note = ", ".join(filter(None, notes))
        if untrained := {*self.classes} - {label for name, label in label_of.items() if name not in held_out}:
            raise DataError(f"{self._flag}: class '{min(untrained)}' has held-out images and none to train on")
        return [name for name in label_of if self.split == "all" or (name in held_out) == (self.split == "test")]

    def _select_fraction(self, names: list[str], label_of: Mapping[str, str], fraction: float, seed: int) -> list[str]:
        """Select a fraction of each class, at least one image: the last ones in the order by which `hold_out` takes the
        first, so that smaller fractions are subsets of larger ones."""
        by_class: defaultdict[str, list[str]] = defaultdict(list)
        for name in names:
            by_class[label_of[name]].append(name)
        selected: set[str] = set()
        for members in by_class.values():
            count = max(1, math.floor(len(members) * fraction + 0.5))
            selected |= {*sorted(members, key=partial(_seeded_hash, seed), reverse=True)[:count]}
        self.note = ", ".join(filter(None, [self.note, f"--data.train_fraction {fraction} of the training images"]))
        return [name for name in names if name in selected]

    def _drop_unusable(self, names: list[str], on_error: str, min_size: int) -> list[str]:
        if on_error == "skip":
            names = self._filter(names, self._is_readable, "damaged")
        if min_size:
            names = self._filter(names, lambda name: min(self._size(name)) >= min_size, f"smaller than {min_size}")
        if not names:
            raise DataError(f"{self._flag}: no images left in the {self.split} split{self._exclusions()}")
        return names

    def _refuse_empty_classes(self, remaining: set[str]) -> None:
        """Raise `DataError` for a class without images, as the model could not learn it."""
        if empty := {*self.classes} - remaining:
            raise DataError(
                f"{self._flag}: class '{min(empty)}' has no images left in the {self.split} split{self._exclusions()}; "
                f"--data.exclude_classes '[{min(empty)}]'"
            )

    def _hash(self, layout: Layout) -> str:
        files = content_hash(self.source, [*layout.classes, *layout.tables])
        if not isinstance(self.source, Tars | Parquets):
            return files
        # Shards may hold labels in other files or columns than the first hash covers.
        labels = "".join(f"{name}:{label}\n" for name, label in layout.classes.items())
        return hashlib.sha256(f"{files}\n{labels}".encode()).hexdigest()

    def read(self, index: int) -> UInt8[Tensor, "3 h w"]:
        return self._decode_pixels(self.names[index])

    def describe(self) -> dict[str, Any]:
        """Describe the images; those of earlier caches with other pixels (`has_converted_transparency`) as others."""
        return {**super().describe(), **({"transparency": "of any bits"} if self._has_converted_transparency else {})}

    def _find_converted_transparency(self) -> bool:
        pngs = [] if isinstance(self.source, Parquets) else [n for n in self.names if n.lower().endswith(".png")]

        def is_converted(name: str) -> bool:
            with suppress(Exception):  # a damaged file is reported where it is decoded
                return has_converted_transparency(self.source.read(name))
            return False

        def compute() -> tuple[str, bool]:
            return ("converted" if any(map(is_converted, pngs)) else "none"), True

        key = hashlib.sha256(f"transparency {json.dumps(super().describe())}".encode()).hexdigest()
        return bool(pngs) and remember(key, compute, pattern="converted|none") == "converted"

    def num_enlarged(self) -> int:
        """Count images smaller than `image_size`, by their headers; 0 on the hub, as that would fetch them all."""
        return self._counts_by_headers()[0]

    def num_other_colors(self) -> int:
        """Count images whose colour profile is not that of sRGB, by their headers; 0 on the hub."""
        return self._counts_by_headers()[1]

    def _counts_by_headers(self) -> tuple[int, int]:
        if isinstance(self.source, Parquets) and self.source.is_remote:
            return 0, 0

        def compute() -> tuple[str, bool]:
            num_enlarged = num_other = 0
            for name in tqdm(self.names, desc="measuring images", leave=False):
                size, has_others = self._decode(name, lambda image: (image.size, has_other_colors(image)))
                num_enlarged += min(size) < max(self.image_size or (0,))
                num_other += has_others
            return f"{num_enlarged} enlarged, {num_other} of other colours", True

        key = hashlib.sha256(json.dumps(self.describe()).encode()).hexdigest()
        words = remember(key, compute, pattern="[0-9]+ enlarged, [0-9]+ of other colours").split()
        return int(words[0]), int(words[2])

    def sizes(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield the name and the original (width, height) of each image, from its header."""
        for name in tqdm(self.names, desc="measuring images", leave=False):
            yield name, self._size(name)

    def _decode_pixels(self, name: str) -> Tensor:
        pixels = self._decode(name, lambda image: np.array(fit(to_rgb(image), self.image_size)))
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def _size(self, name: str) -> tuple[int, int]:
        return self._decode(name, lambda image: image.size)

    def _decode(self, name: str, read: Callable[[Image.Image], T]) -> T:
        try:
            with open_image(self.source.read(name)) as image:
                return read(image)
        except UnreachableError:
            raise
        except Exception as error:  # decoders raise all kinds of errors at damaged bytes
            reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
            raise DataError(f"{self._flag}: {name} is damaged ({reason}); fix it, or --data.on_error skip") from error

    def _is_readable(self, name: str) -> bool:
        try:
            self._decode_pixels(name)
        except UnreachableError:
            raise
        except DataError:
            return False
        return True

    def _near_duplicates(self, names: Iterable[str], on_error: str) -> dict[str, str]:
        key = content_hash(self.source, list(names))
        if key not in _NEAR_DUPLICATES:
            readable = [name for name in names if on_error == "stop" or self._is_readable(name)]
            _NEAR_DUPLICATES[key] = near_duplicates(readable, lambda name: self._decode(name, to_rgb))
        return _NEAR_DUPLICATES[key]

    def _filter(self, names: list[str], accept: Callable[[str], bool], reason: str) -> list[str]:
        """Keep accepted names; record the others as left out for `reason`."""
        accepted = [name for name in tqdm(names, desc="checking images", leave=False) if accept(name)]
        self._leave_out(reason, sorted({*names} - {*accepted}))
        return accepted

    def _leave_out(self, reason: str, names: Sequence[str]) -> None:
        self.left_out = {**self.left_out, reason: names}

    def _exclusions(self) -> str:
        """List what was left out, to end an error message."""
        parts = [
            f"{len(names)} {reason} ({join_abridged(names, 3)})" for reason, names in self.left_out.items() if names
        ]
        return f"; left out: {', '.join(parts)}" if parts else ""


def open_files(path: str | Path, label_column: str | None = None) -> Folder | Zip | Tars | Parquets:
    """Open a folder, a zip, tar or parquet shards, or a data set of the hub; images in a folder go before shards."""
    files = _open_files(path, label_column)
    if label_column is not None and not isinstance(files, Parquets):
        raise DataError(f"--data.label_column {label_column}: {path} holds no parquet files; leave it out")
    return files


def _open_files(path: str | Path, label_column: str | None) -> Folder | Zip | Tars | Parquets:
    if str(path).startswith(SCHEME):
        return open_hub(str(path), label_column)
    path = Path(path)
    if path.is_dir():
        folder = Folder(path)
        if any(Path(name).suffix.lower() in SUFFIXES for name in folder.names):
            return folder
        shards = sorted(name for name in folder.names if name.lower().endswith(".tar"))
        parquets = sorted(name for name in folder.names if name.lower().endswith(".parquet"))
        if shards and parquets:
            raise DataError(f"--data.path {path}: both tar and parquet shards lie in it; give a folder of one kind")
        beside = sorted({*folder.names} - {*shards, *parquets, *([NAMES] * bool(shards))})
        if parquets:
            return Parquets(Place(str(path)), dict.fromkeys(parquets), label_column, beside, folder.repeated)
        return Tars(path, shards, beside, folder.repeated) if shards else folder
    if path.is_file():
        kinds = [suffix.lower() for suffix in path.suffixes]
        if kinds[-1:] == [".tgz"] or ".tar" in kinds[:-1]:
            raise DataError(f"--data.path {path}: a compressed tar file can only be read sequentially; decompress it")
        if kinds[-1:] == [".parquet"]:
            return Parquets(Place(str(path)), {path.name: None}, label_column)
        return Tars(path, [path.name]) if kinds[-1:] == [".tar"] else Zip(path)
    raise DataError(
        f"--data.path {path}: is neither a folder nor a file; give a folder, a zip, tar or parquet shards of images, "
        "hf://owner/name, or 'shapes'"
    )


def hold_out(
    classes: Mapping[str, str], fraction: float, seed: int, group_of: Mapping[str, str] = MappingProxyType({})
) -> set[str]:
    """Choose the names to hold out: the first `fraction` of each class, at least one image but never all, ordered by a
    seeded hash. A group, such as of near-duplicates, is held out as a whole or not at all."""
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
        for group in sorted(groups, key=partial(_seeded_hash, seed)):
            if group not in is_held:
                is_held[group] = len(groups[group]) <= room
                room -= len(groups[group]) * is_held[group]
    return {name for groups in members.values() for group, names in groups.items() if is_held[group] for name in names}


def _seeded_hash(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()
