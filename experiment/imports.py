"""`--imports`: the user's own modules, loaded for what they register.

Code runs on the user's word alone. The word is given by a flag, or by a configuration that the user passes; it is kept
outside every run, in `$XDG_STATE_HOME/latent-diffusion-backbones/imports`: of a module its name, of a file the hash of
its content. What a checkpoint or a run's own configuration names is loaded only where that word was given before.
"""

import ast
import hashlib
import importlib.util
import os
import sys
import sysconfig
import traceback
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

RECORD = "latent-diffusion-backbones/imports"
_loaded: dict[str, str] = {}  # as they were named, by name without folders
_contents: dict[str, str] = {}  # hashes of all their files, when they were loaded
_given: set[str] = set()  # of these, by the user


def load_imports(
    names: Sequence[str], *, stored_in: Path | str | None = None, contents: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Import modules by name and .py files, or ValueError. `stored_in` is the run or checkpoint that names them, None
    where the user does; `contents` what they were then. A loaded file of the same name will do."""
    for name in names:
        file = Path(name).expanduser() if name.endswith(".py") else None
        key = file.name if file else name
        if stored_in is not None and key in _given:
            continue
        if file and not file.is_file():
            named = f"{stored_in} names it, and it is not here" if stored_in else "no such file"
            raise ValueError(f"--imports {name}: {named}; give --imports the path of {key}")
        source = file.read_bytes() if file else None
        word = name if source is None else hashlib.sha256(source).hexdigest()
        record = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state", RECORD)
        words = set()
        with suppress(OSError):
            words = set(record.read_text().split())
        if stored_in is not None and word not in words:
            raise ValueError(
                f"--imports {name}: {stored_in} names it, and its code was not given here before; if you trust it, "
                f"repeat the command with --imports {name}"
            )
        content = _content_of(name)
        if contents.get(key, content) != content:
            raise ValueError(
                f"--imports {name}: {stored_in} was made with other code of that name; give --imports the file that it "
                "was made with, or this one to take it nevertheless"
            )
        if word not in words:
            with suppress(OSError):  # where nothing can be kept, the flag has to be given each time
                record.parent.mkdir(parents=True, exist_ok=True)
                with record.open("a") as lines:
                    lines.write(f"{word}\n")
        _load(name, source, word)
        _loaded[key], _contents[key] = name, content
        _given.update({key} if stored_in is None else ())


def contents_of(names: Sequence[str]) -> dict[str, str]:
    """Hashes of what was loaded by these names, by name without folders."""
    keys = [Path(name).name if name.endswith(".py") else name for name in names]
    return {key: _contents[key] for key in keys if key in _contents}


def imported_files() -> dict[str, Path]:
    """The Python files of what was loaded: of a package all of them, of a file those of the user's that it imports too;
    each by a name without its place on the disk."""
    return {place: file for name in _loaded.values() for place, file in _files_of(name).items()}


def _files_of(name: str) -> dict[str, Path]:
    if name.endswith(".py"):
        file = Path(name).expanduser()
        return {file.name: file, **_imported_by(file)}
    spec = importlib.util.find_spec(name.partition(".")[0])
    if spec and spec.origin and not spec.submodule_search_locations:
        return {Path(spec.origin).name: Path(spec.origin)}
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    return {f"{folder.name}/{file.relative_to(folder)}": file for folder in folders for file in folder.rglob("*.py")}


def _imported_by(file: Path) -> dict[str, Path]:
    """Of the user's own: neither installed, nor Python's or this repository's."""
    installed = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")]
    rooms = {path.parent.name for path in Path(__file__).parents[1].glob("*/__init__.py")}
    files: dict[str, Path] = {}
    waiting = [file]
    while waiting:
        nodes: list[ast.AST] = []
        with suppress(SyntaxError):  # which loading it tells
            nodes = list(ast.walk(ast.parse(waiting.pop().read_bytes())))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
        for name in {name.partition(".")[0] for name in names} - {"", *sys.builtin_module_names, *rooms}:
            spec = importlib.util.find_spec(name) if name != "__main__" else None
            places = [spec.origin, *(spec.submodule_search_locations or ())] if spec else []
            place = next((Path(place).resolve() for place in places if place and Path(place).exists()), None)
            if place and not any(place.is_relative_to(folder) for folder in installed):
                new = {name: path for name, path in _files_of(name).items() if name not in files}
                files |= new
                waiting += new.values()
    return files


def _content_of(name: str) -> str:
    digest = hashlib.sha256()
    for place, file in sorted(_files_of(name).items()):
        digest.update(place.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _load(name: str, source: bytes | None, word: str) -> None:
    key = name if source is None else f"imported_{Path(name).stem}_{word[:12]}"
    if key in sys.modules:
        return
    try:
        if source is None:
            importlib.import_module(name)
            return
        module = sys.modules[key] = types.ModuleType(key)
        module.__file__ = name
        exec(compile(source, name, "exec"), vars(module))  # what was hashed, and no __pycache__ that lies beside it
    except Exception as error:  # whatever a user's module raises
        sys.modules.pop(key, None)
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            remedy = "give a .py file, or put its folder on PYTHONPATH"
            raise ValueError(f"--imports {name}: no such module; {remedy}") from error
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"--imports {name}: {type(error).__name__}: {error} ({last.filename}, line {last.lineno}); "
            "TRACEBACK=1 shows how it came there"
        ) from error
