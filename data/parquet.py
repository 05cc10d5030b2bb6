"""Images in parquet shards, as Hugging Face's `datasets` writes them: in a folder, or on the hub.

Shards on the hub are not downloaded. A row group is fetched when one of its images is read, and kept in memory until
others take its place, so a data set is encoded without a copy on the disk.
"""

import json
import math
import os
import posixpath
import re
from bisect import bisect_right
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from tqdm import tqdm

from data.files import check_size, fingerprint, version
from data.layout import LEVELS, DataError, Layout, join_abridged
from data.tars import layout_of_shards
from machine.atomic_files import sha256_of
from machine.hugging_face import SCHEME, describe_error

KEPT_BYTES = 2**29  # of row groups that a process keeps in memory, in addition to the one in use
NUM_CONNECTIONS = 16
IMAGE_COLUMNS = ("image", "img")  # the first of them, where several columns hold images
LABEL_COLUMN = "label"
PARTIAL = "partial-"  # prefix of splits that are too large for the hub to convert in full
LABELS = re.compile(r"(dictionary<values=)?(bool|u?int\d+|(large_)?string(_view)?)(, .*)?")  # types of labels
NO_LABELS = re.compile(r"null|struct|map|(\w+_)?list")  # types of columns that hold no class for each image


class UnreachableError(DataError):
    """The hub cannot be read. Unlike with a damaged image, images must not be left out because of it."""


class Shard(NamedTuple):
    """What is read from a shard at first: everything but its images."""

    starts: list[int]  # first row of each row group, and the number of rows
    image_column: str
    label_column: str | None
    labels: list[int | str | None]  # of each row; None without a label
    class_names: list[str]  # of integer labels; empty if the shard does not tell


class Place(NamedTuple):
    """Where shards lie: a folder or file as the user gave it, or the URL of a data set on the hub."""

    path: str
    hub: Any = None  # huggingface_hub's file system
    folder: str = ""  # of the data set, on the hub
    sizes: tuple[tuple[str, int], ...] = ()  # of the shards on the hub, which would be asked for again

    def local(self, shard: str) -> Path:
        return Path(self.path, shard) if Path(self.path).is_dir() else Path(self.path)

    @contextmanager
    def open(self, shard: str, metadata: Any = None) -> Iterator[Any]:
        """Open a shard; errors become a sentence, an `UnreachableError` of the hub, a `DataError` of a file."""
        try:
            source: Any = self.local(shard)
            if self.hub:  # without a cache of its own, as pyarrow knows what to read
                source = self.hub.open(f"{self.folder}/{shard}", "rb", cache_type="none", size=dict(self.sizes)[shard])
            with _pyarrow_parquet().ParquetFile(source, metadata=metadata, pre_buffer=True) as file:
                yield file
        except DataError:
            raise
        except Exception as error:  # pyarrow raises several kinds at a damaged file, the hub even more
            problem, kind = "is not a whole parquet file", DataError
            if self.hub:
                problem, kind = "cannot be fetched", UnreachableError
            raise kind(f"--data.path {self.path}: {shard} {problem} ({describe_error(error)}); try it again") from error


class Parquets:
    """Parquet shards in a folder or on the hub. Rows are listed as `shard.parquet/00000012`.

    Args:
        shards: their paths in `place`, in order, with the SHA-256 of each; None computes it from a local file
        label_column: column with the classes; by default `label`, or the only one whose classes have names
        beside: other files in the folder
        repeated: links to shards that are listed already
    """

    def __init__(
        self,
        place: Place,
        shards: Mapping[str, str | None],
        label_column: str | None = None,
        beside: Sequence[str] = (),
        repeated: Sequence[str] = (),
    ) -> None:
        self.place, self.is_remote = place, place.hub is not None
        self.path = Path(place.path.partition("@")[0] if place.hub else place.path)
        self.hashes, self.beside, self.repeated = dict(shards), list(beside), list(repeated)
        versions = tuple(digest or version(place.local(shard)) for shard, digest in shards.items())
        self.shards = _read_shards(place, tuple(shards), versions, label_column)
        self.names = [f"{name}/{row:08d}" for name, shard in self.shards.items() for row in range(shard.starts[-1])]
        self._groups, self._process = RowGroups(place, self.shards), os.getpid()

    def read(self, name: str) -> bytes:
        if self._process != os.getpid():  # a fork shares neither threads nor connections
            self._groups, self._process = RowGroups(self.place, self.shards), os.getpid()
        shard, _, row = name.rpartition("/")
        stored = self._groups.read(shard, int(row))
        if stored is None:
            raise OSError("its row holds no bytes of an image")
        check_size(len(stored))
        return stored

    def stamp(self, names: Sequence[str]) -> str | None:
        """Identify the state of all shards, whichever rows are asked for. None on the hub, which tells the hashes."""
        if self.is_remote:
            return None
        folder, shards = (self.path, list(self.shards)) if self.path.is_dir() else (self.path.parent, [self.path.name])
        return fingerprint(folder, shards, of="\n".join([str(self.path.resolve()), *names]))

    def checksum(self, name: str) -> tuple[int, int]:
        """Return the number of rows and the SHA-256 of a row's shard; they are the same in a folder and on the hub."""
        shard = name.rpartition("/")[0]
        digest = self.hashes[shard] = self.hashes[shard] or sha256_of(self.place.local(shard))
        return self.shards[shard].starts[-1], int(digest, 16)

    def infer_layout(self) -> Layout:
        """Find images, classes and splits. Images of splits without labels are left out if others have labels."""
        classes: dict[str, str] = {}
        withheld: defaultdict[str, list[str]] = defaultdict(list)
        for shard, (*_, labels, class_names) in self.shards.items():
            names = [f"{shard}/{row:08d}" for row in range(len(labels))]
            if all(label is None or label == -1 for label in labels):
                withheld["without labels"] += names
                continue
            count = Counter(class_names)  # some data sets have two classes of one name, such as ImageNet's cranes
            named = [f"{name} ({number})" if count[name] > 1 else name for number, name in enumerate(class_names)]
            for name, label in zip(names, labels, strict=True):
                if label in (None, "") or (isinstance(label, int) and not 0 <= label < (len(named) or math.inf)):
                    raise DataError(f"{name} has the label {label!r}, which is no class (withheld?); fix the shard")
                classes[name] = named[label] if named and isinstance(label, int) else str(label)
        if not classes:
            classes, withheld = dict.fromkeys(self.names, ""), defaultdict(list)
        place = " of the hub" * self.is_remote
        if any(f"/{PARTIAL}" in f"/{shard}" for shard in self.shards):
            place += ", converted in part, as their folder says"
        return layout_of_shards(classes, withheld, "parquet", place=place)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_process": None, "_groups": None}


