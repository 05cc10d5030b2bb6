"""Fetch a public dataset into one zip, a class a folder, and a manifest beside it.

python scripts/prepare_data.py caltech101 --output caltech101.zip --image_size 64
python scripts/prepare_data.py hf:uoft-cs/cifar10 --output cifar10.zip
"""

import io
import json
import re
import socket
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiment.cli import one_line_errors, parse
from settings import within

TORCHVISION = {"caltech101": "Caltech101", "cifar10": "CIFAR10", "mnist": "MNIST"}
Item = tuple[str, str, Any]  # split ('' where there is none), class name, PIL image


@dataclass(frozen=True)
class PrepareConfig:
    """Fetch a public dataset into a zip with a class a folder (train/ and test/ above, where it has them).

    Args:
        dataset: 'caltech101', 'cifar10', 'mnist', or 'hf:OWNER/NAME', any of the hub's (pip install -e '.[hub]')
        output: the zip to write; a manifest goes to the same name with .json
        image_size: cut to the centre square and resize to this side; by default images stay as they are
        image_column: of a hub dataset
        label_column: of a hub dataset
        root: folder for the downloaded originals; what is there already is not fetched again
    """

    dataset: str
    output: Path
    image_size: int | None = within("[1, 16384]", None)
    image_column: str = "image"
    label_column: str = "label"
    root: Path = Path("cache/originals")


def main(config: PrepareConfig) -> None:
    """Fetch the data, write them aside, rename them when whole."""
    socket.setdefaulttimeout(20)
    if config.dataset.startswith("hf:"):
        items = hub_items(config)
    elif config.dataset in TORCHVISION:
        items = torchvision_items(config.dataset, config.root)
    else:
        raise ValueError(f"--dataset {config.dataset}: unknown, choose from {', '.join(TORCHVISION)} or hf:OWNER/NAME")
    manifest = write_zip(fetched(items, config), config.output, config.image_size, source=config.dataset)
    print(f"{manifest['num_images']} images of {len(manifest['classes'])} classes: {config.output}")


def fetched(items: Iterator[Item], config: PrepareConfig) -> Iterator[Item]:
    """The items; what goes wrong with getting them is told apart from what goes wrong with writing them."""
    try:
        yield from items
    except (OSError, RuntimeError) as error:  # torchvision and the hub raise either when they cannot download
        reason = " ".join(str(error).split())[:160]
        raise OSError(
            f"--dataset {config.dataset} could not be fetched ({reason}); put the originals into --root {config.root}"
        ) from error


def write_zip(items: Iterator[Item], output: Path, image_size: int | None, *, source: str) -> dict[str, Any]:
    """Write the images (stored, as PNG) and the manifest; nothing is left where it fails."""
    from tqdm import tqdm

    from data.pixels import fit, to_rgb
    from machine.whole_files import sha256_of, write_whole

    beside = output.with_suffix(".json")
    if output.suffix.lower() != ".zip" or output.is_dir():  # `pets` and `pets.v2` have one manifest with `pets.zip`
        raise ValueError(f"--output {output}: give FILE.zip")
    if beside.exists() and b'"sha256"' not in beside.read_bytes():
        raise ValueError(f"--output {output}: its manifest would replace {beside}, which is none; give another name")
    output.parent.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    classes: Counter[str] = Counter()
    names: dict[str, str] = {}  # of the classes, by their folders
    with tempfile.TemporaryDirectory(dir=output.parent) as aside:
        partial = Path(aside) / "data.zip"
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            for split, name, image in tqdm(items, desc=source, unit="img"):
                buffer = io.BytesIO()
                size = None if image_size is None else (image_size, image_size)
                fit(to_rgb(image), size).save(buffer, format="PNG")
                below = re.sub(r"[/\\]|^\.", "_", name)
                if not below or names.setdefault(below, name) != name:
                    same = f"would lie in one folder with '{names[below]}'" if below else "has no name"
                    raise ValueError(f"--dataset {source}: the class '{name}' {same}; rename it at its source")
                folder = f"{split}/{below}" if split else below
                archive.writestr(f"{folder}/{counts[folder]:06d}.png", buffer.getvalue())
                counts[folder] += 1
                classes[name] += 1
        if not counts:
            raise ValueError(f"--dataset {source}: no images in it, or none in train, test or validation")
        manifest: dict[str, Any] = {"source": source, "sha256": sha256_of(partial), "num_images": sum(counts.values())}
        manifest |= {"image_size": image_size, "classes": dict(sorted(classes.items()))}
        manifest["folders"] = dict(sorted(counts.items()))
        beside.unlink(missing_ok=True)  # of what was there before: none rather than another's
        partial.replace(output)
    write_whole(beside, json.dumps(manifest, indent=2) + "\n")
    return manifest


def torchvision_items(name: str, root: Path) -> Iterator[Item]:
    """Caltech101 without its background class (Fei-Fei et al. 2004); CIFAR-10 and MNIST with their own test sets."""
    from torchvision import datasets

    dataset_class = getattr(datasets, TORCHVISION[name])
    for split in ("",) if name == "caltech101" else ("train", "test"):
        dataset = dataset_class(str(root), download=True, **({"train": split == "train"} if split else {}))
        names = dataset.classes if split else dataset.categories
        for image, label in dataset:
            yield split, names[label], image


def hub_items(config: PrepareConfig) -> Iterator[Item]:
    """Every split of a hub dataset that is a training or a test set."""
    from data.pixels import open_image

    try:
        from datasets import Image, load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError("--dataset hf:...: needs the optional extra: pip install -e '.[hub]'") from error
    loaded: Any = load_dataset(config.dataset.removeprefix("hf:"), cache_dir=str(config.root))
    splits = {"train": "train", "test": "test", "validation": "test"} if len(loaded) > 1 else {next(iter(loaded)): ""}
    names = {name for name in splits if name in loaded}
    if {"test", "validation"} <= names:  # the labels of a test set may be withheld
        has_labels = config.label_column in loaded["test"].features and loaded["test"][0][config.label_column] != -1
        names -= {"validation" if has_labels else "test"}
    for name in [name for name in splits if name in names]:
        split = splits[name]
        for column in (config.image_column, config.label_column):
            if column not in loaded[name].features:
                raise ValueError(f"{config.dataset} has no column '{column}', but {list(loaded[name].features)}")
        label_names = getattr(loaded[name].features[config.label_column], "names", None)
        for row in loaded[name].cast_column(config.image_column, Image(decode=False)):  # decoded here: see FORMATS
            label, stored = row[config.label_column], row[config.image_column]
            if stored is None or label is None or label == -1:  # -1, of a class that is withheld, counts from behind
                lacking = config.image_column if stored is None else config.label_column
                raise ValueError(f"{config.dataset}: the {name} split has a row without {lacking}")
            image = open_image(stored["bytes"] or Path(stored["path"]).read_bytes())
            yield split, label_names[label] if label_names else str(label), image


if __name__ == "__main__":
    with one_line_errors():
        main(parse(PrepareConfig, first="dataset"))
