"""What a tree of files is understood to be: which images, of which classes, in which split; and what is left out."""

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

TABLE = "labels.csv"  # of files and their labels
LIKE_A_SPLIT = re.compile(r"^(train|test|val|dev|eval|hold|held)|(train|test|val|dev|eval|out)$")


class DataError(ValueError):
    """Images that cannot be read as asked, in the user's words."""


@dataclass(frozen=True)
class Layout:
    """A tree, understood. Names are paths from its root."""

    classes: dict[str, str]  # of each image, in the order of names; '' where there are none
    splits: dict[str, list[str]] | None  # the images of 'train' and 'test', where the tree says so
    left_out: dict[str, list[str]]  # names by the reason
    note: str  # where the images lie, and what says their split
    tables: list[str]  # labels.csv, where it names the classes


def understand(
    names: Iterable[str], read: Callable[[str], bytes], classes: Sequence[str] = (), exclude_classes: Sequence[str] = ()
) -> Layout:
    """A class a folder, below a level of `train/` and `test/` (or `val/`) where there is one; or images without class
    folders, whose classes `labels.csv` (file, label) may name. One class may lie below another where not both are
    chosen."""
    images, tables, left_out = _by_kind(names)
    root, paths, loose = _common_folder({name: name for name in images})
    splits, places = None, [f"in {root}"] if root else []
    if levels := _levels(paths.values()):
        train, held_out = levels["train"], levels.get("test") or levels["val"]
        places.append(f"split as {train}/ and {held_out}/")
        loose += [name for name, path in paths.items() if "/" not in path]
        of = {
            level: [name for name, path in paths.items() if path.startswith(f"{level}/")] for level in levels.values()
        }
        splits = {"train": of.pop(train), "test": of.pop(held_out)}
        left_out |= {f"in {level}/, beside {train}/ and {held_out}/": rest for level, rest in of.items()}
        below = {name: paths[name].partition("/")[2] for name in sorted(splits["train"] + splits["test"])}
        _, paths, outside = _common_folder(below)
        loose += outside
    else:
        _refuse_other_levels(paths.values())

    labels = {name: posixpath.dirname(path) for name, path in paths.items()}
    if tables and len({*labels.values()}) <= 1:
        labels = _labels(tables, read, labels)
        left_out["not named in labels.csv"] = [name for name in paths if name not in labels]
        places.append("classes from labels.csv")
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
    return Layout(labels, splits, {why: left for why, left in left_out.items() if left}, ", ".join(places), tables)


def _by_kind(names: Iterable[str]) -> tuple[list[str], list[str], defaultdict[str, list[str]]]:
    """Images, tables of labels, and what is left out, by the reason."""
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
    """The folder above all class folders, the longest that holds every image in folders of its own; by their names the
    paths below it; and what lies outside."""
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
    """The folders that are the split, by what they are: `train`, `val`, `test`; none where there is no such level."""
    heads = sorted({path.partition("/")[0] for path in paths if "/" in path})
    splits = {head: LEVELS[head.casefold()] for head in heads if head.casefold() in LEVELS}
    levels = {meaning: head for head, meaning in splits.items()}
    if len(levels) < 2:
        return {}
    if len(splits) > len(levels) or "train" not in levels or len(splits) < len(heads):
        raise DataError(
            f"beside each other lie {', '.join(f'{head}/' for head in heads[:8])}: a split is one train/ and one test/ "
            "(or val/) with class folders below and nothing beside; move the others away, or rename them"
        )
    return levels


def _refuse_other_levels(paths: Collection[str]) -> None:
    """Levels called as splits often are, of the same classes or no folders, would mix held-out images into training."""
    flat = sorted({path.partition("/")[0] for path in paths if path.count("/") == 1})
    if "train" in "".join(flat).casefold() and flat[1:] and all(LIKE_A_SPLIT.search(head.casefold()) for head in flat):
        raise DataError(
            f"{', '.join(f'{head}/' for head in flat[:8])}: a split, or classes? call its folders train/ and test/"
        )
    below: defaultdict[str, set[str]] = defaultdict(set)
    for path in paths:
        head, _, rest = path.partition("/")
        if "/" in rest:
            below[head].add(rest.partition("/")[0])
    for head in below:
        other = next((folder for folder in below if folder != head and below[folder] & below[head]), None)
        if other and LIKE_A_SPLIT.search(head.casefold()):
            raise DataError(
                f"{head}/ and {other}/ hold the same classes, such as {min(below[head] & below[other])}/: a split? "
                "call its folders train/ and test/ (or val/); else rename them"
            )


def _refuse_nested(found: set[str], wanted: Sequence[str], unwanted: Sequence[str]) -> None:
    """Of the classes that are chosen none lies in another, nor a split in one."""
    composed = {label: unicodedata.normalize("NFC", label) for label in found}  # macOS takes names apart
    wanted, unwanted = ([unicodedata.normalize("NFC", name) for name in some] for some in (wanted, unwanted))
    classes = {label for label, name in composed.items() if name in (wanted or [name]) and name not in unwanted}
    for label in sorted(classes):
        above = next((str(path) for path in PurePosixPath(label).parents if str(path) in classes), None)
        if above:
            raise DataError(
                f"images lie in {above}/ and in {label}/ below it: one class or two? move them, or leave one out: "
                f"--data.exclude_classes '[{label}]'"
            )
    inner = {part.casefold() for label in classes for part in PurePosixPath(label).parts}
    if len({LEVELS[part] for part in inner if part in LEVELS}) > 1:
        some = next(label for label in sorted(classes) if {*label.casefold().split("/")} & {*LEVELS})
        raise DataError(f"{some}/ has the split below the class: move train/ and test/ above the class folders")


def _labels(tables: list[str], read: Callable[[str], bytes], images: dict[str, str]) -> dict[str, str]:
    """Classes of the images that the tables name, by a path from the table or from the one folder of images."""
    labels: dict[str, str] = {}
    for table in tables:
        try:
            rows = list(csv.DictReader(io.StringIO(read(table).decode("utf-8-sig"), newline=""), strict=True))
        except (OSError, ValueError, csv.Error) as error:
            raise DataError(f"{table} cannot be read ({error}); mend it or move it away") from error
        if not rows or not {"file", "label"} <= {*rows[0]}:
            has = ", ".join(map(str, rows[0])) if rows else "nothing"
            raise DataError(f"{table} must have columns file and label, and has {has}; rename them or move it away")
        if "split" in rows[0]:
            raise DataError(f"{table} has a column split, which is not read; move the images into train/ and test/")
        beside = posixpath.dirname(table)
        places = sorted({posixpath.dirname(name) for name in images if name.startswith(beside)} - {beside})
        for row in rows:
            paths = [posixpath.join(place, str(row["file"]).replace("\\", "/")) for place in (beside, *places)]
            found = paths[:1] if paths[0] in images else [path for path in paths if path in images]
            label = (row["label"] or "").strip()
            if len(found) != 1 or not label:
                which = f"may be {' or '.join(found)}" if found else "is not there"
                what = which if len(found) != 1 else "has no label"
                raise DataError(f"{table}: {row['file']} {what}; mend the table or move it away")
            name = found[0]
            if labels.setdefault(name, label) != label:
                raise DataError(f"{table}: {row['file']} has two labels, {labels[name]} and {label}; keep one")
    return {name: labels[name] for name in images if name in labels}