class RowGroups:
    """Reads images of parquet shards by row groups. On the hub, the group after one that is read is fetched ahead."""

    def __init__(self, place: Place, shards: Mapping[str, Shard]) -> None:
        self.place, self.shards = place, shards
        self.lock, self.threads = Lock(), ThreadPoolExecutor(NUM_CONNECTIONS)
        self.metadata: dict[str, Any] = {}  # of the shards
        self.groups: OrderedDict[tuple[str, int], Future[Any]] = OrderedDict()  # the last read is the last

    def read(self, shard: str, row: int) -> bytes | None:
        starts = self.shards[shard].starts
        group = bisect_right(starts, row) - 1
        with self.lock:
            if self.place.hub and (shard, group - 1) in self.groups and group + 2 < len(starts):
                self._request(shard, group + 1)
            column = self._request(shard, group)
            while len(self.groups) > 2 and sum(map(_num_bytes, self.groups.values())) > KEPT_BYTES:
                self.groups.popitem(last=False)
        stored = column.result()[row - starts[group]].as_py()
        return stored and stored["bytes"]

    def _request(self, shard: str, group: int) -> Future[Any]:
        key = shard, group
        if key not in self.groups or (self.groups[key].done() and self.groups[key].exception()):
            self.groups[key] = self.threads.submit(self._load, shard, group)
        self.groups.move_to_end(key)
        return self.groups[key]

    def _load(self, shard: str, group: int) -> Any:
        column = self.shards[shard].image_column
        with self.place.open(shard, self.metadata.get(shard)) as file:
            self.metadata[shard] = file.metadata
            return file.read_row_group(group, columns=[f"{column}.bytes"], use_threads=False).column(column)


def _num_bytes(group: Future[Any]) -> int:
    return group.result().nbytes if group.done() and not group.exception() else 0


def open_hub(url: str, label_column: str | None = None) -> Parquets:
    """Open a data set of the hub, `hf://owner/name[@revision][/folder]`."""
    from huggingface_hub import HfApi, HfFileSystem

    url = url.rstrip("/")
    _pyarrow_parquet()
    try:
        hub = HfFileSystem()
        asked: Any = hub.resolve_path(f"datasets/{url.removeprefix(SCHEME)}")
        # A branch may move on while images are read: all of them come from the commit that it is at now.
        about = HfApi(endpoint=hub.endpoint, token=hub.token).dataset_info(asked.repo_id, revision=asked.revision)
        folder = f"datasets/{asked.repo_id}@{about.sha}/{asked.path_in_repo}".rstrip("/")
        found = hub.find(folder, detail=True)
    except Exception as error:
        raise UnreachableError(
            f"--data.path {url}: no network, or no such data set on the hub ({describe_error(error)}); write hf://owner/name"
        ) from error
    files: Any = {posixpath.relpath(path, folder): about for path, about in sorted(found.items())}  # pyright: ignore
    shards = {path: _sha256(about) for path, about in files.items() if path.endswith(".parquet")}
    if not shards:
        remedy = "" if "@" in url else f"; {url}@refs/convert/parquet may have the hub's own conversion"
        raise DataError(f"--data.path {url}: no parquet files in it{remedy}")
    sizes = tuple((path, files[path]["size"]) for path in shards)
    return Parquets(Place(url, hub, folder, sizes), shards, label_column)


