"""The layout of a tree of files: its images, classes and splits, and the files that are left out."""

import csv
import io
import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from data.pixels import NOT_READ, SUFFIXES

LEVELS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}

TABLE = "labels.csv"  # columns file and label
LIKE_A_SPLIT = re.compile(r"^(train|test|val|dev|eval|hold|held)|(train|test|val|dev|eval|out)$")


class DataError(ValueError):
    """Images cannot be read as requested; the message is for the user."""


@dataclass(frozen=True)
class Layout:
    """The interpretation of a tree of files. Names are paths relative to its root."""

    classes: dict[str, str]  # of each image, sorted by name; '' if there are no classes
    splits: dict[str, list[str]] | None  # the images of 'train' and 'test', if the tree defines a split
    left_out: dict[str, list[str]]  # names by reason
    note: str  # where the images lie and what defines the split
    tables: list[str]  # the labels.csv files that name the classes


def infer_layout(
    names: Iterable[str], read: Callable[[str], bytes], classes: Sequence[str] = (), exclude_classes: Sequence[str] = ()
) -> Layout:
    """Find images, classes and splits in a tree of files, given their paths.

    Each folder of images is a class, below folders `train/` and `test/` (or `val/`) if they exist. Images without class
    folders may have their classes in a `labels.csv`. A class folder may lie in another only if one of them is left out.
    Ambiguous trees raise `DataError`.
    """
    images, tables, left_out = _sort_by_kind(names)
    root, paths, loose = _common_folder({name: name for name in images})
    splits, notes = None, [f"in {root}"] if root else []
    if levels := _levels(paths.values()):
        train, held_out = levels["train"], levels.get("test") or levels["val"]
        notes.append(f"split as {train}/ and {held_out}/")
        loose += [name for name, path in paths.items() if "/" not in path]
        by_level = {
            level: [name for name, path in paths.items() if path.startswith(f"{level}/")] for level in levels.values()
        }
        splits = {"train": by_level.pop(train), "test": by_level.pop(held_out)}
        left_out |= {f"in {level}/, beside {train}/ and {held_out}/": rest for level, rest in by_level.items()}
        below = {name: paths[name].partition("/")[2] for name in sorted(splits["train"] + splits["test"])}
        _, paths, outside = _common_folder(below)
        loose += outside
    else:
        _refuse_unclear_split(paths.values())

    labels = {name: posixpath.dirname(path) for name, path in paths.items()}
    if tables and len({*labels.values()}) <= 1:
        labels = _read_tables(tables, read, labels)
        left_out["not named in labels.csv"] = [name for name in paths if name not in labels]
        notes.append("classes from labels.csv")
    else:
        left_out["other files"] += tables
        tables = []
        if any(labels.values()):
            loose += [name for name, label in labels.items() if not label]
            labels = {name: label for name, label in labels.items() if label}
    left_out["in no class folder"] += loose
    if len(loose) > len(labels):
        raise DataError(
            f"{len(loose)} images lie loose, such as {loose[0]}, and {len(labels)} in folders: move either away, or "
            "the loose ones into a folder of their class"
        )
    _refuse_nested({*labels.values()}, classes, exclude_classes)
    if splits:
        splits = {split: [name for name in group if name in labels] for split, group in splits.items()}
    left_out = {reason: files for reason, files in left_out.items() if files}
    return Layout(labels, splits, left_out, ", ".join(notes), tables)


def _sort_by_kind(names: Iterable[str]) -> tuple[list[str], list[str], defaultdict[str, list[str]]]:
    """Sort files into images, label tables and files to leave out, the latter by reason."""
    images, tables, left_out = [], [], defaultdict[str, list[str]](list)
    for name in sorted(name for name in names if not is_hidden(name)):
        suffix = posixpath.splitext(name)[1].lower()
        if suffix in SUFFIXES:
            images.append(name)
        elif posixpath.basename(name).lower() == TABLE:
            tables.append(name)
        elif suffix in NOT_READ:
            left_out[f"of kind {suffix}, which is not read: convert it to PNG"].append(name)
        else:
            left_out["other files"].append(name)
    return images, tables, left_out


def is_hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX/")) or "/." in name or "/__MACOSX/" in name


def _common_folder(paths: dict[str, str]) -> tuple[str, dict[str, str], list[str]]:
    """Find the folder that holds all class folders, given paths by name: the deepest with all images in folders below
    it. Return it, the paths below it by name, and the names that lie outside."""
    nested, root = [path for path in paths.values() if "/" in path], ""
    while True:
        below = {path[len(root) :].partition("/")[0] for path in nested}
        deeper = [path for path in nested if path[len(root) :].count("/") > 1]
        if len(below) != 1 or not deeper:
            break
        root, nested = f"{root}{below.pop()}/", deeper
    inside = {name: path.removeprefix(root) for name, path in paths.items() if path.startswith(root)}
    return root, inside, [name for name in paths if name not in inside]


