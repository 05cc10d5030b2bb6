"""The layout of tar shards: samples in the format of the webdataset library, or a tree of images.

A sample consists of the files with the same key, which is the path up to the first dot of the file name: `0001.jpg`
with `0001.cls`, which holds the class as a number or a name, or with `0001.json`, which holds it under `label`. Shards
are assigned to splits by the words train, test and val in their names or folders.
"""

import json
import posixpath
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from data.files import NAMES
from data.layout import LEVELS, TABLE, DataError, Layout, infer_layout, is_hidden
from data.pixels import SUFFIXES

LABELS = (".cls", ".json")


def infer_tar_layout(
    names: Sequence[str],
    read: Callable[[str], bytes],
    class_names: str | None,
    classes: Sequence[str] = (),
    exclude_classes: Sequence[str] = (),
) -> Layout:
    """Find images, classes and splits in tar shards, given files as `shard.tar/path` in the shards' order, and the
    content of `classnames.txt`.

    If no sample has a label and the images lie in folders, or a labels.csv names them, the shards are read as one tree,
    like a zip.
    """
    images: dict[str, str] = {}  # by key
    labels: dict[str, str] = {}
    duplicates: list[str] = []  # messages about samples with several images
    left_out: defaultdict[str, list[str]] = defaultdict(list)
    names = [name for name in names if not is_hidden(_split_name(name)[1])]
    for name in names:
        shard, inner = _split_name(name)
        folder, last = posixpath.split(inner)
        stem, _, field = last.partition(".")
        key, suffix = posixpath.join(shard, folder, stem), f".{field.lower()}"
        if suffix in SUFFIXES:
            if key in images:
                duplicates.append(f"{name}: its sample has another image, {images[key]}; keep one in each")
            images[key] = name
        elif suffix in LABELS:
            if suffix == ".cls" or key not in labels:
                labels[key] = name
        else:
            left_out["other files"].append(name)
    label_of = {name: _read_label(labels[key], read) if key in labels else None for key, name in images.items()}
    labelled = [name for name, label in label_of.items() if label is not None]
    paths = [_split_name(name)[1] for name in names]
    if not labelled and any(_is_table(path) or ("/" in path and _is_image(path)) for path in paths):
        return _as_tree(names, read, classes, exclude_classes)
    if duplicates:
        raise DataError(duplicates[0])
    if labelled and len(labelled) < len(label_of):
        unlabelled = next(name for name, label in label_of.items() if label is None)
        raise DataError(
            f"{unlabelled} has no label, neither .cls nor 'label' in .json, and {labelled[0]} has; give all one"
        )
    left_out["labels without an image"] = [name for key, name in labels.items() if key not in images]
    return layout_of_shards({name: label or "" for name, label in label_of.items()}, left_out, "tar", class_names)


def layout_of_shards(
    labels: dict[str, str], left_out: dict[str, list[str]], kind: str, class_names: str | None = None, place: str = ""
) -> Layout:
    """Lay out labelled images, split by their shards' names; if there are train and test shards, val is left out."""
    splits, split_note = split_by_shards(list(labels))
    if splits:
        in_splits = {*splits["train"], *splits["test"]}
        left_out["in val shards, beside train and test"] = [name for name in labels if name not in in_splits]
        labels = {name: label for name, label in labels.items() if name in in_splits}
    num_shards = len({_split_name(name)[0] for name in labels})
    note = ", ".join(filter(None, [f"in {num_shards} {kind} shard{'s' * (num_shards != 1)}{place}", split_note]))
    left_out = {reason: files for reason, files in left_out.items() if files}
    return Layout(name_classes(labels, class_names), splits, left_out, note, [])


def _split_name(name: str) -> tuple[str, str]:
    end = re.search(r"\.(tar|parquet)/", name.lower()).end()  # pyright: ignore[reportOptionalMemberAccess]
    return name[: end - 1], name[end:]


def _read_label(name: str, read: Callable[[str], bytes]) -> str | None:
    """Read the class from a .cls file, or from `label` in a .json file; None if the latter has no such entry."""
    try:
        text = read(name).decode("utf-8-sig").strip()
        if not name.lower().endswith(".json"):
            label = text
        elif (label := json.loads(text).get("label")) is None:
            return None
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{name} is no label that can be read ({error}); fix it") from error
    if isinstance(label, bool) or not isinstance(label, int | str) or not str(label) or str(label).startswith("-"):
        raise DataError(
            f"{name} has the label {label!r}, which is no class (withheld?); leave its shard out, or fix it"
        )
    return str(label)