def _sha256(about: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a file on the hub; for small files that are no LFS objects, git's hash."""
    return about["lfs"]["sha256"] if about.get("lfs") else about["blob_id"]


@lru_cache(maxsize=1)  # as both splits read the same shards
def _read_shards(
    place: Place, names: tuple[str, ...], versions: tuple[object, ...], label_column: str | None
) -> dict[str, Shard]:
    """Read what `Shard` says of each. `versions` change with the shards."""
    sets = sorted({_set_of(name) for name in names})
    if len(sets) > 1:
        raise DataError(f"--data.path {place.path}: several data sets, {join_abridged(sets)}; give the folder of one")
    with ThreadPoolExecutor(NUM_CONNECTIONS if place.hub else 1) as threads:
        found = threads.map(partial(_read_shard, place, label_column), names)
        shards = dict(zip(names, tqdm(found, desc="reading shards", total=len(names), leave=False), strict=True))
    _check_alike(place, shards)
    return shards


def _check_alike(place: Place, shards: Mapping[str, Shard]) -> None:
    """Raise DataError unless all shards have the same columns of images and of labels, and these mean the same."""
    first: dict[str, tuple[str, str]] = {}
    for name, shard in shards.items():
        columns = {"images": shard.image_column} if shard.labels else {}
        if any(label not in (None, -1) for label in shard.labels):
            has_names = shard.class_names or any(isinstance(label, str) for label in shard.labels)
            columns["labels"] = f"{shard.label_column}, {'with' if has_names else 'without'} names of classes"
        for what, column in columns.items():
            other, where = first.setdefault(what, (column, name))
            if column != other:
                raise DataError(
                    f"--data.path {place.path}: {where} has its {what} in {other}, but {name} in {column}; "
                    "give shards of one data set"
                )


def _set_of(name: str) -> str:
    """Return the folders of a shard without `data` and those of splits: data sets of one repository differ in them."""
    folders = posixpath.dirname(name).split("/")
    return (
        "/".join(each for each in folders if each.casefold().removeprefix(PARTIAL) not in {*LEVELS, "data", ""}) or "."
    )


def _read_shard(place: Place, label_column: str | None, name: str) -> Shard:
    with place.open(name) as file:
        schema, metadata = file.schema_arrow, file.metadata
        told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        features = {column: about for column, about in told.items() if isinstance(about, dict)}
        title = f"--data.path {place.path}: {name}"
        image = _image_column(title, schema, features)
        label = _label_column(title, schema, features, label_column)
        starts = [0, *accumulate(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))]
        labels = [None] * starts[-1]
        if label is not None:
            labels = file.read(columns=[label], use_threads=False).column(label).to_pylist()
        return Shard(starts, image, label, labels, features.get(label, {}).get("names") or [])


def _image_column(title: str, schema: Any, features: Mapping[str, Any]) -> str:
    columns = {
        field.name: {part.name for part in field.type} if str(field.type).startswith("struct<") else set()
        for field in schema
    }
    images = [
        name
        for name, parts in columns.items()
        if "bytes" in parts and features.get(name, {}).get("_type", "Image") == "Image"
    ]
    chosen = next((name for name in IMAGE_COLUMNS if name in images), images[0] if len(images) == 1 else None)
    if chosen is None:
        problem = f"several columns of images, {', '.join(images)}" if images else "no column of images"
        raise DataError(f"{title} has {problem}, but {', '.join(columns)}; call one image, a struct with its bytes")
    return chosen


def _label_column(title: str, schema: Any, features: Mapping[str, Any], asked: str | None) -> str | None:
    kinds = {field.name: str(field.type) for field in schema}
    columns = [name for name, kind in kinds.items() if LABELS.fullmatch(kind)]
    if asked is not None:
        if asked not in columns:
            there = ", ".join(columns) or "none"
            raise DataError(
                f"{title} has no column {asked} of numbers or texts; --data.label_column: there are {there}"
            )
        return asked
    with_names = [name for name in kinds if features.get(name, {}).get("_type") == "ClassLabel"]
    named = [name for name in columns if name in with_names] or columns
    if LABEL_COLUMN in named:
        return LABEL_COLUMN
    if named is columns:
        for name in sorted({LABEL_COLUMN, *with_names} & kinds.keys()):
            if not NO_LABELS.match(kinds[name]):
                raise DataError(
                    f"{title} has labels in {name}, but of type {kinds[name]}; store them as whole numbers or texts, "
                    "or rename it to train without"
                )
        return None
    if len(named) > 1:
        raise DataError(f"{title} has classes in the columns {' and '.join(named)}; --data.label_column {named[0]}")
    return named[0]


def _pyarrow_parquet() -> Any:
    try:
        return import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError("--data.path: parquet files need pyarrow; pip install -e '.[parquet]'") from error
