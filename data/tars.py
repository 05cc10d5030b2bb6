"""What tar files are understood to be: WebDataset's samples, or a tree of images.

A sample is the files that share a path up to the first dot of its last part, its key: `0001.jpg` beside `0001.cls`, the
class as a number or a name, or beside `0001.json`, whose `label` is (the webdataset library's format). Shards whose
name or folder says train, test or val are the split.
"""

import json
import posixpath
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from data.files import NAMES
from data.layout import LEVELS, TABLE, DataError, Layout, is_hidden, understand
from data.pixels import SUFFIXES

LABELS = (".cls", ".json")


def understand_tars(
    names: Sequence[str],
    read: Callable[[str], bytes],
    class_names: str | None,
    classes: Sequence[str] = (),
    exclude_classes: Sequence[str] = (),
) -> Layout:
    """Of files `shard.tar/key.jpg`, in their order. Shards without labels whose images lie in folders, or are named in
    a labels.csv, are read as one tree, as a zip is."""
    images: dict[str, str] = {}  # by key
    labels: dict[str, str] = {}
    again: list[str] = []  # what is to be said of samples that have several
    left_out: defaultdict[str, list[str]] = defaultdict(list)
    names = [name for name in names if not is_hidden(_parts(name)[1])]
    for name in names:
        shard, inner = _parts(name)
        folder, last = posixpath.split(inner)
        stem, _, field = last.partition(".")
        key, suffix = posixpath.join(shard, folder, stem), f".{field.lower()}"
        if suffix in SUFFIXES:
            again += [f"{name}: its sample has another image, {images[key]}; keep one in each"] if key in images else []
            images[key] = name
        elif suffix in LABELS:
            if suffix == ".cls" or key not in labels:
                labels[key] = name
        else:
            left_out["other files"].append(name)
    found = {name: _label(labels[key], read) if key in labels else None for key, name in images.items()}
    labelled = [name for name, label in found.items() if label is not None]
    paths = [_parts(name)[1] for name in names]
    if not labelled and any(_is_table(path) or ("/" in path and _is_image(path)) for path in paths):
        return _as_tree(names, read, classes, exclude_classes)
    if again:
        raise DataError(again[0])
    if labelled and len(labelled) < len(found):
        lacking = next(name for name, label in found.items() if label is None)
        raise DataError(
            f"{lacking} has no label, neither .cls nor 'label' in .json, and {labelled[0]} has; give all one"
        )
    left_out["labels without an image"] = [name for key, name in labels.items() if key not in images]
    splits, note = _splits(list(found))
    if splits:
        kept = {*splits["train"], *splits["test"]}
        left_out["in val shards, beside train and test"] = [name for name in found if name not in kept]
        found = {name: label for name, label in found.items() if name in kept}
    named = _named({name: label or "" for name, label in found.items()}, class_names)
    shards = len({_parts(name)[0] for name in found})
    note = ", ".join(filter(None, [f"in {shards} tar shard{'s' * (shards != 1)}", note]))
    return Layout(named, splits, {why: left for why, left in left_out.items() if left}, note, [])


def _parts(name: str) -> tuple[str, str]:
    """The shard, and the path in it."""
    end = name.lower().index(".tar/") + 4
    return name[:end], name[end + 1 :]


def _label(name: str, read: Callable[[str], bytes]) -> str | None:
    """What a .cls file says, or a .json file under `label`; None where the latter says nothing."""
    try:
        text = read(name).decode("utf-8-sig").strip()
        if not name.lower().endswith(".json"):
            label = text
        elif (label := json.loads(text).get("label")) is None:
            return None
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{name} is no label that can be read ({error}); mend it") from error
    if isinstance(label, bool) or not isinstance(label, int | str) or not str(label) or str(label).startswith("-"):
        raise DataError(
            f"{name} has the label {label!r}, which is no class (withheld?); leave its shard out, or mend it"
        )
    return str(label)