def name_classes(labels: dict[str, str], class_names: str | None) -> dict[str, str]:
    """Replace numbers by names: lines of `classnames.txt` or, without it, the numbers padded with zeros."""
    classes = {*labels.values()} - {""}
    if not classes or not all(re.fullmatch(r"[0-9]+", label) for label in classes):
        return labels
    largest = max(map(int, classes))
    if class_names is None:
        return {name: label.lstrip("0").zfill(len(str(largest))) for name, label in labels.items()}
    lines = [line.strip() for line in class_names.rstrip().split("\n")]  # an empty first line counts: it is class 0
    if len(lines) <= largest or len({*lines}) < len(lines) or not all(lines):
        raise DataError(
            f"{NAMES} has {len(lines)} lines, {len({*lines} - {''})} of them unlike, for labels up to {largest}: "
            "give a name a line, from that of 0, or take it away"
        )
    return {name: lines[int(label)] for name, label in labels.items()}


def split_by_shards(names: list[str]) -> tuple[dict[str, list[str]] | None, str]:
    """Assign images to train and test by the names of their shards, with a note that says so; None without such names.
    Shards called val are the test split if none are called test."""
    level_of = _levels(names)
    if not level_of:
        return None, ""
    held_out = "test" if "test" in level_of.values() else "val"
    splits = {
        split: [name for name in names if level_of[_split_name(name)[0]] == level]
        for split, level in (("train", "train"), ("test", held_out))
    }
    return splits, f"split by shards called train and {held_out}"


def _levels(names: Iterable[str]) -> dict[str, str | None]:
    """Map each shard of these files to train, test or val by its name; empty if the names do not define a split."""
    level_of: dict[str, str | None] = {}
    for shard in dict.fromkeys(_split_name(name)[0] for name in names):
        words = {
            LEVELS[word] for word in re.split(r"[^a-z]+", posixpath.splitext(shard)[0].casefold()) if word in LEVELS
        }
        if len(words) > 1:
            raise DataError(f"{shard}: its name says {' and '.join(sorted(words))}; rename it")
        level_of[shard] = words.pop() if words else None
    levels = {*level_of.values()}
    if len(levels) < 2:
        return {}
    if None in levels or "train" not in levels:
        other = next(shard for shard, level in level_of.items() if level != "train")
        raise DataError(
            f"{other} lies among shards that are called {' and '.join(sorted(filter(None, levels)))}: a split is "
            "shards called train and test (or val); rename it, or move it away"
        )
    return level_of


def _is_image(path: str) -> bool:
    """By the last suffix; unlike a sample's, the name may contain other dots."""
    return posixpath.splitext(path)[1].lower() in SUFFIXES


def _is_table(path: str) -> bool:
    return posixpath.basename(path).lower() == TABLE


def _as_tree(
    names: Sequence[str], read: Callable[[str], bytes], classes: Sequence[str], exclude_classes: Sequence[str]
) -> Layout:
    """Read the shards as one tree; a split by their names alone becomes the top level of folders."""
    relevant = [name for name in names if _is_image(_split_name(name)[1]) or _is_table(name)]
    level_of = _levels(relevant)
    top_folder = {name: _split_name(name)[1].partition("/")[0].casefold() for name in relevant}
    if all(LEVELS.get(folder) == level_of.get(_split_name(name)[0]) for name, folder in top_folder.items()):
        level_of = {}
    name_of: dict[str, str] = {}  # by path in the tree
    for name in names:
        shard, path = _split_name(name)
        path = posixpath.join(level_of.get(shard) or "", path)
        if name_of.setdefault(path, name) != name and name in top_folder:
            raise DataError(f"{path} lies in two shards, as {name_of[path]} and {name}; move one away")
    layout = infer_layout(name_of, lambda path: read(name_of[path]), classes, exclude_classes)
    splits = layout.splits and {split: [name_of[path] for path in paths] for split, paths in layout.splits.items()}
    left_out = {reason: [name_of[path] for path in paths] for reason, paths in layout.left_out.items()}
    class_of = {name_of[path]: label for path, label in layout.classes.items()}
    return Layout(class_of, splits, left_out, layout.note, [name_of[path] for path in layout.tables])