def _levels(paths: Iterable[str]) -> dict[str, str]:
    """Map `train`, `val` and `test` to the top folders that hold these splits; empty if the top level is no split."""
    folders = sorted({path.partition("/")[0] for path in paths if "/" in path})
    level_of = {folder: LEVELS[folder.casefold()] for folder in folders if folder.casefold() in LEVELS}
    levels = {level: folder for folder, level in level_of.items()}
    if len(levels) < 2:
        return {}
    if len(level_of) > len(levels) or "train" not in levels or len(level_of) < len(folders):
        raise DataError(
            f"beside each other lie {', '.join(f'{folder}/' for folder in folders[:8])}: a split is one train/ and one "
            "test/ (or val/) with class folders below and nothing beside; move the others away, or rename them"
        )
    return levels


def _refuse_unclear_split(paths: Collection[str]) -> None:
    """Raise `DataError` for top folders that may be a split under other names, such as `training_set/`: those that hold
    no class folders, or the same ones. Read as classes, they would mix held-out images into the training."""
    flat = sorted({path.partition("/")[0] for path in paths if path.count("/") == 1})
    if "train" in "".join(flat).casefold() and flat[1:] and all(LIKE_A_SPLIT.search(name.casefold()) for name in flat):
        raise DataError(
            f"{', '.join(f'{folder}/' for folder in flat[:8])}: a split, or classes? call its folders train/ and test/"
        )
    below: defaultdict[str, set[str]] = defaultdict(set)
    for path in paths:
        top, _, rest = path.partition("/")
        if "/" in rest:
            below[top].add(rest.partition("/")[0])
    for top in below:
        other = next((folder for folder in below if folder != top and below[folder] & below[top]), None)
        if other and LIKE_A_SPLIT.search(top.casefold()):
            raise DataError(
                f"{top}/ and {other}/ hold the same classes, such as {min(below[top] & below[other])}/: a split? "
                "call its folders train/ and test/ (or val/); else rename them"
            )


def _refuse_nested(available: set[str], include: Sequence[str], exclude: Sequence[str]) -> None:
    """Raise `DataError` if a selected class lies in the folder of another, or contains a split."""
    composed = {label: unicodedata.normalize("NFC", label) for label in available}  # macOS decomposes file names
    include, exclude = ([unicodedata.normalize("NFC", name) for name in names] for names in (include, exclude))
    classes = {label for label, name in composed.items() if name in (include or [name]) and name not in exclude}
    for label in sorted(classes):
        above = next((str(path) for path in PurePosixPath(label).parents if str(path) in classes), None)
        if above:
            raise DataError(
                f"images lie in {above}/ and in {label}/ below it: one class or two? move them, or leave one out: "
                f"--data.exclude_classes '[{label}]'"
            )
    parts = {part.casefold() for label in classes for part in PurePosixPath(label).parts}
    if len({LEVELS[part] for part in parts if part in LEVELS}) > 1:
        first = next(label for label in sorted(classes) if {*label.casefold().split("/")} & {*LEVELS})
        raise DataError(f"{first}/ has the split below the class: move train/ and test/ above the class folders")


def _read_tables(tables: list[str], read: Callable[[str], bytes], images: dict[str, str]) -> dict[str, str]:
    """Read the classes of images from tables, which name files relative to the table or to a folder of images."""
    labels: dict[str, str] = {}
    for table in tables:
        try:
            rows = list(csv.DictReader(io.StringIO(read(table).decode("utf-8-sig"), newline=""), strict=True))
        except (OSError, ValueError, csv.Error) as error:
            raise DataError(f"{table} cannot be read ({error}); fix it or move it away") from error
        if not rows or not {"file", "label"} <= {*rows[0]}:
            has = ", ".join(map(str, rows[0])) if rows else "nothing"
            raise DataError(f"{table} must have columns file and label, and has {has}; rename them or move it away")
        if "split" in rows[0]:
            raise DataError(f"{table} has a column split, which is not read; move the images into train/ and test/")
        folder = posixpath.dirname(table)
        subfolders = sorted({posixpath.dirname(name) for name in images if name.startswith(folder)} - {folder})
        for row in rows:
            paths = [posixpath.join(base, str(row["file"]).replace("\\", "/")) for base in (folder, *subfolders)]
            matches = paths[:1] if paths[0] in images else [path for path in paths if path in images]
            label = (row["label"] or "").strip()
            if len(matches) != 1:
                problem = f"may be {' or '.join(matches)}" if matches else "is not there"
                raise DataError(f"{table}: {row['file']} {problem}; fix the table or move it away")
            if not label:
                raise DataError(f"{table}: {row['file']} has no label; fix the table or move it away")
            name = matches[0]
            if labels.setdefault(name, label) != label:
                raise DataError(f"{table}: {row['file']} has two labels, {labels[name]} and {label}; keep one")
    return {name: labels[name] for name in images if name in labels}


def join_abridged(names: Sequence[str], at_most: int = 5) -> str:
    """Join the first few names, and say how many there are if there are more."""
    shown = ", ".join(names[:at_most])
    return shown if len(names) <= at_most else f"{shown}, ... ({len(names)} in all)"