def _named(labels: dict[str, str], class_names: str | None) -> dict[str, str]:
    """Numbers become the lines of `classnames.txt`, or all of one width, so that sorted classes keep their numbers."""
    found = {*labels.values()} - {""}
    if not found or not all(re.fullmatch(r"[0-9]+", label) for label in found):
        return labels
    most = max(map(int, found))
    if class_names is None:
        return {name: label.lstrip("0").zfill(len(str(most))) for name, label in labels.items()}
    lines = [line.strip() for line in class_names.rstrip().split("\n")]  # a first one without a name is that of 0 too
    if len(lines) <= most or len({*lines}) < len(lines) or not all(lines):
        raise DataError(
            f"{NAMES} has {len(lines)} lines, {len({*lines} - {''})} of them unlike, for labels up to {most}: "
            "give a name a line, from that of 0, or take it away"
        )
    return {name: lines[int(label)] for name, label in labels.items()}


def _splits(names: list[str]) -> tuple[dict[str, list[str]] | None, str]:
    """The images of train and test (or val), where the names of their shards say so; and this in words."""
    level_of = _levels(names)
    if not level_of:
        return None, ""
    held_out = "test" if "test" in level_of.values() else "val"
    of_level = {
        split: [name for name in names if level_of[_parts(name)[0]] == level]
        for split, level in (("train", "train"), ("test", held_out))
    }
    return of_level, f"split by shards called train and {held_out}"


def _levels(names: Iterable[str]) -> dict[str, str | None]:
    """Of these files' shards, whether they are train, test or val, where their names say so; else nothing."""
    level_of: dict[str, str | None] = {}
    for shard in dict.fromkeys(_parts(name)[0] for name in names):
        words = {LEVELS[word] for word in re.split(r"[^a-z]+", shard[:-4].casefold()) if word in LEVELS}
        if len(words) > 1:
            raise DataError(f"{shard}: its name says {' and '.join(sorted(words))}; rename it")
        level_of[shard] = words.pop() if words else None
    levels = {*level_of.values()}
    if len(levels) < 2:
        return {}
    if None in levels or "train" not in levels:
        odd = next(shard for shard, level in level_of.items() if level != "train")
        raise DataError(
            f"{odd} lies among shards that are called {' and '.join(sorted(filter(None, levels)))}: a split is shards "
            "called train and test (or val); rename it, or move it away"
        )
    return level_of


def _is_image(path: str) -> bool:
    """Whatever dots its name has."""
    return posixpath.splitext(path)[1].lower() in SUFFIXES


def _is_table(path: str) -> bool:
    return posixpath.basename(path).lower() == TABLE


def _as_tree(
    names: Sequence[str], read: Callable[[str], bytes], classes: Sequence[str], exclude_classes: Sequence[str]
) -> Layout:
    """What shards are called, train and test or val, is a level of folders, where the tree has none."""
    counted = [name for name in names if _is_image(_parts(name)[1]) or _is_table(name)]
    level_of = _levels(counted)
    heads = {name: _parts(name)[1].partition("/")[0].casefold() for name in counted}
    if all(LEVELS.get(head) == level_of.get(_parts(name)[0]) for name, head in heads.items()):
        level_of = {}
    inner: dict[str, str] = {}
    for name in names:
        shard, path = _parts(name)
        path = posixpath.join(level_of.get(shard) or "", path)
        if inner.setdefault(path, name) != name and name in heads:
            raise DataError(f"{path} lies in two shards, as {inner[path]} and {name}; move one away")
    layout = understand(inner, lambda path: read(inner[path]), classes, exclude_classes)
    splits = layout.splits and {split: [inner[path] for path in paths] for split, paths in layout.splits.items()}
    left_out = {why: [inner[path] for path in paths] for why, paths in layout.left_out.items()}
    named = {inner[path]: label for path, label in layout.classes.items()}
    return Layout(named, splits, left_out, layout.note, [inner[path] for path in layout.tables])
