"""Download a public data set into a zip with a folder per class, and write a manifest next to it.

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

from experiment.cli import run_main
from settings import within

TORCHVISION = {"caltech101": "Caltech101", "cifar10": "CIFAR10", "mnist": "MNIST"}
Item = tuple[str, str, Any]  # split ('' if there is none), class name, PIL image


@dataclass(frozen=True)
class PrepareConfig:
    """Download a public data set into a zip with a folder per class, below train/ and test/ if it has splits.

    Args:
        dataset: 'caltech101', 'cifar10', 'mnist', or 'hf:OWNER/NAME' from the hub (pip install -e '.[hub]')
        output: zip to write, with a manifest of the same name that ends in .json
        image_size: crop the centre square and resize it to this side; by default images stay as they are
        image_column: column with the images, for data sets from the hub
        label_column: column with the labels, for data sets from the hub
        root: folder for the downloaded originals; existing files are not downloaded again
    """

    dataset: str
    output: Path
    image_size: int | None = within("[1, 16384]", None)
    image_column: str = "image"
    label_column: str = "label"
    root: Path = Path("cache/originals")


def main(config: PrepareConfig) -> None:
    """Download the data and write the zip."""
    socket.setdefaulttimeout(20)
    if config.dataset.startswith("hf:"):
        items = hub_items(config)
    elif config.dataset in TORCHVISION:
        items = torchvision_items(config.dataset, config.root)
    else:
        raise ValueError(f"--dataset {config.dataset}: unknown, choose from {', '.join(TORCHVISION)} or hf:OWNER/NAME")
    manifest = write_zip(with_download_errors(items, config), config.output, config.image_size, source=config.dataset)
    print(f"{manifest['num_images']} images of {len(manifest['classes'])} classes: {config.output}")


def with_download_errors(items: Iterator[Item], config: PrepareConfig) -> Iterator[Item]:
    """Yield the items, with a message of its own for failed downloads."""
    try:
        yield from items
    except (OSError, RuntimeError) as error:  # torchvision and the hub raise either of them
        reason = " ".join(str(error).split())[:160]
        raise OSError(
            f"--dataset {config.dataset} could not be fetched ({reason}); put the originals into --root {config.root}"
        ) from error


def write_zip(items: Iterator[Item], output: Path, image_size: int | None, *, source: str) -> dict[str, Any]:
    """Write PNGs uncompressed in a zip, and the manifest; a failure leaves no files, other zips are kept."""
    from tqdm import tqdm

    from data.pixels import fit, to_rgb
    from machine.atomic_files import keeping, sha256_of, write_atomic

    path = output.with_suffix(".json")
    if output.suffix.lower() != ".zip" or output.is_dir():  # else `pets` and `pets.zip` would share a manifest
        raise ValueError(f"--output {output}: give FILE.zip")
    if path.exists() and b'"sha256"' not in path.read_bytes():
        raise ValueError(f"--output {output}: its manifest would replace {path}, which is none; give another name")
    if output.exists() and not (path.exists() and json.loads(path.read_text()).get("sha256") == sha256_of(output)):
        raise ValueError(
            f"--output {output}: is there, and {path.name} is not its manifest; move it, or give another name"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    classes: Counter[str] = Counter()
    class_of: dict[str, str] = {}  # by folder
    with tempfile.TemporaryDirectory(dir=output.parent) as temporary:
        partial = Path(temporary) / "data.zip"
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            for split, name, image in tqdm(items, desc=source, unit="img"):
                buffer = io.BytesIO()
                size = None if image_size is None else (image_size, image_size)
                fit(to_rgb(image), size).save(buffer, format="PNG")
                class_folder = re.sub(r"[/\\]|^\.", "_", name)
                if not class_folder or class_of.setdefault(class_folder, name) != name:
                    other = class_of.get(class_folder)
                    problem = f"would lie in one folder with '{other}'" if other else "has no name"
                    raise ValueError(f"--dataset {source}: the class '{name}' {problem}; rename it at its source")
                folder = f"{split}/{class_folder}" if split else class_folder
                archive.writestr(f"{folder}/{counts[folder]:06d}.png", buffer.getvalue())
                counts[folder] += 1
                classes[name] += 1
        if not counts:
            raise ValueError(f"--dataset {source}: no images in it, or none in train, test or validation")
        manifest: dict[str, Any] = {"source": source, "sha256": sha256_of(partial), "num_images": sum(counts.values())}
        manifest |= {"image_size": image_size, "classes": dict(sorted(classes.items()))}
        manifest["folders"] = dict(sorted(counts.items()))
        before = {**json.loads(path.read_text()), "sha256": None} if path.exists() else {}
        with keeping([output, path] if before != {**manifest, "sha256": None} else []):
            path.unlink(missing_ok=True)  # so that the new zip is never beside the manifest of an old one
            partial.replace(output)
    write_atomic(path, json.dumps(manifest, indent=2) + "\n")
    return manifest


def torchvision_items(name: str, root: Path) -> Iterator[Item]:
    """Yield Caltech101 (Fei-Fei et al. 2004) without its background class, or CIFAR-10 or MNIST with its test set."""
    from torchvision import datasets

    dataset_class = getattr(datasets, TORCHVISION[name])
    for split in ("",) if name == "caltech101" else ("train", "test"):
        dataset = dataset_class(str(root), download=True, **({"train": split == "train"} if split else {}))
        names = dataset.classes if split else dataset.categories
        for image, label in dataset:
            yield split, names[label], image


def hub_items(config: PrepareConfig) -> Iterator[Item]:
    """Yield the training and test splits of a data set of the hub; validation replaces a missing test split."""
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
        for row in loaded[name].cast_column(config.image_column, Image(decode=False)):  # `open_image` limits formats
            label, stored = row[config.label_column], row[config.image_column]
            if stored is None or label is None or label == -1:  # -1 marks a withheld label, and is a valid index
                missing = config.image_column if stored is None else config.label_column
                raise ValueError(f"{config.dataset}: the {name} split has a row without {missing}")
            image = open_image(stored["bytes"] or Path(stored["path"]).read_bytes())
            yield split, label_names[label] if label_names else str(label), image


if __name__ == "__main__":
    run_main(main, PrepareConfig, first="dataset")
